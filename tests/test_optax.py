"""The optax adapter as a transformation of optax: states, wrappers, dtypes."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

from acprop_optax import acprop, scale_by_acprop

PARAMS = {"w": jnp.ones((2, 3)), "b": [jnp.zeros(3)]}


def run(transform: optax.GradientTransformation, steps: int = 4) -> Any:
    params, state = PARAMS, transform.init(PARAMS)
    for i in range(steps):
        grads = jax.tree.map(lambda p, i=i: jnp.sin(p + i + 1), params)
        updates, state = transform.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def test_the_state_is_that_of_optax() -> None:
    ours, theirs = (jax.tree.structure(f(1e-3).init(PARAMS)) for f in (acprop, optax.contrib.acprop))
    assert ours == theirs
    state = acprop(1e-3).init(PARAMS)
    assert isinstance(state[0], optax.ScaleByBeliefState)
    assert optax.tree.get(state, "count").dtype == jnp.int32


def test_acprop_is_its_chain() -> None:
    chain = optax.chain(
        scale_by_acprop(0.8, 0.99, clip_exponent=0.25),
        optax.add_decayed_weights(0.1),
        optax.scale_by_learning_rate(optax.linear_schedule(0.1, 0.0, 10)),
    )
    whole = acprop(optax.linear_schedule(0.1, 0.0, 10), 0.8, 0.99, weight_decay=0.1, clip_exponent=0.25)
    for a, b in zip(jax.tree.leaves(run(chain)), jax.tree.leaves(run(whole)), strict=True):
        assert (a == b).all()


def test_params_are_optional_without_decay() -> None:
    transform = scale_by_acprop()
    updates, state = transform.update(PARAMS, transform.init(PARAMS))
    assert (updates["w"] == PARAMS["w"]).all()  # the first step
    assert state.count == 1


def test_hyperparameters_can_be_injected_and_traced() -> None:
    injected = optax.inject_hyperparams(acprop)(learning_rate=1e-2, b2=0.99, weight_decay=0.1)
    params, state = run(injected)
    plain, _ = run(acprop(1e-2, b2=0.99, weight_decay=0.1))
    assert float(state.hyperparams["learning_rate"]) == pytest.approx(1e-2)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(plain), strict=True):
        assert jnp.abs(a - b).max() <= 4 * jnp.finfo(a.dtype).eps


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_scan_keeps_its_types(dtype: str) -> None:
    transform = acprop(1e-2, weight_decay=0.1, clip_exponent=0.25)
    params = jnp.ones(3, dtype)

    def step(carry: Any, grad: Any) -> Any:
        params, state = carry
        updates, state = transform.update(grad, state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, state), _ = jax.lax.scan(step, (params, transform.init(params)), jnp.ones((5, 3), dtype))
    assert params.dtype == dtype
    assert state[0].mu.dtype == jnp.float32


@pytest.mark.parametrize("options", [{"b1": 1.5}, {"b2": 1.0}, {"eps": -1.0}, {"learning_rate": float("nan")}])
def test_impossible_hyperparameters_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))} is .*; give a number"):
        acprop(**{"learning_rate": 1e-3, **options})
