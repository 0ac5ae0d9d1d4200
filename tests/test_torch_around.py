"""The torch adapter among torch's other parts: schedulers, scalers, saved state, graphs, derivatives, shards."""

import pytest

pytest.importorskip("torch")

import copy
import functools
import io
import math
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import state_dict as dcp
from torch.optim import lr_scheduler, swa_utils

from acprop_torch import ACProp
from hosts import torch_version

WAYS = {"for-loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
ways = pytest.mark.parametrize("flags", WAYS.values(), ids=WAYS)


def model_of(dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)).to(dtype)


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int, after: Any = None) -> None:
    generator = torch.Generator().manual_seed(1)
    dtype = next(model.parameters()).dtype
    for _ in range(steps):
        x = torch.randn(8, 3, generator=generator, dtype=torch.float64).to(dtype)
        optimizer.zero_grad()
        (model(x) - x.sum(dim=1, keepdim=True)).square().mean().backward()
        optimizer.step()
        if after is not None:
            after()


def values(model: torch.nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def assert_equal(a: torch.nn.Module, b: torch.nn.Module) -> None:
    for x, y in zip(values(a), values(b), strict=True):
        assert torch.equal(x, y)


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, step_size=2, gamma=0.5),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 1.0 / (epoch + 1)),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=10),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, base_lr=0.01, max_lr=0.1, step_size_up=2),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=7),
}


@ways
@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("tensor", [False, True], ids=["number", "tensor"])
def test_schedulers_rule_rate_and_betas(flags: dict[str, bool], name: str, tensor: bool) -> None:
    """A scheduled run is the run in which the groups are given the scheduler's numbers by hand."""
    if tensor and flags.get("foreach"):
        pytest.skip("refused, as AdamW does")
    lr = torch.tensor(0.01, dtype=torch.float64) if tensor else 0.01
    model, twin = model_of(), model_of()
    optimizer, by_hand = ACProp(model.parameters(), lr=lr, **flags), ACProp(twin.parameters(), **flags)
    scheduler = SCHEDULERS[name](optimizer)
    numbers = []

    def note() -> None:
        scheduler.step()
        numbers.append((float(optimizer.param_groups[0]["lr"]), optimizer.param_groups[0]["betas"]))

    numbers.append((float(optimizer.param_groups[0]["lr"]), optimizer.param_groups[0]["betas"]))
    train(model, optimizer, 6, note)
    assert len({rate for rate, _ in numbers}) > 2
    if tensor:
        assert optimizer.param_groups[0]["lr"] is lr  # filled in place, so that a graph sees it
    upcoming = iter(numbers[1:])

    def set_numbers(rate: float, betas: Any) -> None:
        by_hand.param_groups[0].update(lr=rate, betas=tuple(map(float, betas)))

    set_numbers(*numbers[0])
    train(twin, by_hand, 6, lambda: set_numbers(*next(upcoming)))
    assert_equal(model, twin)


@ways
def test_grad_scaler_changes_nothing_but_the_range(flags: dict[str, bool]) -> None:
    """Scaled, unscaled and skipped: as without a scaler, where it found no infinity, and untouched where it did."""
    model, twin = model_of(torch.float32), model_of(torch.float32)
    optimizer, plain = ACProp(model.parameters(), **flags), ACProp(twin.parameters(), **flags)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    x = torch.ones(4, 3)
    for step in range(5):
        for m in (model, twin):
            m.zero_grad()
            loss = m(x).square().mean()
            (scaler.scale(loss) if m is model else loss).backward()
        if step == 2:
            before = copy.deepcopy((values(model), optimizer.state_dict()["state"]))
            next(model.parameters()).grad[0, 0] = math.inf
        scaler.step(optimizer)
        if step == 2:
            torch.testing.assert_close((values(model), optimizer.state_dict()["state"]), before, rtol=0, atol=0)
        else:
            plain.step()
        scaler.update()
    assert scaler.get_scale() == 2.0**9
    assert_equal(model, twin)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fused_unscales_16_bit_gradients_in_the_dtype_of_the_moments(dtype: torch.dtype) -> None:
    xs = [torch.ones(3, dtype=dtype, requires_grad=True) for _ in range(2)]
    scaled, plain = (ACProp([x], fused=True) for x in xs)
    scaled.grad_scale, scaled.found_inf = torch.tensor(1024.0), torch.tensor(0.0)
    for g in (0.5, 2.0, -0.25):
        xs[0].grad, xs[1].grad = torch.full((3,), 1024 * g, dtype=dtype), torch.full((3,), g, dtype=dtype)
        scaled.step()
        plain.step()
    assert torch.equal(*xs)


