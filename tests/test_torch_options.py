"""The torch adapter's options: they mean what AdamW's do, in every way to step, and are refused in AdamW's words."""

import pytest

pytest.importorskip("torch")

import contextlib
import copy
import gc
import itertools
import math
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch

from acprop_torch import ACProp
from hosts import (
    called,
    capturable_on_cpu,
    forget_compiled_torch_step,
    fused_as_on_an_accelerator,
    interrupted_kernel,
    lists_on_a_cpu,
    named,
    numba_not_found,
    torch_threads,
    torch_tile,
    torch_tiles,
    without_numba,
)

OPTIONS = {"lr": 1e-2, "clip_exponent": 0.25}
WAYS = {
    "for-loop": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
    "fused by inductor": {"fused": True},
    "fused capturable": {"fused": True, "capturable": True},
    "capturable": {"capturable": True, "foreach": False},
    "capturable foreach": {"capturable": True, "foreach": True},
}
ways = pytest.mark.parametrize("way", WAYS, indirect=True)


@pytest.fixture
def way(request: pytest.FixtureRequest) -> Iterator[dict[str, bool]]:
    """Give the flags of a way to step, and make it possible on a CPU."""
    if request.param in ("fused", "fused capturable"):
        pytest.importorskip("numba")
    by_inductor = "inductor" in request.param
    with capturable_on_cpu(), without_numba() if by_inductor else contextlib.nullcontext():
        yield WAYS[request.param]


def tensors(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


SHAPES = ((3, 4), (5,), (), (0,), (2, 3, 2, 2))


def run(
    grads: list[list[torch.Tensor]], params: list[torch.Tensor] | None = None, **options: Any
) -> list[torch.Tensor]:
    """Return parameters and state after the given gradients; None in place of one leaves its parameter out."""
    xs = [x.clone().requires_grad_() for x in params or tensors(*SHAPES)]
    optimizer = ACProp(xs, **{**OPTIONS, **options})
    for step in grads:
        for x, g in zip(xs, step, strict=True):
            x.grad = g
        optimizer.step()
    return [x.detach() for x in xs] + [s for x in xs for s in optimizer.state[x].values()]


def stream(steps: int = 4, dtype: torch.dtype = torch.float64) -> list[list[torch.Tensor]]:
    return [tensors(*SHAPES, dtype=dtype, seed=seed) for seed in range(1, steps + 1)]


def assert_close(actual: list[torch.Tensor], expected: list[torch.Tensor], epsilons: float = 16) -> None:
    # torch's own sqrt on a CPU is not correctly rounded, so that compiled and eager steps differ in last bits
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=epsilons * torch.finfo(b.dtype).eps, atol=0)


@ways
def test_maximize_climbs_where_minus_the_gradient_descends(way: dict[str, bool]) -> None:
    grads = stream()
    climbed = run(grads, maximize=True, weight_decay=0.1, **way)
    descended = run([[-g for g in step] for step in grads], weight_decay=0.1, **way)
    for a, b in zip(climbed[: len(SHAPES)], descended[: len(SHAPES)], strict=True):
        assert torch.equal(a, b)


@ways
@pytest.mark.parametrize("maximize", [False, True])
def test_decay_that_is_not_decoupled_is_a_part_of_the_gradient(way: dict[str, bool], maximize: bool) -> None:
    xs = tensors(*SHAPES)
    sign = -1.0 if maximize else 1.0
    both = [[x.clone().requires_grad_() for x in xs] for _ in range(2)]
    l2 = ACProp(both[0], **OPTIONS, weight_decay=0.1, decoupled_weight_decay=False, maximize=maximize, **way)
    plain = ACProp(both[1], **OPTIONS, **way)
    for step in stream():
        for x, y, g in zip(*both, step, strict=True):
            x.grad, y.grad = g, sign * g + 0.1 * y.detach()
        l2.step()
        plain.step()
    assert_close([x.detach() for x in both[0]], [y.detach() for y in both[1]])


@ways
@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1)])
def test_tensors_for_numbers_mean_what_numbers_mean(way: dict[str, bool], shape: tuple[int, ...]) -> None:
    as_tensors = {
        "lr": torch.full(shape, 1e-2, dtype=torch.float64),
        "betas": (torch.full(shape, 0.9, dtype=torch.float64), torch.full(shape, 0.99, dtype=torch.float64)),
    }
    if way.get("foreach") and not way.get("capturable"):
        with pytest.raises(ValueError, match="lr as a Tensor is not supported for capturable=False and foreach=True"):
            ACProp(tensors((1,)), **as_tensors, **way)
        return
    grads = stream()
    assert_close(run(grads, **as_tensors, **way), run(grads, betas=(0.9, 0.99), **way))


