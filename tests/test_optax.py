"""The optax adapter as a transformation of optax: states, wrappers, dtypes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
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


def test_subtrees_may_be_empty() -> None:
    for transform in (
        optax.masked(acprop(0.1), {"w": False, "b": [False]}),
        optax.multi_transform({"all": acprop(0.1), "none": acprop(0.2)}, {"w": "all", "b": ["all"]}),
    ):
        run(transform)
    updates, _ = acprop(0.1).update({}, acprop(0.1).init({}), {})
    assert updates == {}


@pytest.mark.parametrize(
    ("grads", "error", "message"),
    [
        (
            {"w": jnp.ones((3, 1)), "b": [jnp.zeros(3)]},
            ValueError,
            r"gradient of 'w' has shape \(3, 1\), its parameter",
        ),
        ({"w": jnp.ones((2, 3), int), "b": [jnp.zeros(3)]}, TypeError, "gradient of 'w' has dtype int32"),
        ({"w": jnp.ones((2, 3)), "b": [jnp.zeros(3, "complex64")]}, TypeError, "gradient of 'b.0' has dtype complex64"),
    ],
)
def test_gradients_that_do_not_fit_are_named(grads: Any, error: type[Exception], message: str) -> None:
    transform = scale_by_acprop()
    state = transform.init(PARAMS)
    with pytest.raises(error, match=message):
        transform.update(grads, state, PARAMS)
    with pytest.raises(TypeError, match="parameter 'layer.w' has dtype int32"):
        transform.init({"layer": {"w": jnp.ones(2, int)}})


@pytest.mark.parametrize("with_params", [True, False])
def test_the_update_has_the_dtype_of_the_parameter(with_params: bool) -> None:
    params, grads = jnp.ones(3, "bfloat16"), jnp.ones(3, "float32")
    transform = scale_by_acprop()
    updates, state = transform.update(grads, transform.init(params), params if with_params else None)
    assert updates.dtype == (params if with_params else grads).dtype
    assert state.mu.dtype == jnp.float32


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_array_hyperparameters_do_not_widen_updates(dtype: str) -> None:
    params = jnp.ones(3, dtype)
    for transform in (
        acprop(jnp.float32(1e-2), weight_decay=jnp.float32(0.1)),
        optax.inject_hyperparams(acprop)(1e-2, weight_decay=0.1),
    ):
        updates, _ = transform.update(params, transform.init(params), params)
        assert updates.dtype == dtype


def test_a_state_may_be_of_numpy_arrays() -> None:
    transform = acprop(0.1)
    state = jax.device_get(transform.init(PARAMS))
    _, state = transform.update(PARAMS, state, PARAMS)
    assert int(state[0].count) == 1


def test_the_count_saturates() -> None:
    transform = scale_by_acprop(clip_exponent=0.25)
    state = transform.init(jnp.ones(3))._replace(count=jnp.int32(2**31 - 1))
    updates, state = transform.update(jnp.ones(3), state)
    assert int(state.count) == 2**31 - 1
    assert jnp.isfinite(updates).all()


def test_a_wide_number_does_not_widen_in_64_bit_mode() -> None:
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    try:
        params = jnp.ones(3, "float32")
        transform = acprop(np.float64(1e-3), b1=np.float64(0.9), weight_decay=np.float64(0.1))
        updates, _ = transform.update(params, transform.init(params), params)
    finally:
        jax.config.update("jax_enable_x64", before)
    assert updates.dtype == jnp.float32


@pytest.mark.parametrize(
    "options", [{"weight_decay": -1.0}, {"b1": 1.5}, {"b2": 1.0}, {"eps": -1.0}, {"learning_rate": float("nan")}]
)
def test_impossible_hyperparameters_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))} is .*; give a number"):
        acprop(**{"learning_rate": 1e-3, **options})