def test_a_scaler_leaves_unscaling_to_the_optimizer_only_if_all_groups_are_fused() -> None:
    a, b = torch.ones(1, requires_grad=True), torch.ones(1, requires_grad=True)
    assert ACProp([a], fused=True)._step_supports_amp_scaling
    assert not ACProp([a])._step_supports_amp_scaling
    assert not ACProp([{"params": [a]}, {"params": [b], "fused": False}], fused=True)._step_supports_amp_scaling


@ways
@pytest.mark.parametrize("way", ["state_dict", "weights_only", "pickle", "deepcopy"])
def test_a_saved_run_goes_on_as_if_never_stopped(flags: dict[str, bool], way: str) -> None:
    model = model_of(torch.float32)
    optimizer = ACProp(model.parameters(), lr=1e-2, clip_exponent=0.25, moment_dtype=torch.float64, **flags)
    train(model, optimizer, 3)
    twin = copy.deepcopy(model)
    if way in ("state_dict", "weights_only"):
        state = optimizer.state_dict()
        if way == "weights_only":
            file = io.BytesIO()
            torch.save(state, file)
            file.seek(0)
            state = torch.load(file, weights_only=True)
        again = ACProp(twin.parameters())
        again.load_state_dict(state)
    else:
        pair = (model, optimizer)
        twin, again = copy.deepcopy(pair) if way == "deepcopy" else pickle.loads(pickle.dumps(pair))
    assert str(again.state_dict()) == str(optimizer.state_dict())
    train(model, optimizer, 3)
    train(twin, again, 3)
    assert_equal(model, twin)


@ways
def test_older_states_load(flags: dict[str, bool]) -> None:
    """A state without the flags that came later, and with a number for a step."""
    model = model_of()
    optimizer = ACProp(model.parameters(), **flags)
    train(model, optimizer, 2)
    state = copy.deepcopy(optimizer.state_dict())
    for group in state["param_groups"]:
        for name in ("foreach", "differentiable", "fused", "maximize", "capturable", "decoupled_weight_decay"):
            del group[name]
    for own in state["state"].values():
        own["step"] = own["step"].item()
    optimizer.load_state_dict(state)
    train(model, optimizer, 1)
    for own in optimizer.state.values():
        assert own["step"].item() == 3
        assert own["step"].dtype == torch.get_default_dtype()
    assert optimizer.param_groups[0]["decoupled_weight_decay"] is True


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_state_older_than_synchronous_steps_stays_asynchronous(asynchronous: bool) -> None:
    model = model_of()
    optimizer = ACProp(model.parameters())
    train(model, optimizer, 2)
    state = copy.deepcopy(optimizer.state_dict())
    del state["param_groups"][0]["asynchronous"]
    other = ACProp(model.parameters(), asynchronous=asynchronous)
    other.load_state_dict(state)
    assert other.param_groups[0]["asynchronous"] is True


def test_loading_casts_to_the_dtype_that_the_moments_have_here() -> None:
    wide, narrow, half = (
        torch.ones(2, dtype=d, requires_grad=True) for d in (torch.float64, torch.float32, torch.half)
    )
    optimizer = ACProp([wide])
    wide.grad = torch.tensor([0.1, 0.3], dtype=torch.float64)
    optimizer.step()
    for x in (narrow, half):
        other = ACProp([x])
        other.load_state_dict(optimizer.state_dict())
        assert other.state[x]["exp_avg"].dtype == torch.float32
        assert torch.equal(other.state[x]["exp_avg"], optimizer.state[wide]["exp_avg"].float())


def test_loading_respects_the_hooks_of_others() -> None:
    x = torch.ones(1, requires_grad=True)
    x.grad = torch.ones(1)
    optimizer = ACProp([x], lr=0.1)
    optimizer.step()
    seen = []

    def double(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        state = copy.deepcopy(state)
        state["state"][0]["exp_avg"] *= 2
        state["param_groups"][0]["lr"] = 0.003
        return state

    optimizer.register_load_state_dict_pre_hook(double)
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append(o.state[x]["exp_avg"].item()))
    before = optimizer.state[x]["exp_avg"].item()
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.003
    assert seen == [2 * before]
    assert len(optimizer._optimizer_load_state_dict_pre_hooks) == 1