@ways
@pytest.mark.parametrize("tile", [torch_tile(), 100])  # bytes: all at once, or in several lists
def test_every_parameter_has_its_own_step(way: dict[str, bool], tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch_tiles(monkeypatch, tile)
    grads = stream(5)
    grads[1][0] = grads[0][3] = grads[2][3] = None
    together = run(grads, **way)
    assert [int(x) for x in together[5::3]] == [4, 5, 5, 3, 5]
    for i, x in enumerate(tensors(*SHAPES)):
        alone = run([[step[i]] for step in grads], [x], **way)
        assert_close([together[i], *together[5 + 3 * i : 8 + 3 * i]], alone)


@ways
@pytest.mark.parametrize("options", [{}, {"maximize": True}, {"decoupled_weight_decay": False}], ids=str)
def test_the_gradient_is_not_written(way: dict[str, bool], options: dict[str, bool]) -> None:
    x, g = tensors((4,), (4,))
    x.requires_grad_()
    x.grad = g
    before, version = g.clone(), g._version
    ACProp([x], weight_decay=0.1, **options, **way).step()
    assert torch.equal(g, before)
    assert g._version == version


@ways
def test_autograd_learns_that_the_parameters_have_changed(way: dict[str, bool]) -> None:
    x = torch.ones(3, requires_grad=True)
    loss = (x * x).sum()
    x.grad = torch.ones(3)
    ACProp([x], **way).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@ways
@pytest.mark.parametrize("layout", ["channels_last", "transposed", "sliced", "gradient of another layout"])
def test_any_layout(way: dict[str, bool], layout: str) -> None:
    (x,) = tensors((4, 3, 8, 6))
    (g,) = tensors((4, 3, 8, 6), seed=1)
    laid_out = {
        "channels_last": lambda y: y.contiguous(memory_format=torch.channels_last),
        "transposed": lambda y: y.transpose(0, 3).contiguous().transpose(0, 3),
        "sliced": lambda y: torch.stack([y, y], dim=-1)[..., 0],
        "gradient of another layout": lambda y: y,
    }[layout]
    xs = [laid_out(x).clone().requires_grad_(), x.clone().requires_grad_()]
    optimizers = [ACProp([y], **OPTIONS, weight_decay=0.1, **way) for y in xs]
    for _ in range(3):
        xs[0].grad = laid_out(g) if "gradient" not in layout else g.transpose(0, 3).contiguous().transpose(0, 3)
        xs[1].grad = g
        for optimizer in optimizers:
            optimizer.step()
    state, plain = (optimizer.state[y] for optimizer, y in zip(optimizers, xs, strict=True))
    if layout in ("channels_last", "transposed"):
        assert state["exp_avg"].stride() == xs[0].stride()
    assert_close([xs[0].detach(), *state.values()], [xs[1].detach(), *plain.values()])


@pytest.mark.parametrize("way", ["for-loop", "foreach", "fused"], indirect=True)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_large_tensors_are_shared_out(way: dict[str, bool], threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch_tiles(monkeypatch, 56, single=56, small=24)
    torch_threads(monkeypatch, threads, least=5)
    shapes = ((40,), (2,), (6, 5), (1,), (), (2, 2), (9,))
    params, grads = tensors(*shapes), [tensors(*shapes, seed=seed) for seed in range(1, 4)]
    params[2], grads[1][0] = params[2].t(), torch.stack([grads[1][0]] * 2, dim=1)[:, 0]
    for step in grads:
        step[2] = step[2].t()
    cut = run(grads, params, weight_decay=0.1, **way)
    monkeypatch.undo()
    assert_close(cut, run(grads, params, weight_decay=0.1, foreach=False))


@pytest.mark.parametrize("way", ["foreach", "fused", "capturable", "capturable foreach"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes_may_be_mixed(way: dict[str, bool], dtype: torch.dtype) -> None:
    params = [*tensors((3, 4), (5,)), *tensors((4,), (2, 2), dtype=dtype)]
    grads = [[*tensors((3, 4), (5,), seed=s), *tensors((4,), (2, 2), dtype=dtype, seed=s)] for s in range(1, 4)]
    mixed = run(grads, params, weight_decay=0.1, **way)
    assert_close(mixed, run(grads, params, weight_decay=0.1, foreach=False))


@pytest.mark.parametrize("way", ["for-loop", "foreach", "capturable", "capturable foreach"], indirect=True)
def test_complex_parameters_count_as_two_real_ones(way: dict[str, bool]) -> None:
    xs = [torch.view_as_complex(x) for x in tensors((3, 2), (4, 5, 2))]
    grads = [[torch.view_as_complex(g).conj() for g in tensors((3, 2), (4, 5, 2), seed=s)] for s in range(1, 4)]
    whole = run(grads, xs, weight_decay=0.1, **way)
    parts = run(
        [[torch.view_as_real(g.resolve_conj()) for g in step] for step in grads],
        [torch.view_as_real(x) for x in xs],
        weight_decay=0.1,
        **way,
    )
    for a, b in zip(whole, parts, strict=True):
        assert torch.equal(torch.view_as_real(a) if a.is_complex() else a, b)


def test_temporaries_are_bounded() -> None:
    """Count what the allocator holds at any time, for a model much larger than a tile."""
    from torch.profiler import ProfilerActivity, profile

    for foreach, shapes in itertools.product((False, True), ([(2**22,)], [(1000,)] * 3000, [(2**11, 2**11)])):
        xs = [torch.zeros(s, requires_grad=True) for s in shapes]
        optimizer = ACProp(xs, clip_exponent=0.25, weight_decay=0.1, foreach=foreach)
        for x in xs:
            x.grad = torch.zeros_like(x)
        optimizer.step()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            optimizer.step()
        held = peak = 0
        for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
            if event.name() == "[memory]":
                held += event.nbytes()
                peak = max(peak, held)
        assert 0 < peak < 4 * 2**20, (foreach, shapes[0], peak)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"fused": True, "differentiable": True}, "`fused` does not support `differentiable`"),
        ({"fused": True, "foreach": True}, "`fused` and `foreach` cannot be `True` together"),
    ],
)
def test_ways_that_exclude_each_other(flags: dict[str, bool], message: str) -> None:
    for optimizer in (ACProp, torch.optim.AdamW):
        with pytest.raises(RuntimeError, match=message):
            optimizer(tensors((1,)), **flags)


