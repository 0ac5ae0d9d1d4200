"""JAX on eight virtual CPU devices, and in two processes: nothing is sent that need not be, and no bit changes.

For the optax adapter and the functional core alike.
"""

import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from acprop_core import ACProp
from acprop_optax import acprop

PARTNER = "ACPROP_TEST_PROCESS"  # which of two processes this is, and the port at which they meet
EIGHT = PARTNER not in os.environ and jax.device_count() == 8  # two processes must meet before they count devices
needs_eight = pytest.mark.skipif(not EIGHT, reason="runs in the process of test_on_eight_devices")
TRANSFORM = acprop(0.1, weight_decay=0.1, clip_exponent=0.25)
CORE = ACProp(0.1, weight_decay=0.1, clip_exponent=0.25)


class Host(NamedTuple):
    """An optimizer by its `init`, and by what makes (params, state, grads) into the next (params, state)."""

    init: Callable[[Any], Any]
    step: Callable[[Any, Any, Any], Any]


def step(params: Any, state: Any, grads: Any) -> Any:
    updates, state = TRANSFORM.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def core_init(params: Any) -> Any:
    return CORE.init(params)._replace(count=jnp.int32(0))


def core_step(params: Any, state: Any, grads: Any) -> Any:
    updates, state = CORE.update(grads, state, params)
    return CORE.apply(params, updates), state


HOSTS = {"optax": Host(TRANSFORM.init, step), "core": Host(core_init, core_step)}
both_hosts = pytest.mark.parametrize("host", HOSTS.values(), ids=HOSTS)


