"""The fused step of torch on accelerators without numba-cuda, run on a CPU: calls, programs, and the same bits."""

import pytest

pytest.importorskip("torch")

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch._dynamo
from torch._dynamo.utils import counters

from acprop_torch import ACProp, _inductor
from hosts import forget_compiled_torch_step, fused_as_on_an_accelerator

N = 512


@pytest.fixture(autouse=True)
def on_an_accelerator() -> Iterator[None]:
    with fused_as_on_an_accelerator(), torch._dynamo.config.patch(error_on_recompile=True):
        yield


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the number of rows of each call, as they come."""
    made: list[int] = []
    compile = _inductor._compile

    def counted(*args: Any) -> Any:
        program = compile(*args)

        def run(rows: Sequence[Any], *rest: Any) -> None:
            made.append(len(rows))
            program(rows, *rest)

        return run

    monkeypatch.setattr(_inductor, "_compile", counted)
    return made


def in_one_buffer(sizes: Sequence[int], generator: torch.Generator) -> list[torch.Tensor]:
    """Return random tensors back to back in memory, as DDP keeps gradients."""
    return list(torch.randn(sum(sizes), generator=generator).split(list(sizes)))


def trained(
    sizes: Sequence[int], steps: int = 2, late: int = 0, fused: bool = True, scaled: tuple[float, float] | None = None
) -> list[torch.Tensor]:
    """Return parameters and state after some steps, of which the first `late` parameters miss one.

    `scaled` are the values of `grad_scale` and `found_inf`.
    """
    generator = torch.Generator().manual_seed(0)
    xs = [x.requires_grad_() for x in in_one_buffer(sizes, generator)]
    optimizer = ACProp(xs, fused=fused, lr=0.1, clip_exponent=0.25, weight_decay=0.1)
    if scaled is not None:
        optimizer.grad_scale, optimizer.found_inf = map(torch.tensor, scaled)
    for step in range(steps):
        grads = in_one_buffer(sizes, generator)
        for i, (x, g) in enumerate(zip(xs, grads, strict=True)):
            x.grad = None if step == 0 and i < late else g * (1.0 if scaled is None else scaled[0])
        optimizer.step()
    return [y.detach() for x in xs for y in (x, *optimizer.state[x].values())]


def same_bits(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return [x.numpy().tobytes() for x in a] == [x.numpy().tobytes() for x in b]


def test_many_tensors_are_few_calls_of_one_program(calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Any sizes may be equal, in any places, also to the number of tensors; each has the numbers of its own count."""
    forget_compiled_torch_step()
    counters.clear()
    late = 20
    mixed = [2 + i * i % 7 * (1 + i // 50) for i in range(N)]
    alone = [*([9] * (N // 2)), *range(2, 2 + N // 2)]
    mixed[late] = N - late
    results = []
    for sizes in (mixed, alone):
        results.append(trained(sizes, late=late))
        assert calls == [8] * 61 + [1] * 4 + [8] * 64
        calls.clear()
    assert counters["stats"]["unique_graphs"] == 2  # for eight tensors, and for one of the last four
    assert all(same_bits(x, trained(y, late=late, fused=False)) for x, y in zip(results, (mixed, alone), strict=True))
    monkeypatch.setattr(_inductor, "_TOGETHER", N + 1)
    for sizes, together in zip((mixed, alone), results, strict=True):
        assert same_bits(trained(sizes, late=late), together)
    assert calls == [1] * 2 * (2 * N - late)
    assert counters["stats"]["unique_graphs"] == 2


def test_tensors_that_are_left_are_called_alone(calls: list[int]) -> None:
    """Too few for another call; and those of 0 elements or 1, for which torch has other programs."""
    trained([5, 1, 4, 0, *range(2, 9), 8, 1], steps=1)
    assert sorted(calls) == [1] * 5 + [8]


def test_a_scale_and_an_infinity_hold_for_all_tensors_of_a_call(calls: list[int]) -> None:
    sizes = range(2, 14)
    assert same_bits(trained(sizes, scaled=(8.0, 0.0)), trained(sizes, fused=False))
    skipped = trained(sizes, scaled=(8.0, 2.0))
    assert calls == [8, 1, 1, 1, 1] * 4
    assert same_bits(skipped[::4], in_one_buffer(sizes, torch.Generator().manual_seed(0)))
    assert not any(x.any() for i in (1, 2, 3) for x in skipped[i::4])


def test_tensors_that_share_memory_get_both_updates(calls: list[int]) -> None:
    memory = torch.zeros(4)
    params = [torch.nn.Parameter(memory) for _ in range(8)]
    for p in params:
        p.grad = torch.ones(4)
    ACProp(params, lr=0.5, fused=True).step()
    assert calls == [1] * 8
    assert torch.equal(memory, torch.full((4,), -4.0))


@pytest.mark.parametrize("found", [None, 0.0, 2.0])
def test_tensors_in_other_orders_are_stepped_on_lists(found: float | None, calls: list[int]) -> None:
    """Nothing changes where an infinity was found, not even the sign of a zero."""
    x = torch.tensor([[1.0, -0.0, 0.0], [2.0, -3.0, 4.0]], requires_grad=True)
    x.grad = torch.tensor([[3.0, 0.0], [-1.0, 2.0], [1.0, -0.5]]).t() * 8
    optimizer = ACProp([x], fused=True, lr=0.5, clip_exponent=0.25)
    if found is not None:
        optimizer.grad_scale, optimizer.found_inf = torch.tensor([8.0]), torch.tensor([found])
    before = x.detach().clone()
    for _ in range(2):
        optimizer.step()
    assert calls == []
    expected = before.clone().requires_grad_()
    expected.grad = x.grad / (1.0 if found is None else 8.0)
    twin = ACProp([expected], fused=False, foreach=False, lr=0.5, clip_exponent=0.25)
    for _ in range(0 if found else 2):
        twin.step()
    state = optimizer.state[x]
    assert same_bits([x.detach()], [expected.detach()])
    assert state["step"].item() == (0 if found else 2)
    if found:
        assert not state["exp_avg"].any()
        assert not state["exp_avg_var"].any()
    else:
        assert all(torch.equal(state[name], y) for name, y in twin.state[expected].items())


def test_a_failing_list_leaves_everything_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling comes before the first write."""
    forget_compiled_torch_step()
    monkeypatch.setattr(torch, "compile", lambda *args, **options: 1 / 0)
    xs = [torch.ones(3, requires_grad=True), torch.ones(2, 3).t().requires_grad_()]
    for x in xs:
        x.grad = torch.ones(3) if x.ndim == 1 else torch.ones(3, 2)
    with pytest.raises(ZeroDivisionError):
        ACProp(xs, fused=True).step()
    assert all((x == 1.0).all() for x in xs)
