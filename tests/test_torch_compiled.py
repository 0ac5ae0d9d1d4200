"""The torch adapter under torch.compile: one whole graph, no recompilation, and as many kernels as AdamW's step."""

import pytest

pytest.importorskip("torch")

import contextlib
import copy
import itertools
from collections.abc import Iterator
from typing import Any

import torch
import torch._dynamo
import torch._inductor.config
import torch._inductor.metrics
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from acprop_torch import ACProp, _rows
from hosts import forget_compiled_torch_step, torch_version, without_numba

OPTIONS = [
    {},
    {"foreach": True},
    {"fused": True},
    {"weight_decay": 0.1, "maximize": True},
    {"weight_decay": 0.1, "decoupled_weight_decay": False, "clip_exponent": 0.25},
    {"centering": "previous", "clip_exponent": 0.25, "moment_dtype": torch.float64},
    {"asynchronous": False, "centering": "none", "eps_root": 0.0, "weight_decay": 0.1},
    {"lr": torch.tensor(0.01)},
    {"lr": torch.tensor(0.01), "betas": (torch.tensor(0.9), torch.tensor(0.99))},
]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compiled(optimizer: torch.optim.Optimizer, backend: Any = "inductor") -> Any:
    """Compile the step itself, as torch's tests of compiled optimizers do: its two wrappers switch autograd off."""
    step = type(optimizer).step.__wrapped__.__wrapped__  # type: ignore[attr-defined]
    return torch.compile(lambda: step(optimizer), backend=backend, fullgraph=True)


def models(dtype: torch.dtype = torch.float32) -> tuple[torch.nn.Module, torch.nn.Module]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(10, 10), torch.nn.Linear(10, 10)).to(dtype)
    model(torch.ones(10, 10, dtype=dtype)).square().sum().backward()
    twin = copy.deepcopy(model)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        q.grad = p.grad.clone()
    return model, twin


def assert_same_run(eager: ACProp, compiled: ACProp) -> None:
    groups = zip(eager.param_groups, compiled.param_groups, strict=True)
    for p, q in ((p, q) for a, b in groups for p, q in zip(a["params"], b["params"], strict=True)):
        pairs = [(p, q), *((value, compiled.state[q][key]) for key, value in eager.state[p].items())]
        for x, y in pairs:
            # torch's eager sqrt on a CPU is not correctly rounded, and a traced step has its numbers in tensors
            atol = 4 * torch.finfo(x.dtype).eps * x.detach().abs().max().item()
            torch.testing.assert_close(x, y, rtol=0, atol=atol)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "default")
def test_a_compiled_step_is_one_graph_with_the_results_of_the_eager_one(options: dict[str, Any]) -> None:
    model, twin = models()
    own = copy.deepcopy(options)
    own["lr"] = options.get("lr", 0.01)
    eager, graphed = ACProp(model.parameters(), **copy.deepcopy(own)), ACProp(twin.parameters(), **own)
    if options.get("foreach"):
        eager.param_groups[0]["foreach"] = False
    backend = CompileCounterWithBackend("inductor")
    step = compiled(graphed, backend)
    with torch.no_grad():
        for _ in range(4):
            step()
            eager.step()
            if isinstance(own["lr"], torch.Tensor):  # what schedulers do
                for optimizer in (eager, graphed):
                    optimizer.param_groups[0]["lr"].mul_(0.5)
    assert backend.frame_count == 1
    assert_same_run(eager, graphed)


@pytest.mark.parametrize("options", [*OPTIONS[:2], *OPTIONS[3:5]], ids=lambda options: "-".join(options) or "default")
def test_a_compiled_step_has_two_kernels_per_parameter(options: dict[str, Any]) -> None:
    counts = []
    for cls in (ACProp, torch.optim.AdamW):
        torch._dynamo.reset()
        torch._inductor.metrics.reset()
        names = ("foreach", "maximize", "weight_decay")
        own = options if cls is ACProp else {name: options[name] for name in names if name in options}
        step = compiled(cls(models()[0].parameters(), **own))
        small = "score_fusion_memory_threshold"  # torch 2.5 fuses them without being told
        settings = {small: 1} if hasattr(torch._inductor.config, small) else {}
        with torch._inductor.config.patch(settings), torch.no_grad():
            step()
        counts.append(torch._inductor.metrics.generated_kernel_count)
    assert counts == [8, 8]  # four parameters: one for the step count, one for all the rest


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # Dynamo itself
def test_a_compiled_training_step_with_a_closure() -> None:
    model, twin = models(torch.float64)
    x = torch.linspace(-1, 1, 30, dtype=torch.float64).reshape(3, 10)
    eager, graphed = (ACProp(m.parameters(), lr=1e-2) for m in (model, twin))

    def closure(model: torch.nn.Module, optimizer: ACProp) -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(x).square().sum()
        loss.backward()
        return loss

    step = torch.compile(lambda: graphed.step(lambda: closure(twin, graphed)))
    for _ in range(3):
        step()
        eager.step(lambda: closure(model, eager))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def test_a_step_on_lists_is_compiled_for_any_size() -> None:
    """The second size makes torch take the sizes for symbols."""

    @torch.compile(fullgraph=True)
    def compute(optimizer: ACProp) -> None:
        ACProp.step.__wrapped__.__wrapped__(optimizer)  # type: ignore[attr-defined]

    for size in (10, 20, 30):
        x = torch.ones(size, requires_grad=True)
        x.grad = torch.ones(size)
        with torch.no_grad():
            compute(ACProp([x], lr=0.1, foreach=True))
        torch.testing.assert_close(x.detach(), torch.full((size,), 0.9))