def test_state_that_is_of_no_parameter_is_left_alone() -> None:
    x = torch.ones(1, requires_grad=True)
    optimizer = ACProp([x])
    optimizer.register_state_dict_pre_hook(lambda o: o.state.__setitem__("note", 1))
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.state["note"] == 1


def test_a_state_for_other_groups_is_refused_and_changes_nothing() -> None:
    a, b = (torch.ones(1, requires_grad=True) for _ in range(2))
    one, two = ACProp([a]), ACProp([{"params": [a]}, {"params": [b]}])
    before = str(one.state_dict())
    with pytest.raises(ValueError, match="different number of parameter groups"):
        one.load_state_dict(two.state_dict())
    with pytest.raises(ValueError, match="doesn't match the size of optimizer's group"):
        one.load_state_dict(ACProp([a, b]).state_dict())
    assert str(one.state_dict()) == before
    assert not one._optimizer_load_state_dict_pre_hooks


def authors_step(x: torch.Tensor, state: dict[str, Any], g: torch.Tensor, lr: float, decay: float, l2: bool) -> None:
    """Do what one step of the authors' code does to one tensor, with rectify=False and amsgrad=False."""
    b1, b2, eps = 0.9, 0.999, 1e-8
    if l2:
        g = g + decay * x
    else:
        x.mul_(1.0 - lr * decay)
    state["step"] += 1
    t, m, v = state["step"], state["exp_avg"], state["exp_avg_var"]
    m.mul_(b1).add_(g, alpha=1 - b1)
    if t == 1:
        x.add_(m, alpha=-lr / (1 - b1))
    else:
        v.add_(eps)
        x.sub_(lr * g / (v.sqrt() / math.sqrt(1 - b2 ** (t - 1)) + eps))
    v.mul_(b2).addcmul_(g - m, g - m, value=1 - b2)


@pytest.mark.parametrize("l2", [False, True], ids=["decoupled", "l2"])
@pytest.mark.parametrize("steps", [1, 2, 40])
def test_a_run_of_the_authors_is_continued(l2: bool, steps: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, *grads = torch.randn(100, 6, dtype=torch.float64, generator=generator)
    state = {"step": 0, "exp_avg": torch.zeros_like(x), "exp_avg_var": torch.zeros_like(x)}
    for g in grads[:steps]:
        authors_step(x, state, g, 1e-2, 0.1, l2)
    group = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1, "amsgrad": False, "params": [0]}
    if steps > 1:  # not all versions of their code have it
        group["buffer"] = [[None, None, None] for _ in range(10)]
    else:
        del group["amsgrad"]
    ours = x.clone().requires_grad_()
    optimizer = ACProp([ours], decoupled_weight_decay=not l2, foreach=True)
    saved = {"state": {0: copy.deepcopy(state)}, "param_groups": [group]}
    before = str(saved)
    optimizer.load_state_dict(saved)
    assert str(saved) == before
    assert optimizer.param_groups[0]["eps_root"] == 1e-8
    assert optimizer.param_groups[0]["foreach"] is True
    for g in grads[steps:]:
        authors_step(x, state, g, 1e-2, 0.1, l2)
        ours.grad = g.clone()
        optimizer.step()
    torch.testing.assert_close(ours.detach(), x, rtol=1e-12, atol=1e-12)
    assert "amsgrad" not in optimizer.param_groups[0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"asynchronous": False}, "asynchronous=False"),
        ({"centering": "none"}, "centering='none'"),
        ({"centering": "previous"}, "centering='previous'"),
    ],
)
def test_a_run_of_the_authors_is_refused_in_another_corner(options: dict[str, Any], words: str) -> None:
    x = torch.ones(1, requires_grad=True)
    optimizer = ACProp([x], **options)
    group = {"lr": 0.1, "betas": (0.9, 0.9), "eps": 1e-8, "weight_decay": 0, "params": [0]}
    state = {"step": 3, "exp_avg": torch.ones(1), "exp_avg_var": torch.ones(1)}
    reason = (
        f"of the authors' ACProp, whose moments mean something else with {words}, as here; make this optimizer with"
    )
    with pytest.raises(ValueError, match=f"parameter group 0 is {reason} asynchronous=True and centering='current'"):
        optimizer.load_state_dict({"state": {0: state}, "param_groups": [group]})
    assert not optimizer.state


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"amsgrad": True}, "amsgrad=True"),
        ({"rectify": True}, "rectify=True"),
        ({"buffer": [[7, 4.5, 0.1], [None, None, None]]}, "rectify=True"),
    ],
)
def test_what_the_authors_do_beyond_the_paper_is_refused(change: dict[str, Any], reason: str) -> None:
    x = torch.ones(1, requires_grad=True)
    optimizer = ACProp([x], lr=0.5)
    group = {"lr": 0.1, "betas": (0.9, 0.9), "eps": 1e-8, "weight_decay": 0, "amsgrad": False, "params": [0], **change}
    with pytest.raises(ValueError, match=f"parameter group 0 comes from a run with {reason}, which is another"):
        optimizer.load_state_dict({"state": {}, "param_groups": [group]})
    assert optimizer.param_groups[0]["lr"] == 0.5


