"""What a compiled step keeps for the next one: that it is used, and that it never steps what has changed since.

`test_torch_options.py` has the changes of one tensor. Here are those of options, groups, states and memory.
"""

import copy
import gc
import multiprocessing
import pickle
import tracemalloc
import weakref
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("numba")

from acprop_core.kernels import cpu, element, helpers, openmp
from acprop_torch import ACProp
from hosts import torch_threads

SIZES = ((3,), (5, 2), (70,))


def begun(**options: Any) -> ACProp:
    """Return an optimizer of two groups that has kept its third step."""
    generator = torch.Generator().manual_seed(0)
    xs = [torch.randn(size, generator=generator, requires_grad=True) for size in SIZES]
    groups = [{"params": xs[:2]}, {"params": xs[2:], "weight_decay": 0.1}]
    optimizer = ACProp(groups, **{"lr": 0.1, "clip_exponent": 0.25, **options})
    for i in range(3):
        for x in xs:
            x.grad = torch.randn(x.shape, generator=generator) * (i + 1)
        optimizer.step()
    assert optimizer._kept is not None
    return optimizer


def everything(optimizer: ACProp) -> list[Any]:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    kept = [x for p in params for x in (p, *optimizer.state.get(p, {}).values())]
    return [x.detach().clone() for x in kept if isinstance(x, torch.Tensor)]


