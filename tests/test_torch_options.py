"""The torch adapter's options: they mean what AdamW's do, in every way to step, and are refused in AdamW's words."""

import pytest

pytest.importorskip("torch")

import contextlib
import copy
import itertools
from collections.abc import Iterator
from typing import Any

import torch

from acprop_torch import ACProp
from hosts import (
    capturable_on_cpu,
    fused_as_on_an_accelerator,
    interrupted_kernel,
    lists_on_a_cpu,
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


CHANGES = (other_gradient, other_memory, other_order, fewer, other_dtype, other_moments, moments_changed_behind)


@pytest.mark.parametrize("change", [*CHANGES, no_state, loaded], ids=lambda change: change.__name__)
def test_a_fused_step_sees_what_has_changed_since_the_last(change: Any) -> None:
    """It does not ask again what it knows of tensors that are the same."""
    results = []
    for flags in ({"fused": True}, {"foreach": False}):
        xs = [x.requires_grad_() for x in tensors((3, 3), (4,))]
        optimizer = ACProp(xs, **OPTIONS, **flags)
        for g in tensors((3, 3), (3, 3), (3, 3), seed=1):
            xs[0].grad, xs[1].grad = g, torch.ones(4, dtype=torch.float64)
            optimizer.step()
        change(xs[0], optimizer)
        optimizer.param_groups[0].update(foreach=flags.get("foreach"), fused=flags.get("fused"))
        for _ in range(2):
            optimizer.step()
        results.append([x.detach() for x in xs] + [s for x in xs for s in optimizer.state[x].values()])
    assert_close(*results)


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