@pytest.mark.skipif(torch_version() < (2, 6), reason="torch before 2.6: no names in parameter groups")
def test_named_parameters_keep_their_names() -> None:
    model = model_of()
    optimizer = ACProp(model.named_parameters())
    names = optimizer.state_dict()["param_groups"][0]["param_names"]
    assert names == ["0.weight", "0.bias", "2.weight", "2.bias"]
    again = ACProp(model_of().parameters())
    again.load_state_dict(optimizer.state_dict())
    assert again.param_groups[0]["param_names"] == names


def test_tied_parameters_are_refused_or_warned_of_as_torch_does() -> None:
    x = torch.ones(1, requires_grad=True)
    with pytest.warns(UserWarning, match="duplicate parameters"):
        ACProp([x, x])
    with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
        ACProp([{"params": [x]}, {"params": [x]}])
    with pytest.raises(ValueError, match="can't optimize a non-leaf Tensor"):
        ACProp([x * 2])
    with pytest.raises(ValueError, match="empty parameter list"):
        ACProp([])
    with pytest.raises(TypeError, match="should be an iterable of Tensors or dicts"):
        ACProp(x)


@ways
def test_hooks_are_called_around_a_step(flags: dict[str, bool]) -> None:
    x = torch.ones(1, requires_grad=True)
    x.grad = torch.ones(1)
    optimizer = ACProp([x], lr=0.5, **flags)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(x.item()))
    optimizer.register_step_post_hook(lambda *_: seen.append(x.item()))
    optimizer.step()
    assert seen == [1.0, 0.5]


@ways
def test_averages_of_weights(flags: dict[str, bool]) -> None:
    model = model_of()
    averaged = swa_utils.AveragedModel(model)
    optimizer = ACProp(model.parameters(), **flags)
    scheduler = swa_utils.SWALR(optimizer, swa_lr=0.05)
    seen: list[list[torch.Tensor]] = []

    def after() -> None:
        averaged.update_parameters(model)
        scheduler.step()
        seen.append(values(model))

    train(model, optimizer, 3, after)
    for mean, *all_values in zip(values(averaged.module), *seen, strict=True):
        torch.testing.assert_close(mean, torch.stack(all_values).mean(dim=0))


@ways
def test_frozen_and_late_parameters(flags: dict[str, bool]) -> None:
    model = model_of()
    model[0].requires_grad_(False)
    before = values(model[0])
    optimizer = ACProp(model[0].parameters(), **flags)
    optimizer.add_param_group({"params": model[2].parameters(), "lr": 1e-2})
    train(model, optimizer, 2)
    assert all(torch.equal(a, b) for a, b in zip(values(model[0]), before, strict=True))
    model[0].requires_grad_(True)
    train(model, optimizer, 1)
    assert [optimizer.state[p]["step"].item() for p in model.parameters()] == [1, 1, 3, 3]