@pytest.mark.parametrize("flags", [{}, {"foreach": True}])
def test_capturable_is_for_accelerators(flags: dict[str, bool]) -> None:
    (x,) = tensors((1,))
    x.grad = torch.ones_like(x)
    for optimizer in (ACProp([x], capturable=True, **flags), torch.optim.AdamW([x], capturable=True, **flags)):
        before = x.clone()
        with pytest.raises(AssertionError, match="If capturable=True, params and state_steps must be on supported dev"):
            optimizer.step()
        assert torch.equal(x, before)


def test_fused_refuses_what_adamws_fused_refuses() -> None:
    for x in (torch.ones(2, dtype=torch.complex64), torch.ones(2, device="meta")):
        for optimizer in (ACProp, torch.optim.AdamW):
            x.grad = torch.ones_like(x)
            with pytest.raises(RuntimeError, match="`fused=True` requires all the params to be floating point Tensors"):
                optimizer([x], fused=True).step()


def test_lists_do_not_follow_derivatives() -> None:
    x = torch.ones(2)
    x.grad = torch.ones(2)
    for optimizer in (ACProp, torch.optim.AdamW):
        with pytest.raises(AssertionError, match="_foreach ops don't support autograd"):
            optimizer([x], foreach=True, differentiable=True).step()


@pytest.mark.parametrize("way", ["for-loop", "foreach", "fused", "fused by inductor"], indirect=True)
def test_lazy_gradients(way: dict[str, bool]) -> None:
    """A gradient that is a lazy negation, or torch's zero without memory, is what it says, not what its memory says."""
    (start,) = tensors((3,))
    for lazy, plain in (
        (torch._neg_view(torch.ones(3, dtype=torch.float64)), -torch.ones(3, dtype=torch.float64)),
        (torch._efficientzerotensor(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)),
    ):
        for results in zip(run([[lazy]] * 2, [start], **way), run([[plain]] * 2, [start], **way), strict=True):
            assert torch.equal(*results)


@pytest.mark.parametrize("way", ["for-loop", "foreach", "fused"], indirect=True)
def test_a_conjugate_parameter_is_refused(way: dict[str, bool]) -> None:
    """As by AdamW: its memory is not its value, so that a step in place would be lost."""
    x = torch.ones(2, dtype=torch.complex64).conj().requires_grad_()
    x.grad = torch.ones(2, dtype=torch.complex64)
    for optimizer in (ACProp, torch.optim.AdamW):
        with pytest.raises(RuntimeError, match="unresolved conjugated|must be floating|requires all the params"):
            optimizer([x], **way).step()


@pytest.mark.parametrize("way", ["for-loop", "foreach", "fused"], indirect=True)
def test_wrapper_subclasses(way: dict[str, bool]) -> None:
    """Tensors that stand for others have no memory of their own."""
    from torch.testing._internal.two_tensor import TwoTensor

    xs = [torch.ones(3), torch.ones(3)]
    x = TwoTensor(*xs).requires_grad_()
    x.grad = TwoTensor(torch.ones(3), -torch.ones(3))
    ACProp([x], lr=0.5, **way).step()
    assert x.a.tolist() == [0.5] * 3
    assert x.b.tolist() == [1.5] * 3