def same(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(
        x.dtype == y.dtype and x.numpy().tobytes() == y.numpy().tobytes() for x, y in zip(a, b, strict=True)
    )


def group(change: Callable[[dict[str, Any]], object], i: int = 1) -> Callable[[ACProp], object]:
    return lambda optimizer: change(optimizer.param_groups[i])


def first(optimizer: ACProp) -> Any:
    return optimizer.param_groups[0]["params"][0]


def state(change: Callable[[dict[str, Any]], object]) -> Callable[[ACProp], object]:
    return lambda optimizer: change(optimizer.state[first(optimizer)])


def option(**values: Any) -> Callable[[ACProp], object]:
    return lambda optimizer: optimizer.param_groups[1].update(values)


def moved(optimizer: ACProp) -> None:
    optimizer.param_groups[1]["params"].append(optimizer.param_groups[0]["params"].pop())


def moved_in_order(optimizer: ACProp) -> None:
    """Move a parameter so that the order of all of them stays."""
    optimizer.param_groups[1]["params"].insert(0, optimizer.param_groups[0]["params"].pop())


def exchanged(optimizer: ACProp) -> None:
    """Exchange parameters of one shape between groups."""
    a, b = (group["params"] for group in optimizer.param_groups)
    a[0], b[0] = b[0], a[0]


def added(optimizer: ACProp) -> None:
    x = torch.ones(4, requires_grad=True)
    x.grad = torch.ones(4)
    optimizer.add_param_group({"params": [x], "lr": 0.5})


def reused(optimizer: ACProp) -> None:
    """Free a gradient, so that another is likely to get its address."""
    x = first(optimizer)
    x.grad = None
    x.grad = torch.full(x.shape, 3.0)


def sparse(optimizer: ACProp) -> None:
    x = first(optimizer)
    x.grad = torch.ones(x.shape).to_sparse()


def small_storage(size: int) -> Callable[[Any], object]:
    return lambda x: x.untyped_storage().resize_(size)


def gradient(value: Callable[[Any], Any]) -> Callable[[ACProp], object]:
    def change(optimizer: ACProp) -> None:
        x = first(optimizer)
        x.grad = value(x)

    return change


def loaded(optimizer: ACProp) -> None:
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["exp_avg"] *= 2
    optimizer.load_state_dict(saved)


CHANGES: dict[str, Callable[[ACProp], object]] = {
    "nothing": lambda optimizer: None,
    "a rate": option(lr=0.3),
    "a negative rate": option(lr=-0.3),
    "a rate that is not a number": option(lr=float("nan")),
    "a rate of a wrong type": option(lr="0.1"),
    "a rate that is a tensor": option(lr=torch.tensor(0.3)),
    "rates in a list": option(betas=[0.5, 0.9]),
    "a first rate below 1/2": option(betas=(0.2, 0.999)),
    "a second rate below 1/2": option(betas=(0.9, 0.2)),
    "a rate of 1": option(betas=(0.9, 1.0)),
    "three rates": option(betas=(0.9, 0.99, 0.999)),
    "no decay": option(weight_decay=0.0),
    "decay where there was none": group(lambda x: x.update(weight_decay=0.2), 0),
    "eps": option(eps=1e-3, eps_root=1e-3),
    "a negative eps": option(eps=-1e-3),
    "another clip": option(clip_exponent=0.1),
    "no clip": option(clip_exponent=None),
    "a clip that is a bool": option(clip_exponent=True),
    "centering": option(centering="none"),
    "a centering that does not exist": option(centering="past"),
    "synchronous": option(asynchronous=False),
    "maximize": option(maximize=True),
    "L2": option(decoupled_weight_decay=False),
    "tiles": option(foreach=False, fused=False),
    "fused and foreach": option(foreach=True, fused=True),
    "capturable": option(capturable=True),
    "differentiable": option(differentiable=True, fused=None),
    "another dtype of moments": option(moment_dtype=torch.float64),
    "no option": group(lambda x: x.pop("maximize")),
    "no group": lambda optimizer: optimizer.param_groups.pop(),
    "groups exchanged": lambda optimizer: optimizer.param_groups.reverse(),
    "a group replaced": lambda x: x.param_groups.__setitem__(1, {**x.param_groups[1], "lr": 0.3}),
    "a group added": added,
    "a parameter moved to another group": moved,
    "a parameter moved in order": moved_in_order,
    "parameters exchanged": exchanged,
    "a count of 0": state(lambda x: x["step"].zero_()),
    "a count of a half": state(lambda x: x["step"].fill_(2.5)),
    "a negative count": state(lambda x: x["step"].fill_(-1.0)),
    "a count that is not a number": state(lambda x: x["step"].fill_(float("nan"))),
    "an infinite count": state(lambda x: x["step"].fill_(float("inf"))),
    "a huge count": state(lambda x: x["step"].fill_(1e30)),
    "a count in float64": state(lambda x: x.update(step=x["step"].double())),
    "a count in float16": state(lambda x: x.update(step=x["step"].half())),
    "a count with axes": state(lambda x: x.update(step=x["step"].view(1))),
    "a count that is an int": state(lambda x: x.update(step=3)),
    "a count that is widened in place": state(lambda x: setattr(x["step"], "data", x["step"].double())),
    "no count": state(lambda x: x.pop("step")),
    "no moment": state(lambda x: x.pop("exp_avg")),
    "a moment that is a list": state(lambda x: x.update(exp_avg=[0.0] * 3)),
    "a carry": state(lambda x: x.update(carry=torch.ones(3))),
    "a state that is empty": state(lambda x: x.clear()),
    "no state": lambda optimizer: optimizer.state.pop(first(optimizer)),
    "moments exchanged": state(lambda x: x.update(exp_avg=x["exp_avg_var"], exp_avg_var=x["exp_avg"])),
    "one moment for both": state(lambda x: x.update(exp_avg_var=x["exp_avg"])),
    "a state loaded": loaded,
    "no gradient": gradient(lambda x: None),
    "no gradient in a group": group(lambda x: setattr(x["params"][0], "grad", None)),
    "a gradient at a reused address": reused,
    "a sparse gradient": sparse,
    "a gradient that requires a gradient": gradient(lambda x: x.grad.clone().requires_grad_()),
    "an expanded gradient": gradient(lambda x: torch.ones(1).expand(3)),
    "a negated gradient": gradient(lambda x: torch._neg_view(x.grad)),
    "a gradient without memory": gradient(lambda x: torch._efficientzerotensor(3)),
    "a gradient that is the parameter": gradient(lambda x: x.detach()),
    "a gradient in the parameter's memory": gradient(lambda x: x.detach().flip(0).copy_(x.detach())),
    "a frozen parameter": lambda optimizer: first(optimizer).requires_grad_(False),
    "a subclass": gradient(lambda x: torch.nn.Parameter(x.grad)),
    "a scale": lambda optimizer: setattr(optimizer, "grad_scale", torch.tensor(2.0)),
    "an infinity": lambda optimizer: setattr(optimizer, "found_inf", torch.tensor(1.0)),
}


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("name", CHANGES)
def test_a_kept_step_does_what_a_new_one_does(name: str, fused: bool | None) -> None:
    results: list[list[Any]] = []
    errors = []
    for forgetful in (False, True):
        optimizer = begun(fused=fused)
        with torch.no_grad():
            CHANGES[name](optimizer)
        before = None
        try:
            for _ in range(3):
                if forgetful:
                    optimizer._kept = None
                before = before or everything(optimizer)
                optimizer.step()
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}")
            assert same(everything(optimizer), before or [])
        else:
            results.append(everything(optimizer))
    assert not errors or errors[0] == errors[1]
    assert not results or same(*results)


