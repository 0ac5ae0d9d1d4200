"""The optax adapter in the libraries that its users train with: flax, equinox, and orbax for checkpoints."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

from acprop_optax import acprop

X = jnp.sin(jnp.arange(24.0)).reshape(8, 3)
Y = jnp.cos(X @ jnp.array([1.0, -2.0, 0.5]))[:, None]


def transform() -> optax.GradientTransformation:
    return acprop(optax.linear_schedule(3e-2, 1e-2, 100), weight_decay=1e-3, clip_exponent=0.25)


def assert_same(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert (x.dtype, x.sharding) == (y.dtype, y.sharding)
        assert (x == y).all()


def mean_square(predict: Callable[[jax.Array], jax.Array]) -> jax.Array:
    return ((predict(X) - Y) ** 2).mean()


def test_flax_train_state() -> None:
    linen = pytest.importorskip("flax.linen")
    from flax.training.train_state import TrainState

    model = linen.Sequential([linen.Dense(16), linen.tanh, linen.Dense(1)])
    state = TrainState.create(apply_fn=model.apply, params=model.init(jax.random.key(0), X), tx=transform())

    @jax.jit
    def step(state: Any) -> Any:
        loss, grads = jax.value_and_grad(lambda p: mean_square(lambda x: state.apply_fn(p, x)))(state.params)
        return state.apply_gradients(grads=grads), loss

    losses = []
    for _ in range(100):
        state, loss = step(state)
        losses.append(float(loss))
    assert losses[-1] < losses[0] / 20
    assert state.opt_state[0].count == state.step == 100


def test_flax_nnx_optimizer() -> None:
    nnx = pytest.importorskip("flax.nnx")
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(
        nnx.Linear(3, 16, rngs=rngs), nnx.tanh, nnx.Dropout(0.0, rngs=rngs), nnx.Linear(16, 1, rngs=rngs)
    )
    optimizer = nnx.Optimizer(model, transform(), wrt=nnx.Param)

    @nnx.jit
    def step(model: Any, optimizer: Any) -> Any:
        loss, grads = nnx.value_and_grad(mean_square)(model)
        optimizer.update(model, grads)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(100)]
    assert losses[-1] < losses[0] / 20
    assert optimizer.step[...] == 100


def test_equinox() -> None:
    equinox = pytest.importorskip("equinox")
    model = equinox.nn.MLP(3, 1, 16, 1, activation=jnp.tanh, key=jax.random.key(0))
    tx = transform()
    state = tx.init(equinox.filter(model, equinox.is_inexact_array))

    @equinox.filter_jit
    def step(model: Any, state: Any) -> Any:
        loss, grads = equinox.filter_value_and_grad(lambda m: mean_square(jax.vmap(m)))(model)
        updates, state = tx.update(grads, state, equinox.filter(model, equinox.is_inexact_array))
        return equinox.apply_updates(model, updates), state, loss

    losses = []
    for _ in range(100):
        model, state, loss = step(model, state)
        losses.append(float(loss))
    assert losses[-1] < losses[0] / 20


def test_equinox_gives_none_for_what_is_frozen() -> None:
    equinox = pytest.importorskip("equinox")
    model = equinox.nn.MLP(3, 1, 16, 1, activation=jnp.tanh, key=jax.random.key(0))
    params, static = equinox.partition(model, equinox.is_inexact_array)
    tx = acprop(1e-2, weight_decay=0.1, clip_exponent=0.25)
    state = tx.init(params)
    grads = jax.grad(lambda p: mean_square(jax.vmap(equinox.combine(p, static))))(params)
    frozen = equinox.tree_at(lambda m: m.layers[0].weight, grads, None)
    updates, after = jax.jit(tx.update)(frozen, state, params)
    moved = equinox.apply_updates(params, updates)
    assert (moved.layers[0].weight == params.layers[0].weight).all()
    assert (moved.layers[1].weight != params.layers[1].weight).any()
    assert (after[0].nu.layers[0].weight == 0).all()


MASK = {"mask": lambda params: jax.tree.map(lambda x: x.ndim > 1, params)}


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}, {"weight_decay": 0.1, **MASK}], ids=len)
@pytest.mark.parametrize("frozen", [False, True])
def test_equinox_with_the_whole_module_as_params(options: dict[str, Any], frozen: bool) -> None:
    equinox = pytest.importorskip("equinox")
    model = equinox.nn.MLP(3, 1, 16, 1, activation=jnp.tanh, key=jax.random.key(0))
    chosen = jax.tree.map(equinox.is_inexact_array, model)
    if frozen:  # no moments, and no gradient
        chosen = equinox.tree_at(lambda m: m.layers[0].weight, chosen, False)
    params, static = equinox.partition(model, chosen)
    grads = jax.grad(lambda p: mean_square(jax.vmap(equinox.combine(p, static))))(params)
    if "mask" not in options:  # whose tree optax.masked compares with the module's
        for theirs in (optax.adamw(1e-2, **options), optax.contrib.acprop(1e-2, **options)):
            theirs.update(grads, theirs.init(params), model)
    tx = acprop(1e-2, clip_exponent=0.25, **options)
    whole, part = (tx.update(grads, tx.init(params), given) for given in (model, params))
    assert_same(whole, part)
    compiled = equinox.filter_jit(tx.update)(grads, tx.init(params), model)
    assert jax.tree.structure(compiled) == jax.tree.structure(part)
    assert whole[0].activation is None
    assert (whole[0].layers[0].weight is None) == frozen
    moved = equinox.apply_updates(model, whole[0])
    assert moved.activation is jnp.tanh
    assert (moved.layers[0].weight == model.layers[0].weight).all() == frozen


def test_equinox_with_moments_of_all_arrays() -> None:
    equinox = pytest.importorskip("equinox")

    class Counting(equinox.Module):  # type: ignore[misc, name-defined]
        linear: Any
        steps: jax.Array
        key: jax.Array
        name: str

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.linear(x)

    model = Counting(equinox.nn.Linear(3, 1, key=jax.random.key(0)), jnp.arange(3), jax.random.key(1), "a")
    grads = equinox.filter_grad(lambda m: mean_square(jax.vmap(m)))(model)
    for tx in (optax.adamw(1e-2), acprop(1e-2, weight_decay=0.1)):
        state = tx.init(equinox.filter(model, equinox.is_array))  # integers and keys among them
        assert state[0].mu.steps.dtype == jnp.int32
    updates, after = tx.update(grads, state, model)
    assert updates.steps is updates.key is updates.name is None
    assert (updates.linear.weight != 0).all()
    assert jax.tree.structure(after) == jax.tree.structure(state)
    equinox.apply_updates(model, updates)


def test_flax_with_frozen_parameters_and_other_leaves() -> None:
    linen = pytest.importorskip("flax.linen")
    model = linen.Sequential([linen.Dense(16), linen.tanh, linen.Dense(1)])
    params = model.init(jax.random.key(0), X)["params"]
    trained = {"layers_0": None, "layers_2": params["layers_2"], "activation": None}
    grads = {
        **trained,
        "layers_2": jax.grad(lambda p: mean_square(lambda x: model.apply({"params": {**params, "layers_2": p}}, x)))(
            params["layers_2"]
        ),
    }
    tx = acprop(1e-2, weight_decay=0.1, **MASK)
    updates, _ = tx.update(grads, tx.init(trained), {**params, "activation": "tanh"})
    assert updates["layers_0"] is updates["activation"] is None
    assert (updates["layers_2"]["kernel"] != 0).all()


def test_haiku_with_frozen_parameters() -> None:
    haiku = pytest.importorskip("haiku")
    net = haiku.without_apply_rng(haiku.transform(lambda x: haiku.nets.MLP([16, 1])(x)))
    params = net.init(jax.random.key(0), X)
    frozen, trained = haiku.data_structures.partition(lambda module, name, x: "linear_0" in module, params)
    grads = jax.grad(lambda p: mean_square(lambda x: net.apply(haiku.data_structures.merge(frozen, p), x)))(trained)
    absent = dict.fromkeys(frozen)
    tx = acprop(1e-2, weight_decay=0.1)
    updates, _ = tx.update({**grads, **absent}, tx.init({**trained, **absent}), params)
    assert all(updates[module] is None for module in frozen)
    assert all((x != 0).any() for x in jax.tree.leaves(updates))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_orbax_saves_and_restores(tmp_path: Path, dtype: str) -> None:
    checkpoint = pytest.importorskip("orbax.checkpoint")
    tx = optax.inject_hyperparams(acprop)(optax.linear_schedule(0.1, 0.0, 10), weight_decay=0.1, clip_exponent=0.25)
    params = {"w": jnp.ones((4, 3), dtype), "b": [jnp.zeros(3, dtype)]}
    step = jax.jit(tx.update)

    def train(params: Any, state: Any) -> Any:
        for i in range(3):
            updates, state = step(jax.tree.map(lambda p, i=i: jnp.sin(p + i + 1), params), state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    saved = train(params, tx.init(params))
    with checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "step_3", saved)
        checkpointer.wait_until_finished()
        like = jax.eval_shape(lambda p: (p, tx.init(p)), params)
        restored = checkpointer.restore(tmp_path / "step_3", like)
    assert_same(train(*restored), train(*saved))


def test_orbax_restores_what_optax_wrote(tmp_path: Path) -> None:
    checkpoint = pytest.importorskip("orbax.checkpoint")
    params = {"w": jnp.ones((4, 3)), "b": [jnp.zeros(3)]}
    theirs, ours = optax.contrib.acprop(1e-2), acprop(1e-2, clip_exponent=0.25, centering="previous")
    _, written = theirs.update(params, theirs.init(params), params)
    with checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", written)
        checkpointer.wait_until_finished()
        state = checkpointer.restore(tmp_path / "state", jax.eval_shape(ours.init, params))
    assert_same(state, written)
    updates, state = ours.update(params, state, params)
    assert state[0].count == 2
    assert (updates["w"] < 0).all()
