"""MLX: the functional core on the arrays of mlx.nn."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn
import mlx.optimizers
import numpy as np
from mlx.utils import tree_flatten, tree_map

import acprop_core
from acprop_core import ACProp
from runs import HALF, STEPS, assert_same, compare, data


def network() -> mlx.nn.Module:
    mx.random.seed(0)
    return mlx.nn.Sequential(mlx.nn.Linear(8, 16), mlx.nn.ReLU(), mlx.nn.Linear(16, 3))


def loss_of(model: mlx.nn.Module) -> mx.array:
    x, y = map(mx.array, data())
    return mlx.nn.losses.cross_entropy(model(x), y).mean()


def train(steps: int, resume: Path | None, save: Path) -> tuple[list[float], list[np.ndarray]]:
    model, losses = network(), []
    # begin
    optimizer = ACProp(3e-2, weight_decay=1e-3, clip_exponent=0.25)
    state = optimizer.init(model.parameters())
    loss_and_grads = mlx.nn.value_and_grad(model, loss_of)

    def step(state: acprop_core.State) -> tuple[acprop_core.State, mx.array]:
        loss, grads = loss_and_grads(model)
        updates, state = optimizer.update(grads, state, model.parameters())
        model.update(optimizer.apply(model.parameters(), updates))
        mx.eval(model.parameters(), state)  # or the graph grows from step to step
        return state, loss

    # end
    if resume is not None:
        model.load_weights(str(resume / "model.safetensors"))
        # begin resume
        file = resume / "state.safetensors"
        _, state = acprop_core.load(file, model.parameters())
        mu, nu = (tree_map(mx.array, x) for x in (state.mu, state.nu))
        state = state._replace(mu=mu, nu=nu)
        # end resume
    while state.count < steps:
        state, loss = step(state)
        losses.append(loss.item())
    save.mkdir()
    model.save_weights(str(save / "model.safetensors"))
    acprop_core.save(save / "state.safetensors", optimizer, state)
    return losses, [np.array(x) for _, x in tree_flatten([model.parameters(), state.mu, state.nu])]


def yardstick(steps: int) -> list[float]:
    model, optimizer, losses = network(), mlx.optimizers.AdamW(3e-2, weight_decay=1e-3, bias_correction=True), []
    loss_and_grads: Any = mlx.nn.value_and_grad(model, loss_of)
    for _ in range(steps):
        loss, grads = loss_and_grads(model)
        optimizer.update(model, grads)
        losses.append(loss.item())
    return losses


def test_mlx(tmp_path: Path) -> None:
    losses, whole = train(STEPS, None, tmp_path / "whole")
    train(HALF, None, tmp_path / "half")
    _, resumed = train(STEPS, tmp_path / "half", tmp_path / "resumed")
    assert_same(whole, resumed)
    compare("mlx", losses, yardstick(STEPS))