def virtual_devices(count: int, **env: str) -> dict[str, str]:
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
    return {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", **env}


@pytest.mark.skipif(EIGHT, reason="this is the process of test_on_eight_devices")
def test_on_eight_devices() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", __file__],
        env=virtual_devices(8),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout
    assert re.search(r"\b[1-9]\d* passed", result.stdout), result.stdout


def data() -> tuple[Any, Any]:
    params = {"w": jnp.linspace(-1.0, 1.0, 64 * 16).reshape(64, 16), "b": jnp.ones(16)}
    return params, jax.tree.map(jnp.sin, params)


def expected(steps: int, host: Host = HOSTS["optax"]) -> Any:
    params, grads = data()
    carry = params, host.init(params)
    for _ in range(steps):
        carry = jax.jit(host.step)(*carry, grads)
    return carry


def assert_same_bits(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def moments(state: Any) -> list[Any]:
    """Return the moments of either host's state, in the order of the parameters."""
    state = state if hasattr(state, "mu") else state[0]
    return [state.mu, state.nu]


def collectives(compiled: Any) -> list[str]:
    """Return what a compiled program sends, as "all-gather f32[64,16]", sorted."""
    kinds = r"all-gather|all-reduce|reduce-scatter|(?:ragged-)?all-to-all|collective-\w+|send|recv"
    found = re.findall(rf"= \(?(\w+\[[\d,]*\]).*? ({kinds})(?:-start)?\(", compiled.as_text())
    return sorted(f"{kind} {shape}" for shape, kind in found)


def mesh_of(*sizes: int) -> jax.sharding.Mesh:
    axes = ("x", "y")[: len(sizes)]
    devices = jax.devices()[: int(np.prod(sizes))]
    return jax.make_mesh(sizes, axes, axis_types=(AxisType.Auto,) * len(sizes), devices=devices)


def shardings_on(mesh: jax.sharding.Mesh) -> Any:
    last = mesh.axis_names[-1]
    rows = PartitionSpec(*mesh.axis_names) if len(mesh.axis_names) == 2 else PartitionSpec(last)
    return {"w": NamedSharding(mesh, rows), "b": NamedSharding(mesh, PartitionSpec(last))}


@needs_eight
def test_what_is_sent_can_be_seen() -> None:
    mesh = mesh_of(8)
    x = jax.device_put(jnp.ones((64, 16)), NamedSharding(mesh, PartitionSpec("x")))
    whole = NamedSharding(mesh, PartitionSpec())

    def seen(f: Any, where: Any = whole) -> list[str]:
        return collectives(jax.jit(f, out_shardings=where).lower(x).compile())

    assert seen(lambda x: x) == ["all-gather f32[64,16]"]
    assert seen(lambda x: x.sum()) == ["all-reduce f32[]"]
    assert seen(lambda x: jnp.roll(x, 1, 0), x.sharding)[0].startswith("collective-permute")
    assert seen(lambda x: x.T, x.sharding)[0].startswith("all-to-all")
    assert not seen(lambda x: x + x, x.sharding)


@needs_eight
@both_hosts
@pytest.mark.parametrize("donate", [(), (0, 1)])
@pytest.mark.parametrize("axes", [AxisType.Auto, AxisType.Explicit])
def test_named_sharding(host: Host, axes: AxisType, donate: tuple[int, ...]) -> None:
    shardings = shardings_on(jax.make_mesh((4, 2), ("x", "y"), axis_types=(axes, axes)))
    params, grads = jax.device_put(data(), (shardings, shardings))
    state = host.init(params)
    compiled = jax.jit(host.step, donate_argnums=donate).lower(params, state, grads).compile()
    assert not collectives(compiled)
    carry = params, state
    for _ in range(3):
        for moment in moments(carry[1]):
            for name, x in moment.items():
                assert x.sharding.is_equivalent_to(shardings[name], x.ndim)
        carry = compiled(*carry, grads)
    assert_same_bits(carry, expected(3, host))


@needs_eight
@both_hosts
@pytest.mark.skipif(not hasattr(jax, "shard_map"), reason="this JAX has no jax.shard_map")
def test_shard_map(host: Host) -> None:
    mesh = mesh_of(4, 2)
    params, grads = data()
    state = host.init(params)
    spec = {name: sharding.spec for name, sharding in shardings_on(mesh).items()}
    state_spec = jax.tree.map(lambda _: PartitionSpec(), state)
    if isinstance(state, tuple) and not hasattr(state, "mu"):
        state_spec = (state_spec[0]._replace(mu=spec, nu=spec), *state_spec[1:])
    else:
        state_spec = state_spec._replace(mu=spec, nu=spec)
    sharded = jax.jit(
        jax.shard_map(host.step, mesh=mesh, in_specs=(spec, state_spec, spec), out_specs=(spec, state_spec))
    )
    carry = params, state
    for _ in range(3):
        carry = sharded(*carry, grads)
    assert not collectives(sharded.lower(*carry, jax.device_put(grads, shardings_on(mesh))).compile())
    assert_same_bits(carry, expected(3, host))


def zero(host: Host, mesh: jax.sharding.Mesh, params: Any, grads: Any, sharded_grads: bool) -> tuple[Any, Any, Any]:
    """Return ZeRO's step, compiled, its (params, state), and its gradients: parameters whole on every device, moments
    in as many parts as there are devices; gradients whole (ZeRO-1) or in the same parts (ZeRO-2)."""
    parts = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    whole = NamedSharding(mesh, PartitionSpec())
    state = host.init(jax.device_put(params, parts))
    where = jax.tree.map(lambda x: parts if x.ndim else whole, state)
    carry = jax.device_put(params, whole), jax.device_put(state, where)
    grads = jax.device_put(grads, parts if sharded_grads else whole)
    compiled = jax.jit(host.step, out_shardings=(whole, where)).lower(*carry, grads).compile()
    return compiled, carry, grads


@needs_eight
@both_hosts
@pytest.mark.parametrize("sharded_grads", [False, True], ids=["ZeRO-1", "ZeRO-2"])
def test_zero(host: Host, sharded_grads: bool) -> None:
    mesh = mesh_of(4, 2)
    params, grads = data()
    compiled, carry, grads = zero(host, mesh, params, grads, sharded_grads)
    # what each device has made new of the parameters must reach the others; nothing else is sent
    assert collectives(compiled) == ["all-gather f32[16]", "all-gather f32[64,16]"]
    for _ in range(3):
        carry = compiled(*carry, grads)
        for moment in moments(carry[1]):
            assert [x.addressable_shards[0].data.size * 8 for x in moment.values()] == [x.size for x in moment.values()]
    assert_same_bits(carry, expected(3, host))


@needs_eight
@pytest.mark.parametrize("sharded_grads", [False, True], ids=["ZeRO-1", "ZeRO-2"])
@pytest.mark.parametrize("name", HOSTS)
def test_zero_never_sends_a_moment(name: str, sharded_grads: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # moments of another dtype than the parameters', so that what is sent can be told apart
    monkeypatch.setitem(globals(), "TRANSFORM", acprop(0.1, clip_exponent=0.25, moment_dtype="float64"))
    monkeypatch.setitem(globals(), "CORE", ACProp(0.1, clip_exponent=0.25, moment_dtype="float64"))
    with jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64():
        host = Host(TRANSFORM.init, step) if name == "optax" else HOSTS["core"]
        params, grads = jax.tree.map(lambda x: x.astype("float32"), data())
        compiled, carry, grads = zero(host, mesh_of(4, 2), params, grads, sharded_grads)
        assert {x.dtype.name for moment in moments(carry[1]) for x in moment.values()} == {"float64"}
        assert collectives(compiled) == ["all-gather f32[16]", "all-gather f32[64,16]"]


@needs_eight
@both_hosts
@pytest.mark.parametrize("sizes", [(2, 2), (8,)], ids=["2x2", "8"])
def test_orbax_saves_on_one_mesh_and_restores_on_another(host: Host, sizes: tuple[int, ...], tmp_path: Path) -> None:
    checkpoint = pytest.importorskip("orbax.checkpoint")

    def train(carry: Any, grads: Any, steps: int) -> Any:
        for _ in range(steps):
            carry = jax.jit(host.step)(*carry, grads)
        return carry

    before, after = shardings_on(mesh_of(4, 2)), shardings_on(mesh_of(*sizes))
    params, grads = jax.device_put(data(), (before, before))
    saved = train((params, host.init(params)), grads, 3)

    like = jax.eval_shape(lambda p: (p, host.init(p)), params)
    whole = NamedSharding(after["w"].mesh, PartitionSpec())

    def placed(path: Any, x: Any) -> Any:
        sharding = after[path[-1].key] if x.ndim else whole
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    with checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "step_3", saved)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "step_3", jax.tree_util.tree_map_with_path(placed, like))
    for moment in moments(restored[1]):
        assert {name: x.sharding for name, x in moment.items()} == after
    assert_same_bits(train(restored, jax.device_put(data()[1], after), 3), train(saved, grads, 3))


@needs_eight
def test_pmap() -> None:
    params, grads = (jax.tree.map(lambda x: jnp.stack([x] * 8), tree) for tree in data())
    carry = params, jax.pmap(TRANSFORM.init)(params)
    for _ in range(3):
        carry = jax.pmap(step)(*carry, grads)
    assert_same_bits(jax.tree.map(lambda x: x[7], carry), expected(3))


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


@pytest.mark.skipif(EIGHT, reason="has processes of its own")
@pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="gloo aborts in jaxlib 0.6.0")
def test_two_processes() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, __file__],
            env=virtual_devices(4, **{PARTNER: f"{i} {port}"}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]
    try:
        printed = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for i, (process, text) in enumerate(zip(processes, printed, strict=True)):
        assert process.returncode == 0, text
        assert f"process {i} of 2: same bits on 8 devices" in text


