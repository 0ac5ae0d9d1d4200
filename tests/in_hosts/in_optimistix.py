"""optimistix: an optax transform as the solver of a minimisation."""

from pathlib import Path
from typing import Any

import equinox
import jax
import jax.numpy as jnp
import optimistix

from acprop_optax import acprop
from runs import Run, check, data, jax_arrays, jax_loss


def objective(weights: jax.Array, args: Any) -> jax.Array:
    return jax_loss(data()[0] @ weights)


def solver() -> optimistix.OptaxMinimiser:
    # begin
    transform = acprop(3e-2, clip_exponent=0.25)
    minimiser = optimistix.OptaxMinimiser(transform, rtol=1e-6, atol=1e-6)
    # end
    return minimiser


def train(steps: int, resume: Path | None, save: Path) -> Run:
    minimiser, weights, losses = solver(), jnp.zeros((8, 3)), []
    options = {"fn": lambda y, args: (objective(y, args), None), "args": None, "options": {}, "tags": frozenset()}
    like = jax.eval_shape(lambda: jnp.zeros(()))
    state = minimiser.init(y=weights, f_struct=like, aux_struct=None, **options)
    step = equinox.filter_jit(lambda y, state: minimiser.step(y=y, state=state, **options)[:2])
    done = 0
    if resume is not None:
        done, weights, state = equinox.tree_deserialise_leaves(resume, (done, weights, state))
    for _ in range(done, steps):
        losses.append(float(objective(weights, None)))
        weights, state = step(weights, state)
    equinox.tree_serialise_leaves(save, (steps, weights, state))
    return Run(losses, jax_arrays(equinox.filter((weights, state), equinox.is_array)))


def test_optimistix(tmp_path: Path) -> None:
    check("optimistix", train, tmp_path)


def test_optimistix_finds_the_minimum() -> None:
    # begin minimise
    def far(y: jax.Array, _: Any) -> jax.Array:
        return ((y - 3.0) ** 2).sum()

    start = jnp.zeros(4)
    found = optimistix.minimise(far, solver(), start, max_steps=10_000)
    # end minimise
    assert abs(found.value - 3.0).max() < 1e-3