@pytest.mark.parametrize("whose", ["parameter", "gradient", "exp_avg", "exp_avg_var"])
@pytest.mark.parametrize("size", [0, 4])
def test_a_tensor_without_enough_memory_is_refused(whose: str, size: int) -> None:
    optimizer = begun()
    x = first(optimizer)
    tensor = {"parameter": x, "gradient": x.grad}.get(whose, optimizer.state[x].get(whose))
    others = everything(optimizer)[8:]
    storage = tensor.untyped_storage()
    storage.resize_(size)
    if size and whose == "gradient":
        optimizer._kept = None  # a kept step reads the address of a gradient, and not how much memory is there
    with pytest.raises(RuntimeError, match="because its storage was resized; resize it back before the step"):
        optimizer.step()
    storage.resize_(12)
    assert same(everything(optimizer)[8:], others)
    optimizer.step()


@pytest.mark.parametrize("offset", [4, 2**20])
def test_a_gradient_that_is_a_view_of_freed_memory_is_refused(offset: int) -> None:
    """Its address is then its offset, as in a buffer of all gradients."""
    buffer = torch.ones(offset + 3)
    x = torch.ones(3, requires_grad=True)
    x.grad = buffer[offset:]
    optimizer = ACProp([x], fused=True)
    optimizer.step()
    before = x.detach().clone()
    buffer.untyped_storage().resize_(0)
    assert x.grad.data_ptr() == 4 * offset
    with pytest.raises(RuntimeError, match="because its storage was resized; resize it back before the step"):
        optimizer.step()
    assert torch.equal(x, before)


def test_lists_that_change_in_place_are_seen() -> None:
    a, b = begun(), begun()
    betas = [0.5, 0.9]
    a.param_groups[0]["betas"] = betas
    a.step()
    betas[:] = 0.8, 0.95
    a.step()
    for new in ((0.5, 0.9), (0.8, 0.95)):
        b.param_groups[0]["betas"] = new
        b.step()
    assert same(everything(a), everything(b))


def test_tensors_that_change_in_place_are_seen() -> None:
    a, b = begun(), begun()
    rate = torch.tensor(0.5, dtype=torch.float64)
    a.param_groups[0]["lr"] = rate
    for new in (0.5, 0.25):
        rate.fill_(new)
        a.step()
        b.param_groups[0]["lr"] = new
        b.step()
    assert same(everything(a), everything(b))