@pytest.mark.skipif(EIGHT, reason="has a process of its own")
def test_the_example_goes_on_on_another_mesh() -> None:
    for module in ("orbax.checkpoint", "sklearn", "matplotlib", "tqdm"):
        pytest.importorskip(module)
    script = Path(__file__).parents[1] / "docs" / "examples" / "scale_jax.py"
    run = [sys.executable, script, "--steps", "60"]
    result = subprocess.run(run, capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    sizes = re.findall(r"step   60  accuracy 0[.]\d+  moments on a device: +([\d,]+) of ([\d,]+) bytes", result.stdout)
    assert sizes == [("4,880", "38,480"), ("9,680", "38,480")]


def one_of_two_processes(index: int, port: int) -> None:
    """Train on the mesh of both processes, sharded and in ZeRO's way, and compare with a run of this process alone."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, index, initialization_timeout=60)
    assert (jax.process_count(), jax.device_count(), jax.local_device_count()) == (2, 8, 4)
    mesh = mesh_of(4, 2)
    for host in HOSTS.values():
        alone = expected(3, host)
        shardings = shardings_on(mesh)
        params, grads = jax.device_put(data(), (shardings, shardings))
        compiled = jax.jit(host.step).lower(params, state := jax.jit(host.init)(params), grads).compile()
        assert not collectives(compiled)
        for way, carry, grad in (
            (compiled, (params, state), grads),
            zero(host, mesh, *data(), sharded_grads=True),
        ):
            for _ in range(3):
                carry = way(*carry, grad)
            for x, y in zip(jax.tree.leaves(carry), jax.tree.leaves(alone), strict=True):
                for shard in x.addressable_shards:
                    assert np.asarray(shard.data).tobytes() == np.asarray(y)[shard.index].tobytes()
    print(f"process {index} of 2: same bits on 8 devices")
    jax.distributed.shutdown()


if __name__ == "__main__":
    one_of_two_processes(*map(int, os.environ[PARTNER].split()))