def test_a_step_without_a_gradient_is_compiled_away() -> None:
    model, _ = models()
    optimizer = ACProp(model.parameters())
    first = next(model.parameters())
    first.grad = None
    before = first.detach().clone()
    with torch.no_grad():
        compiled(optimizer)()
    assert torch.equal(first, before)
    assert first not in optimizer.state


def test_the_fused_step_compiles_once_whatever_the_number_of_parameters() -> None:
    """Without Numba; sizes, rates and counts are arguments of the one compiled function."""
    graphs = []
    for number in (3, 60):
        torch._dynamo.reset()
        forget_compiled_torch_step()
        counters.clear()
        xs = [torch.full((2 + 3 * i,), 1.0, requires_grad=True) for i in range(number)]
        xs += [torch.full((40_000 + i,), 1.0, requires_grad=True) for i in range(number)]  # too large to be gathered
        optimizer = ACProp(xs, fused=True, clip_exponent=0.25)
        for x in xs:
            x.grad = torch.ones_like(x)
        with without_numba():
            for step in range(4):
                optimizer.param_groups[0].update(lr=0.1 / (step + 1), betas=(0.9 - step / 10, 0.99 - step / 100))
                optimizer.step()
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == [1, 1]


@pytest.mark.parametrize("fused", [True, False])
def test_a_compiled_step_heeds_the_scaler(fused: bool) -> None:
    x = torch.ones(2, requires_grad=True)
    optimizer = ACProp([x], lr=0.1, fused=fused)
    step = torch.compile(optimizer.step)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for g, after in ((1.0, 0.9), (float("inf"), 0.9)):
        x.grad = torch.full((2,), 1024.0 * g)
        scaler._per_optimizer_states.clear()
        optimizer.step = step  # type: ignore[method-assign]
        scaler.scale(torch.ones(()))
        scaler.step(optimizer)
        torch.testing.assert_close(x.detach(), torch.full((2,), after))
        assert optimizer.state[x]["step"].item() == 1


def test_a_number_for_a_rate_may_change_without_end() -> None:
    """Torch makes a symbol of a number that changes: no new program for every value."""
    counts = []
    for cls in (ACProp, torch.optim.AdamW):
        torch._dynamo.reset()
        x = torch.ones(3, requires_grad=True)
        x.grad = torch.ones(3)
        optimizer = cls([x])
        backend = CompileCounterWithBackend("eager")
        step = compiled(optimizer, backend)
        with torch.no_grad():
            for i in range(6):
                optimizer.param_groups[0]["lr"] = 0.1 / (i + 1)
                step()
        counts.append(backend.frame_count)
    assert counts[0] == counts[1]
    assert counts[0] == 2 or torch_version() < (2, 6)  # which makes a program for every number


def test_no_combination_of_options_is_left_uncompiled() -> None:
    """Past a limit on programs torch would continue uncompiled, without a word."""
    x = torch.ones(5, requires_grad=True)
    with without_numba():
        for decay, l2, clip, (centering, asynchronous) in itertools.product(
            (0, 0.1), (False, True), (None, 0.25), (("current", True), ("previous", True), ("none", False))
        ):
            optimizer = ACProp(
                [x],
                weight_decay=decay,
                decoupled_weight_decay=not l2,
                clip_exponent=clip,
                centering=centering,
                asynchronous=asynchronous,
                fused=True,
            )
            x.grad = torch.ones(5)
            optimizer.step()
    assert counters["stats"]["unique_graphs"] == 18  # without decay, its form does not matter


@pytest.mark.parametrize("flags", [{}, {"foreach": False}, {"foreach": True}, {"fused": True}], ids=str)
def test_an_optimizer_may_be_made_inside_a_compiled_function(flags: dict[str, bool]) -> None:
    """Dynamo drops attributes that are set before those of the base class, and warns of caches (here an error)."""

    def run(cls: type[torch.optim.Optimizer], x: torch.Tensor) -> torch.optim.Optimizer:
        optimizer = cls([x], lr=0.1, **flags)
        for _ in range(3):
            optimizer.zero_grad()
            (x * x).sum().backward()
            optimizer.step()
        return optimizer

    for cls in (ACProp, torch.optim.AdamW):
        torch._dynamo.reset()
        inside, outside = (torch.full((3,), 2.0, requires_grad=True) for _ in range(2))
        made = torch.compile(run, backend="eager", fullgraph=False)(cls, inside)
        twin = run(cls, outside)
        torch.testing.assert_close(inside, outside, rtol=1e-5, atol=0.0)
        assert made.state[inside]["step"] == 3
        made.step()  # and continues outside
        twin.step()
        torch.testing.assert_close(inside, outside, rtol=1e-5, atol=0.0)
        assert {*vars(made)} == {*vars(twin)} or cls is not ACProp


def test_options_are_refused_inside_a_compiled_function_too() -> None:
    @torch.compile(backend="eager", fullgraph=False)
    def make(x: torch.Tensor) -> ACProp:
        return ACProp([x], clip_exponent=-1.0)

    with pytest.raises(ValueError, match="clip_exponent is -1.0"):
        make(torch.ones(3, requires_grad=True))


@pytest.mark.parametrize("numba", [True, False])
def test_preparing_a_step_takes_time_in_proportion_to_the_parameters(
    numba: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows are made a few times, not once more for each row."""
    calls = []

    def rows_of(columns: Any) -> Any:
        calls.append(len(columns.param))
        return of(columns)

    of = _rows.rows_of
    monkeypatch.setattr(_rows, "rows_of", rows_of)
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(50)]
    optimizer = ACProp(params, clip_exponent=0.25, fused=True)
    for p in params:
        p.grad = torch.ones(3)
    with contextlib.nullcontext() if numba else without_numba():
        optimizer._prepare(optimizer.param_groups[0])
    assert sum(calls) <= 5 * len(params)
