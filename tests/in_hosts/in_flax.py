"""Flax: linen with its TrainState, and nnx with its Optimizer."""

from pathlib import Path

import flax.serialization
import jax
import optax
from flax import linen, nnx
from flax.training.train_state import TrainState
from jax import Array

from acprop_optax import acprop
from runs import Run, check, data, jax_arrays, jax_loss, pickled, unpickled


def with_linen(steps: int, resume: Path | None, save: Path) -> Run:
    model = linen.Sequential([linen.Dense(16), linen.relu, linen.Dense(3)])
    x, _ = data()
    # begin linen
    rate = optax.linear_schedule(3e-2, 1e-2, 40)
    transform = acprop(rate, weight_decay=1e-3, clip_exponent=0.25)
    params = model.init(jax.random.key(0), x)
    state = TrainState.create(apply_fn=model.apply, params=params, tx=transform)

    @jax.jit
    def step(state: TrainState) -> tuple[TrainState, Array]:
        grads_of = jax.value_and_grad(lambda p: jax_loss(state.apply_fn(p, x)))
        loss, grads = grads_of(state.params)
        return state.apply_gradients(grads=grads), loss

    # end linen
    if resume is not None:
        state = flax.serialization.from_bytes(state, resume.read_bytes())
    losses = []
    while state.step < steps:
        state, loss = step(state)
        losses.append(float(loss))
    save.write_bytes(flax.serialization.to_bytes(state))
    return Run(losses, jax_arrays(state.params, state.opt_state))


def with_nnx(steps: int, resume: Path | None, save: Path) -> Run:
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(nnx.Linear(8, 16, rngs=rngs), nnx.relu, nnx.Linear(16, 3, rngs=rngs))
    # begin nnx
    rate = optax.linear_schedule(3e-2, 1e-2, 40)
    transform = acprop(rate, weight_decay=1e-3, clip_exponent=0.25)
    optimizer = nnx.Optimizer(model, transform, wrt=nnx.Param)

    @nnx.jit
    def step(model: nnx.Module, optimizer: nnx.Optimizer, x: Array) -> Array:
        loss, grads = nnx.value_and_grad(lambda model: jax_loss(model(x)))(model)
        optimizer.update(model, grads)
        return loss

    # end nnx
    if resume is not None:
        for part, saved in zip((model, optimizer), unpickled(resume), strict=True):
            nnx.update(part, saved)
    losses = []
    while optimizer.step[...] < steps:
        losses.append(float(step(model, optimizer, data()[0])))
    pickled(save, (nnx.state(model), nnx.state(optimizer)))
    return Run(losses, jax_arrays(nnx.state(model), nnx.state(optimizer)))


def test_linen(tmp_path: Path) -> None:
    check("flax", with_linen, tmp_path, "linen")


def test_nnx(tmp_path: Path) -> None:
    check("flax", with_nnx, tmp_path, "nnx")
