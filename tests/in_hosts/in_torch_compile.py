"""torch.compile of a training step: compiled once, also where a schedule changes the rate at every step."""

import functools
from typing import Any
from unittest import mock

import pytest
import torch
from torch._dynamo.utils import counters
from torch.optim.lr_scheduler import LinearLR

from acprop_torch import ACProp
from runs import torch_data, torch_net


def graphs_of(steps: int, **options: Any) -> int:
    model, (x, y) = torch_net(), torch_data()
    torch._dynamo.reset()
    counters.clear()
    with mock.patch.object(torch, "compile", functools.partial(torch.compile, backend="eager")):  # it only counts
        step, schedule = compiled(model, x, y, **options)
    for _ in range(steps):
        step()
        schedule.step()
    return counters["stats"]["unique_graphs"]


def compiled(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, **options: Any) -> tuple[Any, Any]:
    # begin
    options = {"lr": torch.tensor(3e-2), "clip_exponent": 0.25, **options}
    optimizer = ACProp(model.parameters(), **options)
    schedule = LinearLR(optimizer, 1.0, 0.1, total_iters=40)

    @torch.compile
    def step() -> None:
        loss = torch.nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    # end
    return step, schedule


def test_compiled_steps_are_not_compiled_again() -> None:
    assert graphs_of(3) == graphs_of(12)


def test_a_rate_that_is_a_float_compiles_once_more_at_its_first_change() -> None:
    assert [graphs_of(steps, lr=3e-2) - graphs_of(3) for steps in (3, 12)] == [1, 1]


def test_foreach_refuses_a_rate_in_a_tensor() -> None:
    with pytest.raises(ValueError, match="foreach"):
        graphs_of(1, foreach=True)