def test_a_scale_holds_for_one_step() -> None:
    a, b = begun(fused=True), begun(fused=True)
    a.grad_scale = torch.tensor(2.0)
    a.step()
    del a.grad_scale
    for group in b.param_groups:
        for x in group["params"]:
            x.grad /= 2
    b.step()
    for group in b.param_groups:
        for x in group["params"]:
            x.grad *= 2
    for optimizer in (a, b):
        optimizer.step()
    assert same(everything(a), everything(b))


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"compensate": True}])
def test_a_step_is_kept(options: dict[str, Any]) -> None:
    """Also while schedulers write rates, gradients are new tensors, and dtypes and counts are mixed."""
    xs = [torch.ones(4, dtype=dtype, requires_grad=True) for dtype in (torch.float32, torch.bfloat16, torch.float64)]
    late = torch.ones(4, requires_grad=True)
    optimizer = ACProp([{"params": xs}, {"params": [late]}], clip_exponent=0.25, **options)
    with mock.patch.object(ACProp, "_step_anew", autospec=True, side_effect=ACProp._step_anew) as anew:
        for i in range(10):
            optimizer.zero_grad()
            for x in xs if i < 3 else [*xs, late]:
                x.grad = torch.ones_like(x)
            for group in optimizer.param_groups:
                group["lr"] = np.float64(0.1 / (i + 1)) if i % 2 else 0.1 / (i + 1)  # as NumPy computes schedules
                group["betas"] = (0.9 - i / 100, 0.999)
            optimizer.step()
    assert anew.call_count == 2  # the first, and that of the late parameter
    assert [int(optimizer.state[x]["step"]) for x in (*xs, late)] == [10, 10, 10, 7]


def test_a_step_of_complex_parameters_is_kept() -> None:
    """Its rows are views as real numbers, made anew at each step; a gradient may be conjugated lazily."""

    def trained(forgetful: bool) -> tuple[int, Any]:
        x = torch.arange(4.0).mul(1 + 2j).requires_grad_()
        y = torch.ones(3, requires_grad=True)
        optimizer = ACProp([x, y], lr=0.1, clip_exponent=0.25)
        with mock.patch.object(ACProp, "_step_anew", autospec=True, side_effect=ACProp._step_anew) as anew:
            for i in range(6):
                x.grad, y.grad = (x.detach() * (1 + i) + 1j).conj(), torch.ones(3)
                optimizer._kept = None if forgetful else optimizer._kept
                optimizer.step()
        return anew.call_count, [torch.view_as_real(z) if z.is_complex() else z for z in everything(optimizer)]

    (kept, a), (anew, b) = trained(False), trained(True)
    assert (kept, anew) == (1, 6)
    assert same(a, b)


@pytest.mark.filterwarnings("ignore:DTensor random operators")  # torch 2.6, on a CPU
def test_a_step_of_sharded_parameters_is_kept() -> None:
    """Except where a gradient is placed otherwise, because all processes must then send it, in one order."""
    tensor = pytest.importorskip("torch.distributed.tensor")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        whole, shard = [tensor.Replicate()], [tensor.Shard(0)]
        x = torch.nn.Parameter(tensor.distribute_tensor(torch.ones(4), mesh, shard))
        optimizer = ACProp([x], lr=0.1, clip_exponent=0.25)
        twin = torch.ones(4, requires_grad=True)
        other = ACProp([twin], lr=0.1, clip_exponent=0.25)
        calls = []
        for placement in (shard, shard, shard, whole, whole):
            twin.grad = torch.arange(4.0)
            x.grad = tensor.distribute_tensor(twin.grad, mesh, placement)
            with mock.patch.object(optimizer, "_step_anew", wraps=optimizer._step_anew) as anew:
                optimizer.step()
            other.step()
            calls.append(anew.call_count)
        assert calls == [1, 0, 0, 1, 1]
        assert torch.equal(x.detach().to_local(), twin.detach())
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_a_copy_steps_its_own_memory(copied: Callable[[Any], Any]) -> None:
    optimizer = begun()
    twin = copied(optimizer)
    for group, other in zip(optimizer.param_groups, twin.param_groups, strict=True):
        for x, y in zip(group["params"], other["params"], strict=True):
            y.grad = x.grad
    before = everything(optimizer)
    twin.step()
    assert same(everything(optimizer), before)
    optimizer.step()
    assert same(everything(optimizer), everything(twin))


