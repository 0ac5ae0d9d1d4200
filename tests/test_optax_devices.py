"""The optax adapter on eight virtual CPU devices: the state follows the parameters, nothing is sent about."""

import os
import re
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from acprop_optax import acprop

EIGHT = jax.device_count() == 8
needs_eight = pytest.mark.skipif(not EIGHT, reason="runs in the process of test_on_eight_devices")
TRANSFORM = acprop(0.1, weight_decay=0.1, clip_exponent=0.25)


@pytest.mark.skipif(EIGHT, reason="this is the process of test_on_eight_devices")
def test_on_eight_devices() -> None:
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", __file__],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout
    assert re.search(r"[1-9] passed", result.stdout), result.stdout


def step(params: Any, state: Any, grads: Any) -> Any:
    updates, state = TRANSFORM.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def data() -> tuple[Any, Any]:
    params = {"w": jnp.linspace(-1.0, 1.0, 64 * 16).reshape(64, 16), "b": jnp.ones(16)}
    return params, jax.tree.map(jnp.sin, params)


def expected(steps: int) -> Any:
    params, grads = data()
    carry = params, TRANSFORM.init(params)
    for _ in range(steps):
        carry = jax.jit(step)(*carry, grads)
    return carry


def assert_close(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6)


@needs_eight
@pytest.mark.parametrize("donate", [(), (0, 1)])
@pytest.mark.parametrize("axes", [AxisType.Auto, AxisType.Explicit])
def test_named_sharding(axes: AxisType, donate: tuple[int, ...]) -> None:
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(axes, axes))
    shardings = {"w": NamedSharding(mesh, PartitionSpec("x", "y")), "b": NamedSharding(mesh, PartitionSpec("y"))}
    params, grads = jax.device_put(data(), (shardings, shardings))
    state = TRANSFORM.init(params)
    compiled = jax.jit(step, donate_argnums=donate).lower(params, state, grads).compile()
    assert not re.search(r"all-(gather|reduce|to-all)|collective-permute", compiled.as_text())
    carry = params, state
    for _ in range(3):
        for moment in (carry[1][0].mu, carry[1][0].nu):
            for name, x in moment.items():
                assert x.sharding.is_equivalent_to(shardings[name], x.ndim)
        carry = compiled(*carry, grads)
    assert_close(carry, expected(3))


@needs_eight
@pytest.mark.skipif(not hasattr(jax, "shard_map"), reason="this JAX has no jax.shard_map")
def test_shard_map() -> None:
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    params, grads = data()
    state = TRANSFORM.init(params)
    spec = {"w": PartitionSpec("x"), "b": PartitionSpec()}
    specs = (spec, (state[0]._replace(count=PartitionSpec(), mu=spec, nu=spec), *state[1:]))
    sharded = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(*specs, spec), out_specs=specs))
    carry = params, state
    for _ in range(3):
        carry = sharded(*carry, grads)
    assert_close(carry, expected(3))


@needs_eight
def test_pmap() -> None:
    params, grads = (jax.tree.map(lambda x: jnp.stack([x] * 8), tree) for tree in data())
    carry = params, jax.pmap(TRANSFORM.init)(params)
    for _ in range(3):
        carry = jax.pmap(step)(*carry, grads)
    assert_close(jax.tree.map(lambda x: x[7], carry), expected(3))


@needs_eight
@pytest.mark.skipif(not hasattr(jax, "set_mesh"), reason="this JAX has no jax.set_mesh")
def test_sharding_in_types() -> None:
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, PartitionSpec(None, "x"))
        params = {
            dtype: jax.device_put(jnp.ones((2, 8, 4), dtype), sharding) for dtype in ("float16", "float32", "complex64")
        }
        state = TRANSFORM.init(params)
        types = jax.tree.map(jax.typeof, state)
        assert types == jax.tree.map(jax.typeof, jax.jit(TRANSFORM.init)(params))
        for update in (TRANSFORM.update, jax.jit(TRANSFORM.update)):
            updates, after = update(params, state, params)
            assert jax.tree.map(jax.typeof, after) == types
            assert jax.tree.map(jax.typeof, updates) == jax.tree.map(jax.typeof, params)


@needs_eight
@pytest.mark.promise("bad input", backend="optax")
def test_arrays_on_two_devices_are_refused_and_nothing_has_changed() -> None:
    params, grads = data()
    first, second = jax.devices()[:2]
    params, state = jax.device_put((params, TRANSFORM.init(params)), first)
    before = jax.tree.map(np.array, (params, state))
    for wrong in ("grads", "state", "params"):
        trees = {"grads": grads, "state": state, "params": params}
        trees[wrong] = jax.device_put(trees[wrong], second)
        for update in (TRANSFORM.update, jax.jit(TRANSFORM.update)):
            with pytest.raises(ValueError, match="incompatible devices"):
                update(
                    jax.device_put(trees["grads"], second if wrong == "grads" else first),
                    trees["state"],
                    trees["params"],
                )
    assert jax.tree.all(jax.tree.map(np.array_equal, before, (params, state)))
    TRANSFORM.update(grads, state, params)