def diff_step(x: torch.Tensor, g: torch.Tensor, m: torch.Tensor, v: torch.Tensor, *rest: Any, **options: Any) -> Any:
    """Take two steps in which everything that is differentiable may be followed."""
    x = x.clone()
    numbers = dict(zip(("lr", "weight_decay", "b1", "b2"), rest, strict=False))
    betas = (numbers.pop("b1"), numbers.pop("b2")) if "b1" in numbers else (0.9, 0.99)
    optimizer = ACProp([x], **{"lr": 0.9, **numbers, "betas": betas, **options, "differentiable": True})
    start = torch.tensor(10.0, dtype=torch.float64)
    optimizer.state[x].update(step=start, exp_avg=m.clone(), exp_avg_var=v.clone())
    for _ in range(2):
        x.grad = g * x.clone().cos()
        optimizer.step()
    state = optimizer.state[x]
    return x, state["exp_avg"], state["exp_avg_var"]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"clip_exponent": 0.25},
        {"maximize": True},
        {"centering": "previous"},
        {"asynchronous": False},
        {"asynchronous": False, "centering": "none"},
    ],
    ids=str,
)
@pytest.mark.parametrize("numbers", [0, 1, 2, 4])
@pytest.mark.parametrize("decoupled", [True, False])
def test_derivatives(options: dict[str, Any], numbers: int, decoupled: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x, g, m, v = torch.rand(4, 5, dtype=torch.float64, generator=generator).requires_grad_().unbind()
    rest = [torch.tensor(n, dtype=torch.float64, requires_grad=True) for n in (0.7, 0.2, 0.9, 0.99)[:numbers]]
    inputs = [y.detach().requires_grad_() for y in (x, g, m, v)]
    f = functools.partial(diff_step, decoupled_weight_decay=decoupled, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a backward through a non-leaf's .grad
        assert torch.autograd.gradcheck(f, (*inputs, *rest))


@pytest.mark.parametrize("b1", [0.0, 0.9])
def test_derivatives_of_the_very_first_steps_are_finite(b1: float) -> None:
    """Meta-learning differentiates through the steps from nothing, by the rate and by the start."""
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    start = torch.tensor([1.0, -2.0, 0.0], dtype=torch.float64, requires_grad=True)
    x = start.clone()
    optimizer = ACProp([x], lr=lr, betas=(b1, 0.99), clip_exponent=0.25, differentiable=True)
    for _ in range(3):
        (x.grad,) = torch.autograd.grad(x.clone().square().sum(), x, create_graph=True)
        optimizer.step()
    by_lr, by_start = torch.autograd.grad(x.square().sum(), (lr, start))
    assert torch.isfinite(by_lr)
    assert torch.isfinite(by_start).all()
    assert by_lr != 0


def test_func_transforms_go_through_a_differentiable_step() -> None:
    def after_two_steps(start: torch.Tensor) -> torch.Tensor:
        x = start.clone()
        optimizer = ACProp([x], lr=0.1, clip_exponent=0.25, differentiable=True)
        for _ in range(2):
            x.grad = 2 * x.clone()
            optimizer.step()
        return x.sum()

    starts = torch.tensor([[1.0, -2.0], [0.5, 3.0]], dtype=torch.float64)
    one_by_one = torch.stack([torch.func.grad(after_two_steps)(start) for start in starts])
    assert torch.equal(torch.func.vmap(torch.func.grad(after_two_steps))(starts), one_by_one)
    torch.testing.assert_close(
        torch.stack([torch.autograd.functional.jacobian(after_two_steps, start) for start in starts]), one_by_one
    )


@ways
@pytest.mark.parametrize("transform", ["grad", "functionalize"])
def test_func_transforms_take_plain_steps(transform: str, flags: dict[str, bool]) -> None:
    def trained(start: torch.Tensor) -> torch.Tensor:
        p = torch.nn.Parameter(start.detach().clone())
        optimizer = ACProp([p], lr=0.1, clip_exponent=0.25, **flags)
        for _ in range(3):
            p.grad = 2 * p.detach()
            optimizer.step()
        return p.detach()

    start = torch.tensor([1.0, -2.0, 0.5])
    of = {"grad": lambda x: (x * trained(x)).sum(), "functionalize": trained}  # the first has the same derivative
    found = getattr(torch.func, transform)(of[transform])(start)
    torch.testing.assert_close(found, trained(start), rtol=1e-6, atol=0)  # torch's own root may be the other neighbour


@ways
@pytest.mark.skipif(torch_version() < (2, 8), reason="torch before 2.8: the mode knows no operations on lists")
def test_a_mode_sees_what_a_step_changes(flags: dict[str, bool]) -> None:
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = ACProp([p], lr=0.1, clip_exponent=0.25, **flags)
    p.grad = torch.ones(3)
    optimizer.step()
    before = p.detach().clone()
    with torch.autograd.graph.allow_mutation_on_saved_tensors():
        loss = p.square().sum()
        optimizer.step()
        p.grad = None
        loss.backward()
    assert torch.equal(p.grad, 2 * before)


@pytest.mark.parametrize("flags", [{"foreach": False}, {"fused": True}, {}])
def test_betas_may_be_integers_in_tensors(flags: dict[str, bool]) -> None:
    ends = []
    for betas in ((torch.tensor(0), torch.tensor(0.875)), (0.0, 0.875)):
        p = torch.nn.Parameter(torch.ones(3))
        optimizer = ACProp([{"params": [p], "betas": betas}], lr=0.1, clip_exponent=0.25, **flags)
        p.grad = torch.tensor([1.0, -2.0, 0.5])
        optimizer.step()
        ends.append(p.detach())
    assert torch.equal(*ends)


@ways
def test_what_would_lose_a_part_is_refused(flags: dict[str, bool]) -> None:
    other, negated = torch.nn.Parameter(torch.ones(2)), torch.ones(2, dtype=torch.complex64).conj().imag
    optimizer = ACProp([other, torch.nn.Parameter(negated)], **flags)
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.ones(2)
    with pytest.raises(RuntimeError, match="parameter 1 .* is a lazily negated view"):
        optimizer.step()
    assert torch.equal(other, torch.ones(2))
    if not hasattr(torch.Tensor, "grad_dtype"):
        pytest.skip("this torch has no gradients of another dtype")
    p = torch.nn.Parameter(torch.ones(2))
    p.grad_dtype = None
    p.grad = torch.tensor([1 + 5j, 1j])
    with pytest.raises(TypeError, match="parameter 0 .* is real and its gradient has dtype torch.complex64"):
        ACProp([p], **flags).step()


def test_a_step_that_wants_a_gradient_is_refused_in_differentiable_mode() -> None:
    x = torch.ones(1)
    optimizer = ACProp([x], differentiable=True)
    x.grad = torch.ones(1)
    optimizer.step()
    optimizer.state[x]["step"].requires_grad_()
    with pytest.raises(RuntimeError, match="`requires_grad` is not supported for `step` in differentiable mode"):
        optimizer.step()


@pytest.fixture
def one_process() -> Any:
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@ways
@pytest.mark.filterwarnings("ignore:DTensor random operators")  # torch 2.6, on a CPU
def test_autograd_sees_the_step_of_a_sharded_parameter(one_process: Any, flags: dict[str, bool]) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    def sharded(x: torch.Tensor) -> torch.Tensor:
        return distribute_tensor(x, init_device_mesh("cpu", (1,)), [Shard(0)])

    p = torch.nn.Parameter(sharded(torch.arange(3.0)))
    optimizer = ACProp([p], lr=1e-2, clip_exponent=0.25, **flags)
    for _ in range(2):  # the second step is the first one, kept
        loss = (p * p).sum()
        p.grad = sharded(torch.ones(3))
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@ways
def test_distributed_state_dicts(one_process: Any, flags: dict[str, bool]) -> None:
    """The functions of torch.distributed.checkpoint, which make state by a step with zero gradients."""
    model, twin = model_of(torch.float32), model_of(torch.float32)
    optimizer = ACProp(model.parameters(), lr=1e-2, weight_decay=0.1, **flags)
    untouched = values(model)
    dcp.get_optimizer_state_dict(model, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(values(model), untouched, strict=True))
    optimizer = ACProp(model.parameters(), lr=1e-2, weight_decay=0.1, **flags)
    train(model, optimizer, 3)
    again = ACProp(twin.parameters(), **flags)
    dcp.set_state_dict(
        twin,
        again,
        model_state_dict=model.state_dict(),
        optim_state_dict=copy.deepcopy(dcp.get_optimizer_state_dict(model, optimizer)),
    )
    train(model, optimizer, 2)
    train(twin, again, 2)
    assert_equal(model, twin)


@pytest.mark.skipif(torch_version() < (2, 7), reason="torch before 2.7: FSDP2 needs CUDA")
@ways
def test_sharded_parameters(one_process: Any, flags: dict[str, bool]) -> None:
    """FSDP2: parameters, gradients and moments are DTensors, whose local shards the rule runs on; steps are plain."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor

    from torch_ranks import fully_shard

    model, twin = model_of(torch.float32), model_of(torch.float32)
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    optimizer, plain = (ACProp(m.parameters(), lr=1e-2, weight_decay=0.1, **flags) for m in (model, twin))
    train(model, optimizer, 3)
    train(twin, plain, 3)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        state = optimizer.state[p]
        assert isinstance(state["exp_avg"], DTensor)
        assert not isinstance(state["step"], DTensor)
        assert torch.equal(p.full_tensor(), q)
