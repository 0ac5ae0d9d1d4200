"""Equinox, in the three ways in which its users call an optimizer."""

from pathlib import Path
from typing import Any

import equinox
import jax
import pytest

from acprop_optax import acprop
from runs import Run, assert_same, check, data, jax_arrays, jax_loss


def network() -> Any:
    return equinox.nn.MLP(8, 3, 16, 1, key=jax.random.key(0))


def loss_of(model: Any) -> jax.Array:
    return jax_loss(jax.vmap(model)(data()[0]))


def filtered() -> tuple[Any, Any]:
    # begin filtered
    transform = acprop(3e-2, weight_decay=1e-3, clip_exponent=0.25)

    @equinox.filter_jit
    def step(model: Any, state: Any) -> Any:
        loss, grads = equinox.filter_value_and_grad(loss_of)(model)
        params = equinox.filter(model, equinox.is_inexact_array)
        updates, state = transform.update(grads, state, params)
        return equinox.apply_updates(model, updates), state, loss

    # end filtered
    return transform, step


def whole() -> tuple[Any, Any]:
    # begin whole
    transform = acprop(3e-2, weight_decay=1e-3, clip_exponent=0.25)

    @equinox.filter_jit
    def step(model: Any, state: Any) -> Any:
        loss, grads = equinox.filter_value_and_grad(loss_of)(model)
        updates, state = transform.update(grads, state, model)
        return equinox.apply_updates(model, updates), state, loss

    # end whole
    return transform, step


def partitioned() -> tuple[Any, Any]:
    # begin partitioned
    transform = acprop(3e-2, weight_decay=1e-3, clip_exponent=0.25)

    @equinox.filter_jit
    def step(model: Any, state: Any) -> Any:
        params, static = equinox.partition(model, equinox.is_inexact_array)
        grads_of = jax.value_and_grad(lambda p: loss_of(equinox.combine(p, static)))
        loss, grads = grads_of(params)
        updates, state = transform.update(grads, state, params)
        params = equinox.apply_updates(params, updates)
        return equinox.combine(params, static), state, loss

    # end partitioned
    return transform, step


WAYS = [filtered, whole, partitioned]


def train_by(way: Any) -> Any:
    def train(steps: int, resume: Path | None, save: Path) -> Run:
        transform, step = way()
        model, losses, done = network(), [], 0
        # begin init
        state = transform.init(equinox.filter(model, equinox.is_inexact_array))
        # end init
        if resume is not None:
            model, state = equinox.tree_deserialise_leaves(resume, (model, state))
            done = int(state[0].count)
        for _ in range(done, steps):
            model, state, loss = step(model, state)
            losses.append(float(loss))
        equinox.tree_serialise_leaves(save, (model, state))
        return Run(losses, jax_arrays(equinox.filter((model, state), equinox.is_array)))

    return train


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_equinox(way: Any, tmp_path: Path) -> None:
    check("equinox", train_by(way), tmp_path, way.__name__)


def test_all_ways_end_with_the_same_bits(tmp_path: Path) -> None:
    first, *others = (train_by(way)(10, None, tmp_path / "saved").arrays for way in WAYS)
    for other in others:
        assert_same(first, other)