@pytest.mark.parametrize("way", ["for-loop", "foreach", "fused", "fused by inductor"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_default_device_does_not_matter(way: dict[str, bool], dtype: torch.dtype) -> None:
    x = torch.ones(3, dtype=dtype, requires_grad=True)
    x.grad = torch.ones(3, dtype=dtype)
    optimizer = ACProp([x], lr=0.5, **way)
    with torch.device("meta"):
        optimizer.step()
    assert x.tolist() == [0.5] * 3
    assert optimizer.state[x]["step"].item() == 1


def test_a_program_for_a_cpu_sees_a_cpu_as_the_default_device(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def compile(function: Any, **options: Any) -> Any:
        def run(*args: Any) -> None:
            seen.append(torch.empty(0).device.type)
            function(*args)

        return run

    forget_compiled_torch_step()
    monkeypatch.setattr(torch, "compile", compile)
    x = torch.ones(3, requires_grad=True)
    optimizer = ACProp([x], fused=True)
    with without_numba():
        for device in ("meta", "cpu", "meta"):
            x.grad = torch.ones(3)
            with torch.device(device):
                optimizer.step()
    forget_compiled_torch_step()
    assert seen == ["cpu"] * 4  # the first is the call that compiles


@pytest.mark.parametrize("way", ["for-loop", "foreach", "fused", "fused by inductor"], indirect=True)
def test_moments_of_another_size_are_refused(way: dict[str, bool]) -> None:
    x = torch.ones(64, requires_grad=True)
    x.grad = torch.ones(64)
    optimizer = ACProp([x], **way)
    optimizer.step()
    optimizer.state[x]["exp_avg"] = torch.zeros(8)
    with pytest.raises(RuntimeError, match="shape|size"):
        optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    del optimizer.state[x]
    with pytest.raises(ValueError, match=r"exp_avg of parameter 0 has shape \(8,\), the parameter \(64,\); load"):
        optimizer.load_state_dict(saved)
    assert x not in optimizer.state


def other_gradient(x: torch.Tensor, optimizer: ACProp) -> None:
    x.grad = x.grad.clone()


def other_memory(x: torch.Tensor, optimizer: ACProp) -> None:
    x.data = x.data.clone()


def other_order(x: torch.Tensor, optimizer: ACProp) -> None:
    """Keep the address, and change what lies there."""
    x.data = x.data.t()
    x.grad = x.grad.clone().t()


def fewer(x: torch.Tensor, optimizer: ACProp) -> None:
    x.data, x.grad = x.data[:2], x.grad[:2].clone()
    for key in ("exp_avg", "exp_avg_var"):
        optimizer.state[x][key] = optimizer.state[x][key][:2]


def other_dtype(x: torch.Tensor, optimizer: ACProp) -> None:
    grad, x.grad = x.grad.float(), None
    x.data = x.data.float()
    x.grad = grad


def other_moments(x: torch.Tensor, optimizer: ACProp) -> None:
    optimizer.state[x]["exp_avg"] = optimizer.state[x]["exp_avg"] * 0.5


def moments_changed_behind(x: torch.Tensor, optimizer: ACProp) -> None:
    optimizer.state[x]["exp_avg_var"].data = 2 * optimizer.state[x]["exp_avg_var"]


def no_state(x: torch.Tensor, optimizer: ACProp) -> None:
    optimizer.state.clear()


def loaded(x: torch.Tensor, optimizer: ACProp) -> None:
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def another_parameter(x: torch.Tensor, optimizer: ACProp) -> None:
    """A new object in the same memory."""
    group = optimizer.param_groups[0]
    group["params"][0] = torch.nn.Parameter(x.data)
    group["params"][0].grad = x.grad
    optimizer.state[group["params"][0]] = optimizer.state.pop(x)


def swapped(x: torch.Tensor, optimizer: ACProp) -> None:
    other = torch.full_like(x, 2.0).requires_grad_()
    other.grad = torch.ones_like(x)
    torch.utils.swap_tensors(x, other)


def swapped_moments(x: torch.Tensor, optimizer: ACProp) -> None:
    state = optimizer.state[x]
    torch.utils.swap_tensors(state["exp_avg"], state["exp_avg_var"])


def exchanged_parameters(x: torch.Tensor, optimizer: ACProp) -> None:
    optimizer.param_groups[0]["params"].reverse()


def another_gradient_dtype(x: torch.Tensor, optimizer: ACProp) -> None:
    if not hasattr(x, "grad_dtype"):
        pytest.skip("this torch refuses a gradient of another dtype itself")
    grad, x.grad = x.grad.float(), None
    x.grad_dtype = None
    x.grad = grad


def fewer_parameters(x: torch.Tensor, optimizer: ACProp) -> None:
    optimizer.param_groups[0]["params"].pop()


def frozen(x: torch.Tensor, optimizer: ACProp) -> None:
    x.grad = None


CHANGES = (other_gradient, other_memory, other_order, fewer, other_dtype, other_moments, moments_changed_behind)
CHANGES += (another_parameter, swapped, swapped_moments, exchanged_parameters, another_gradient_dtype)
CHANGES += (fewer_parameters, frozen, no_state, loaded)


def narrowed_in_place(x: torch.Tensor) -> torch.Tensor:
    """Return float32 numbers in the memory of float64 ones."""
    narrow = x.view(-1).view(torch.float32)[: x.numel()]
    return narrow.copy_(x.float().view(-1)).view(x.shape)


# What may become of a (3, 3) float64 tensor that stays the same object, most of it at the same address.
IN_PLACE: dict[str, Callable[[torch.Tensor], Any]] = {
    "t_": lambda x: x.t_(),
    "transpose_": lambda x: x.transpose_(0, 1),
    "unsqueeze_": lambda x: x.unsqueeze_(0),
    "resize_ to fewer": lambda x: x.resize_(2, 3),
    "resize_ to more": lambda x: x.resize_(4, 4).fill_(0.5),
    "resize_ to another shape": lambda x: x.resize_(9, 1),
    "as_strided_ transposed": lambda x: x.as_strided_((3, 3), (1, 3)),
    "as_strided_ expanded": lambda x: x.as_strided_((3, 3), (0, 1)),
    "as_strided_ to fewer": lambda x: x.as_strided_((2, 3), (3, 1)),
    "set_ to other memory": lambda x: x.set_(torch.full((3, 3), 0.5, dtype=x.dtype)),
    "set_ to a part": lambda x: x.set_(x.untyped_storage(), 0, (2, 3), (3, 1)),
    "set_ transposed": lambda x: x.set_(x.untyped_storage(), 0, (3, 3), (1, 3)),
    "set_ to nothing": lambda x: x.set_(),
    "data transposed": lambda x: setattr(x, "data", x.data.t()),
    "data of fewer": lambda x: setattr(x, "data", x.data[:2]),
    "data of another shape": lambda x: setattr(x, "data", x.data.view(9)),
    "data of a part in the same shape": lambda x: setattr(x, "data", torch.zeros(30, dtype=x.dtype)[3:12].view(3, 3)),
    "data expanded": lambda x: setattr(x, "data", x.data[:1].expand(3, 3)),
    "data in columns": lambda x: setattr(x, "data", torch.stack([x.data, x.data], dim=2)[..., 1]),
    "data of another dtype": lambda x: setattr(x, "data", x.data.float()),
    "another dtype at the same address": lambda x: setattr(x, "data", narrowed_in_place(x.data)),
    "data negated lazily": lambda x: setattr(x, "data", torch._neg_view(x.data)),
    "data of zeros without memory": lambda x: setattr(x, "data", torch._efficientzerotensor(3, 3, dtype=x.dtype)),
    "data twice elsewhere": lambda x: [setattr(x, "data", x.data.clone()) for _ in range(2)],
    "values": lambda x: x.mul_(0.5),
}


def continued(change: Callable[..., Any], flags: dict[str, bool], forgetful: bool) -> Any:
    """Return everything after three steps, a change and two steps, or the type of an exception.

    A forgetful optimizer has been made after the change.
    """
    xs = [x.requires_grad_() for x in tensors((3, 3), (4,))]
    optimizer = ACProp(xs, **OPTIONS, **flags)
    for g in tensors((3, 3), (3, 3), (3, 3), seed=1):
        xs[0].grad, xs[1].grad = g, torch.ones(4, dtype=torch.float64)
        optimizer.step()
    with torch.no_grad():
        change(xs[0], optimizer)
    xs = optimizer.param_groups[0]["params"]
    if forgetful:
        again = ACProp(xs, **OPTIONS, **flags)
        again.state = optimizer.state
        optimizer = again
    optimizer.param_groups[0].update(foreach=flags.get("foreach"), fused=flags.get("fused"))

    try:
        for _ in range(2):
            optimizer.step()
    except (RuntimeError, TypeError) as error:
        return type(error)
    return [x.detach() for x in xs] + [s for x in xs for s in optimizer.state.get(x, {}).values()]


def check_that_it_is_seen(change: Callable[..., Any]) -> None:
    """Assert that a fused step does what it does if the optimizer is new, and what a loop does."""
    fused, anew = (continued(change, {"fused": True}, forgetful) for forgetful in (False, True))
    if isinstance(fused, type) or isinstance(anew, type):
        assert fused is anew
        return
    torch.testing.assert_close(fused, anew, rtol=0, atol=0, equal_nan=True)
    loop = continued(change, {"foreach": False}, forgetful=True)
    if not isinstance(loop, type):  # there fused steps may take more
        for x, y in zip(fused, loop, strict=True):
            assert x.dtype == y.dtype
            torch.testing.assert_close(x, y, rtol=16 * torch.finfo(y.dtype).eps, atol=0, equal_nan=True)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_fused_step_sees_what_has_changed_since_the_last(change: Any) -> None:
    """It does not ask again what it knows of tensors that are the same."""
    check_that_it_is_seen(change)


@pytest.mark.parametrize("key", ["param", "grad", "exp_avg", "exp_avg_var"])
@pytest.mark.parametrize("name", IN_PLACE)
def test_a_fused_step_sees_what_has_become_of_the_same_object(name: str, key: str) -> None:
    def change(x: torch.Tensor, optimizer: ACProp) -> None:
        x.requires_grad_(False)  # or torch refuses some of it
        IN_PLACE[name]({"param": x, "grad": x.grad, **optimizer.state[x]}[key])
        x.requires_grad_(True)

    check_that_it_is_seen(change)


@ways
def test_parameters_may_be_swapped_after_a_step(way: dict[str, bool]) -> None:
    """As torch.nn.Module.to and load_state_dict do if asked; torch refuses it if there is a weak reference."""
    x, y = (t.requires_grad_() for t in tensors((3,), (3,)))
    x.grad = torch.ones_like(x)
    optimizer = ACProp([x], **OPTIONS, **way)
    optimizer.step()
    torch.utils.swap_tensors(x, y)
    torch.utils.swap_tensors(optimizer.state[x]["exp_avg"], torch.zeros_like(x))


@ways
def test_removed_parameters_are_not_kept_alive(way: dict[str, bool]) -> None:
    (stays,) = tensors((3,))
    optimizer = ACProp([stays.requires_grad_()], **OPTIONS, **way)
    stays.grad = torch.ones_like(stays)
    gone = []
    for i in range(20):
        x = torch.ones(4 + i % 3, dtype=torch.float64, requires_grad=True)
        x.grad = torch.ones_like(x)
        optimizer.add_param_group({"params": [x]})
        optimizer.step()
        gone += map(weakref.ref, (x, *optimizer.state[x].values()))
        optimizer.param_groups.pop()
        del optimizer.state[x], x
    gc.collect()
    assert [reference() for reference in gone] == [None] * 80


BAD_STEPS: dict[str, tuple[Any, type[Exception], str]] = {
    "an int": (2, TypeError, "is 2, not a floating-point tensor of one number"),
    "a float": (2.0, TypeError, "is 2.0, not a floating-point tensor of one number"),
    "None": (None, TypeError, "is None, not a floating-point tensor of one number"),
    "an integer tensor": (torch.tensor(2), TypeError, "is tensor(2), not a floating-point tensor of one number"),
    "a bool tensor": (torch.tensor(True), TypeError, "is tensor(True), not a floating-point tensor of one number"),
    "a complex tensor": (torch.tensor(2j), TypeError, "not a floating-point tensor of one number"),
    "two elements": (torch.tensor([2.0, 2.0]), TypeError, "not a floating-point tensor of one number"),
    "no element": (torch.tensor([]), TypeError, "not a floating-point tensor of one number"),
    "NaN": (torch.tensor(math.nan), ValueError, "is tensor(nan), not a whole number that is at least 0"),
    "infinity": (torch.tensor(math.inf), ValueError, "is tensor(inf), not a whole number that is at least 0"),
    "a half": (torch.tensor(1.5), ValueError, "is tensor(1.5000), not a whole number that is at least 0"),
    "negative": (torch.tensor(-1.0), ValueError, "is tensor(-1.), not a whole number that is at least 0"),
}


def two_groups(names: tuple[str, ...], **options: Any) -> tuple[ACProp, list[torch.Tensor]]:
    """Return an optimizer that has taken two steps: a parameter in its first group, two in its second."""
    xs = [x.requires_grad_() for x in tensors((3,), (2, 2), (4,))]
    params: list[Any] = named(zip(names, xs, strict=True)) if names else xs
    optimizer = ACProp([{"params": params[:1]}, {"params": params[1:]}], **OPTIONS, weight_decay=0.1, **options)
    for x in xs:
        x.grad = torch.ones_like(x)
    for _ in range(2):
        optimizer.step()
    return optimizer, xs


def assert_refused(optimizer: ACProp, xs: list[torch.Tensor], error: type[Exception], *words: str) -> None:
    """Assert that a step raises this, and that parameters, moments and counts have the bits that they had."""

    def everything() -> dict[str, Any]:
        kept = {f"{key} {i}": value for i, x in enumerate(xs) for key, value in optimizer.state[x].items()}
        return copy.deepcopy(kept | {f"param {i}": x.detach() for i, x in enumerate(xs)})

    before = everything()
    with pytest.raises(error) as raised:
        optimizer.step()
    for word in words:
        assert word in str(raised.value)
    after = everything()
    assert after.keys() == before.keys()
    for name, x in before.items():
        if name != "step 2":  # the one that is bad
            assert torch.equal(after[name], x), name


@pytest.mark.parametrize("name", BAD_STEPS)
@pytest.mark.parametrize("names", [(), ("a", "b", "c")])
@ways
def test_a_bad_step_count_is_refused_before_any_group_has_stepped(
    way: dict[str, bool], name: str, names: tuple[str, ...]
) -> None:
    bad, error, words = BAD_STEPS[name]
    optimizer, xs = two_groups(names, **way)
    optimizer.state[xs[2]]["step"] = bad
    who = called("c", 1) if names else "parameter 1 of its group"
    assert_refused(optimizer, xs, error, f"the step count in the state of {who} ", words)


@pytest.mark.parametrize("bad", [2, None, torch.tensor(math.nan)], ids=str)
def test_a_bad_step_count_is_refused_in_differentiable_mode_too(bad: Any) -> None:
    x, y = tensors((3,), (3,))
    groups = [{"params": named([pair])} for pair in (("x", x), ("y", y))]
    optimizer = ACProp(groups, **OPTIONS, differentiable=True)
    x.grad, y.grad = tensors((3,), (3,))
    optimizer.step()
    optimizer.state[y]["step"] = bad
    before = x.clone()
    with pytest.raises((TypeError, ValueError), match=f"the step count in the state of {called('y', 0)} is"):
        optimizer.step()
    assert torch.equal(x, before)


@ways
@pytest.mark.parametrize("shape", [(1,), (1, 1)])
def test_a_step_count_may_have_axes(way: dict[str, bool], shape: tuple[int, ...]) -> None:
    results = []
    for axes in ((), shape):
        xs = [x.requires_grad_() for x in tensors((), (2,))]
        optimizer = ACProp(xs, **OPTIONS, **way)
        for t in range(3):
            for x in xs:
                x.grad = torch.ones_like(x)
            optimizer.step()
            if t == 0:
                optimizer.state[xs[0]]["step"] = optimizer.state[xs[0]]["step"].reshape(axes)
        results.append([x.detach() for x in xs] + [optimizer.state[x]["step"].reshape(()) for x in xs])
    for x, y in zip(*results, strict=True):
        assert torch.equal(x, y)


@ways
def test_capturable_where_no_graph_is_captured_is_refused_before_any_group_has_stepped(way: dict[str, bool]) -> None:
    optimizer, xs = two_groups(("a", "b", "c"), **way)
    optimizer.param_groups[1].update(capturable=True, foreach=False, fused=False)
    optimizer.state[xs[2]]["step"] = optimizer.state[xs[2]]["step"].to("meta")
    words = "If capturable=True, params and state_steps must be on supported devices: ['cpu']. "
    assert_refused(optimizer, xs, AssertionError, words, f"{called('c', 1)} is on cpu, its step count on meta")


@pytest.mark.parametrize("flags", [{"foreach": False}, {"foreach": True}, {"fused": True}], ids=str)
@pytest.mark.parametrize("foreach", [False, True])
def test_capturable_on_a_cpu_is_refused_before_any_group_has_stepped(flags: dict[str, bool], foreach: bool) -> None:
    optimizer, xs = two_groups(("a", "b", "c"), **flags)
    optimizer.param_groups[1].update(capturable=True, foreach=foreach, fused=False)
    words = "If capturable=True, params and state_steps must be on supported devices: "
    assert_refused(optimizer, xs, AssertionError, words, f"{called('b', 0)} is on cpu, its step count on cpu")


@pytest.mark.parametrize("name", ["grad_scale", "found_inf"])
@pytest.mark.parametrize("first", [name for name in WAYS if "fused" in name])
@ways
def test_scales_for_a_step_that_is_not_fused_are_refused_before_any_group_has_stepped(
    way: dict[str, bool], first: str, name: str
) -> None:
    if way.get("fused"):
        pytest.skip("it takes them")
    with without_numba() if "inductor" in first else contextlib.nullcontext():
        optimizer, xs = two_groups((), **way)
        optimizer.param_groups[0].update({"foreach": False, "capturable": False, **WAYS[first]})
        optimizer.step()
        setattr(optimizer, name, torch.tensor(1.0))
        assert_refused(optimizer, xs, AssertionError, "Expected grad_scale and found_inf to be None")


@ways
def test_lists_with_derivatives_are_refused_before_any_group_has_stepped(way: dict[str, bool]) -> None:
    optimizer, xs = two_groups((), **way)
    optimizer.param_groups[1].update(foreach=True, differentiable=True, fused=False)
    assert_refused(optimizer, xs, AssertionError, "_foreach ops don't support autograd")


@pytest.mark.parametrize("found", [0.0, 1.0, 2.0])  # the scaler adds up what it found on several devices
@pytest.mark.parametrize("shape", [(), (1,)])
def test_the_step_for_accelerators(found: float, shape: tuple[int, ...]) -> None:
    """What runs where nothing may be read, run on a CPU."""
    grads = stream(3)
    xs = [x.requires_grad_() for x in tensors(*SHAPES)]
    optimizer = ACProp(xs, **OPTIONS, fused=True)
    optimizer.grad_scale, optimizer.found_inf = torch.full(shape, 1024.0), torch.full(shape, found)
    with fused_as_on_an_accelerator():
        for step in grads:
            for x, g in zip(xs, step, strict=True):
                x.grad = 1024 * g
            optimizer.step()
    expected = run(grads, foreach=False) if not found else [*tensors(*SHAPES)]
    assert_close([x.detach() for x in xs], expected[: len(SHAPES)])
    states = [optimizer.state[x] for x in xs]
    assert [int(state["step"]) for state in states] == [0 if found else 3] * len(SHAPES)
    assert all(bool(found) == (not state["exp_avg"].any()) for state in states if state["exp_avg"].numel())


def test_without_numba_the_fused_step_is_compiled_by_torch() -> None:
    grads = stream(2)
    with numba_not_found():
        compiled = run(grads, fused=True)
    assert_close(compiled, run(grads, foreach=False))


def test_lists_of_an_accelerator() -> None:
    """The rule on lists with numbers that have been read, the default on a GPU, run on a CPU."""
    grads = stream(3)
    expected = run(grads, weight_decay=0.1, decoupled_weight_decay=False, foreach=False)
    with lists_on_a_cpu():
        on_lists = run(grads, weight_decay=0.1, decoupled_weight_decay=False, foreach=True)
    assert_close(on_lists, expected)


def test_options_survive_deepcopy() -> None:
    optimizer = ACProp(tensors((1,)), lr=torch.tensor(0.5), maximize=True, clip_exponent=0.25, fused=True)
    again = copy.deepcopy(optimizer)
    assert again.defaults == optimizer.defaults
    assert again._step_supports_amp_scaling
    assert {k for k in again.__dict__ if k[0] != "_"} == {k for k in optimizer.__dict__ if k[0] != "_"}


FLAGS = [{"foreach": False}, {"foreach": True}, {"fused": True}]


@pytest.mark.parametrize("flags", FLAGS, ids=str)
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_dtypes_may_be_mixed_when_some_are_compensated(flags: dict[str, bool], order: tuple[int, ...]) -> None:
    """Matrices of 16 bits between norms of 32, say."""
    dtypes = (torch.bfloat16, torch.float32, torch.float16)

    def trained(chosen: tuple[int, ...]) -> dict[int, torch.Tensor]:
        params = {i: torch.ones(5, dtype=dtypes[i], requires_grad=True) for i in chosen}
        optimizer = ACProp(list(params.values()), lr=0.01, compensate=True, **flags)
        for _ in range(3):
            for i, p in params.items():
                p.grad = torch.full((5,), 0.1 * (i + 1), dtype=dtypes[i])
            optimizer.step()
        return params

    together = trained(order)
    for i in order:
        assert torch.equal(together[i], trained((i,))[i])


@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_parameters_that_share_memory_get_both_updates(flags: dict[str, bool]) -> None:
    memory = torch.zeros(4)
    params = [torch.nn.Parameter(memory), torch.nn.Parameter(memory)]
    for p in params:
        p.grad = torch.ones(4)
    ACProp(params, lr=0.5, **flags).step()
    assert torch.equal(memory, torch.full((4,), -1.0))


@pytest.mark.parametrize("key", ["param", "exp_avg", "exp_avg_var"])
def test_a_fused_step_sees_that_a_tensor_was_transposed_where_it_lies(key: str) -> None:
    def trained(fused: bool) -> torch.Tensor:
        p = torch.arange(16.0).reshape(4, 4).clone().requires_grad_()
        optimizer = ACProp([p], lr=0.1, fused=fused, foreach=False)
        for i in range(3):
            p.grad = torch.linspace(-1.0, 1.0 + i, 16).reshape(4, 4)
            optimizer.step()
            if i == 1:
                x = p if key == "param" else optimizer.state[p][key]
                x.data = x.data.t()
        return p.detach()

    torch.testing.assert_close(trained(True), trained(False), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_an_expanded_parameter_is_refused_before_anything_changes(flags: dict[str, bool]) -> None:
    params = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(1, 3).expand(2, 3))]
    for p in params:
        p.grad = torch.ones(p.shape)
    optimizer = ACProp(params, lr=0.5, **flags)
    with pytest.raises(RuntimeError, match="parameter 1 of its group is expanded"):
        optimizer.step()
    assert torch.equal(params[0].detach(), torch.ones(3))
    assert all(state["step"] == 0 for state in optimizer.state.values() if state)


def test_an_interrupt_of_the_compiler_counts_no_step() -> None:
    pytest.importorskip("numba")
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    optimizer = ACProp([p], lr=0.5, fused=True)

    with interrupted_kernel(), pytest.raises(KeyboardInterrupt):
        optimizer.step()
    assert optimizer.state[p]["step"] == 0
    optimizer.step()
    assert torch.equal(p.detach(), torch.full((3,), 0.5))
