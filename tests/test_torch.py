"""The torch adapter as an optimizer of torch: groups, late parameters, closures, saved and restored state."""

import pytest

pytest.importorskip("torch")

import copy
from typing import Any

import torch

from acprop_torch import ACProp
from hosts import torch_tiles


def model_and_data() -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) / 2)
    x = torch.randn(32, 4, generator=generator, dtype=torch.float64)
    return model, x, x.sum(dim=1, keepdim=True)


def train(model: torch.nn.Module, optimizer: Any, x: torch.Tensor, y: torch.Tensor, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_it_trains() -> None:
    model, x, y = model_and_data()
    losses = train(model, ACProp(model.parameters(), lr=1e-2, clip_exponent=0.25), x, y, 200)
    assert losses[-1] < losses[0] / 50


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_tiles_give_the_bits_of_the_whole(dtype: torch.dtype, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    x, *grads = (torch.randn(7, 9, generator=generator).to(dtype) for _ in range(4))
    results = []
    for tile in (40, 4000):
        torch_tiles(monkeypatch, tile, small=1)
        p = x.clone() if layout == "contiguous" else x.t().contiguous().t()
        p.requires_grad_()
        optimizer = ACProp([p], lr=0.1, weight_decay=0.1, clip_exponent=0.25)
        for g in grads:
            p.grad = g.clone()
            optimizer.step()
        results.append((p.detach(), optimizer.state[p]["exp_avg"], optimizer.state[p]["exp_avg_var"]))
    for tiled, whole in zip(*results, strict=True):
        assert torch.equal(tiled, whole)


def test_groups_have_their_own_options() -> None:
    a, b = (torch.ones(2, requires_grad=True) for _ in range(2))
    optimizer = ACProp([{"params": [a], "lr": 0.5}, {"params": [b], "weight_decay": 0.5, "betas": (0.5, 0.5)}], lr=0.25)
    a.grad = b.grad = torch.ones(2)
    optimizer.step()
    assert a.tolist() == [0.5, 0.5]
    assert b.tolist() == [1 - 0.25 * 1.5] * 2
    assert optimizer.state[b]["exp_avg"].tolist() == [0.5, 0.5]


def test_parameters_that_join_late_or_thaw_have_their_own_step() -> None:
    a, b = (torch.ones(2, requires_grad=True) for _ in range(2))
    optimizer = ACProp([a], lr=0.5)
    a.grad = torch.ones(2)
    optimizer.step()
    optimizer.add_param_group({"params": [b]})
    optimizer.step()  # b has no gradient yet
    assert b not in optimizer.state
    b.grad = torch.ones(2)
    optimizer.step()
    assert (optimizer.state[a]["step"].item(), optimizer.state[b]["step"].item()) == (3, 1)
    assert b.tolist() == [0.5, 0.5]  # the first step is -lr g


def test_a_closure_is_called_with_gradients_on() -> None:
    a = torch.ones(2, requires_grad=True)
    optimizer = ACProp([a], lr=0.5)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = a.square().sum() / 2
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 1.0
    assert a.tolist() == [0.5, 0.5]


def test_a_schedulers_rate_is_followed() -> None:
    a = torch.zeros(1, requires_grad=True)
    optimizer = ACProp([a], lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    steps = []
    for _ in range(3):
        before = a.item()
        optimizer.state.clear()  # the first step moves by lr exactly
        a.grad = torch.ones(1)
        optimizer.step()
        scheduler.step()
        steps.append(before - a.item())
    assert steps == [1.0, 0.5, 0.25]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_moments_of_16_bit_parameters_are_restored_unharmed(dtype: torch.dtype) -> None:
    a = torch.ones(3, dtype=dtype, requires_grad=True)
    optimizer = ACProp([a])
    for g in (0.1, 0.3, -0.7):
        a.grad = torch.full((3,), g, dtype=dtype)
        optimizer.step()
    again = ACProp([a])
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for key in ("exp_avg", "exp_avg_var"):
        assert again.state[a][key].dtype == torch.float32
        assert torch.equal(again.state[a][key], optimizer.state[a][key])
        assert again.state[a][key] is not optimizer.state[a][key]


@pytest.mark.parametrize("default", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_step_counts_on_whatever_the_default_dtype(default: torch.dtype) -> None:
    a = torch.ones(1, requires_grad=True)
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        optimizer = ACProp([a], lr=0.0)
        a.grad = torch.ones_like(a)
        for _ in range(300):
            optimizer.step()
    finally:
        torch.set_default_dtype(before)
    step = optimizer.state[a]["step"]
    assert step.item() == 300
    assert step.dtype == (torch.float64 if default == torch.float64 else torch.float32)


def test_a_state_that_is_not_made_yet_is_loaded_as_such() -> None:
    a, b = (torch.ones(1, requires_grad=True) for _ in range(2))
    a.grad = torch.ones(1)
    optimizer = ACProp([a, b])
    optimizer.step()
    assert optimizer.state[b] == {}  # looked at, and so made
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.step()