def test_what_is_kept_keeps_no_tensor_alive() -> None:
    optimizer = begun()
    (x,) = optimizer.param_groups.pop()["params"]
    references = list(map(weakref.ref, (x, x.grad, *optimizer.state.pop(x).values())))
    del x
    gc.collect()
    assert [reference() for reference in references] == [None] * 5


def test_memory_does_not_grow() -> None:
    optimizer = begun()

    def steps() -> int:
        for i in range(300):
            optimizer.param_groups[0]["lr"] = 0.1 / (i + 1)
            optimizer.step()
        ours = [tracemalloc.Filter(True, f"*acprop_{name}*") for name in ("core", "torch")]
        return sum(x.size for x in tracemalloc.take_snapshot().filter_traces(ours).statistics("filename"))

    tracemalloc.start()
    try:
        steps()
        assert abs(steps() - steps()) < 300  # bytes in 300 steps
    finally:
        tracemalloc.stop()


# Threads


@pytest.fixture(params=["openmp", "own"])
def threads_of(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Whose threads step: OpenMP's where torch has loaded it, or ours."""
    if request.param == "own":
        monkeypatch.setattr(openmp, "region", lambda: 0)
    elif not openmp.region():
        pytest.skip("this torch has another runtime than OpenMP of GNU or Intel")
    return request.param


@pytest.mark.parametrize("threads", [2, 3, 8])
@pytest.mark.parametrize("chunk", [1, 7, 40])
def test_bits_do_not_depend_on_the_number_of_threads(
    threads: int, chunk: int, threads_of: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = begun()
    torch_threads(monkeypatch, threads, least=chunk)
    together = begun()
    with mock.patch.object(helpers, "call_beside", wraps=helpers.call_beside) as call:
        for _ in range(50):
            together.step()
    assert call.called == (threads_of == "own")
    monkeypatch.undo()
    for _ in range(50):
        alone.step()
    assert same(everything(together), everything(alone))


def test_parameters_that_share_memory_are_stepped_by_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    def trained() -> Any:
        memory = torch.ones(200)
        xs = [memory[:120].requires_grad_(), memory[80:].requires_grad_()]
        optimizer = ACProp(xs, lr=0.1, clip_exponent=0.25)
        for x in xs:
            x.grad = torch.linspace(-1.0, 1.0, 120)
        for _ in range(20):
            optimizer.step()
        return memory

    alone = trained()
    torch_threads(monkeypatch, 4, least=2)
    with mock.patch.object(helpers, "call_beside") as call, mock.patch.object(cpu, "share_by_openmp") as share:
        assert trained().equal(alone)
    assert not call.called
    assert not share.called


def test_a_thread_that_is_late_does_nothing() -> None:
    record = cpu.shared(100, 10)
    kernel = cpu.kernel_of(cpu.rule.Flags(), "float32", "float32")
    table = torch.zeros((element.ROWS, 1), dtype=torch.int64).numpy()  # it would write to address 0
    table[element.SIZE] = 100
    kernel(table, torch.zeros((1, len(element.OPTIONS)), dtype=torch.float64).numpy(), record, False)


def steps_in_a_child(optimizer: ACProp, results: Any) -> None:
    for _ in range(5):
        optimizer.step()
    results.put([x.tolist() for x in everything(optimizer)])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # JAX warns of forks
def test_a_fork_steps_on(threads_of: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch_threads(monkeypatch, 3, least=2)
    optimizer = begun()  # its threads are running
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    child = context.Process(target=steps_in_a_child, args=(optimizer, results))
    child.start()
    found = results.get(timeout=60)
    child.join(60)
    for _ in range(5):
        optimizer.step()
    assert found == [x.tolist() for x in everything(optimizer)]
