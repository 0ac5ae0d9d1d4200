"""The functional core: what it returns, what it refuses, and that it leaves its arguments alone."""

import pickle
from typing import Any, NamedTuple

import array_api_strict as strict
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from acprop_core import ACProp, State

LIBRARIES = ("numpy", "jax.numpy", "array_api_strict", "torch")
G = np.random.default_rng(0).normal(size=(5, 2, 3))


class Layer(NamedTuple):
    weight: Any
    bias: Any


# hyperparameters


def test_optimizers_compare_hash_and_pickle() -> None:
    a = ACProp(1e-3, clip_exponent=0.25)
    b = ACProp(learning_rate=np.float64(1e-3), clip_exponent=np.float64(0.25))
    assert a == b
    assert hash(a) == hash(b)
    assert pickle.loads(pickle.dumps(a)) == a
    assert a != ACProp(1e-3)
    with pytest.raises(AttributeError):
        a.b1 = 0.5  # type: ignore[misc]


@pytest.mark.parametrize("kind", [float, np.float64, np.float32, np.asarray])
def test_numbers_become_floats(kind: Any) -> None:
    optimizer = ACProp(kind(0.5), b1=kind(0.5), weight_decay=kind(0.25))
    assert [type(x) for x in (optimizer.learning_rate, optimizer.b1, optimizer.weight_decay)] == [float] * 3


@pytest.mark.parametrize("library", LIBRARIES)
def test_moment_dtype_is_known_by_its_name(library: str) -> None:
    xp = pytest.importorskip(library)
    for dtype in ("float32", np.dtype("float32"), xp.float32):
        assert ACProp(moment_dtype=dtype).moment_dtype == "float32"


# state


@pytest.mark.parametrize(
    ("dtype", "mu", "nu"),
    [
        (np.float16, np.float32, np.float32),
        (ml_dtypes.bfloat16, np.float32, np.float32),
        (np.float32, np.float32, np.float32),
        (np.float64, np.float64, np.float64),
        (np.complex64, np.complex64, np.float32),
        (np.complex128, np.complex128, np.float64),
    ],
)
def test_moments_have_the_dtypes_of_the_design(dtype: Any, mu: Any, nu: Any) -> None:
    state = ACProp().init({"w": np.ones((2, 3), dtype)})
    assert state.count == 0
    for moment, expected in ((state.mu["w"], mu), (state.nu["w"], nu)):
        assert moment.dtype == expected
        np.testing.assert_array_equal(moment, np.zeros((2, 3)))


def test_moment_dtype_overrides() -> None:
    state = ACProp(moment_dtype="float64").init([np.ones(2, np.float32), np.ones(2, np.complex64)])
    assert [x.dtype for x in (*state.mu, *state.nu)] == [np.float64, np.complex128, np.float64, np.float64]


@pytest.mark.parametrize(
    ("moment_dtype", "dtype", "message"),
    [
        ("bfloat16", np.float32, "moment_dtype is 'bfloat16', in which numpy cannot keep the moments of float32"),
        ("float16", np.complex64, "moment_dtype is 'float16', in which numpy cannot keep the moments of complex64"),
    ],
)
def test_moment_dtype_that_the_library_lacks(moment_dtype: str, dtype: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        ACProp(moment_dtype=moment_dtype).init(np.ones(2, dtype))


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("hyper", [np.float64(0.1), np.asarray(0.1), 0.1])
def test_hyperparameters_never_change_a_dtype(hyper: Any, library: str) -> None:
    xp = pytest.importorskip(library)
    x = xp.ones(3, dtype=xp.float32)
    optimizer = ACProp(hyper, b1=hyper, b2=hyper, eps=hyper, weight_decay=hyper, clip_exponent=0.5)
    state = optimizer.init(x)
    for _ in range(2):
        updates, state = optimizer.update(x, state, x)
        assert {updates.dtype, state.mu.dtype, state.nu.dtype, optimizer.apply(x, updates).dtype} == {x.dtype}


def test_a_schedule_of_wide_numbers_keeps_the_dtype() -> None:
    optimizer = ACProp(lambda count: np.float64(0.1) / (count + 1))
    updates, _ = optimizer.update(np.ones(3, np.float32), optimizer.init(np.ones(3, np.float32)))
    assert updates.dtype == np.float32


def test_a_schedule_is_called_with_the_count() -> None:
    seen: list[Any] = []
    optimizer = ACProp(lambda count: seen.append(count) or 0.1)  # type: ignore[func-returns-value]
    state = optimizer.init(np.ones(2))
    for _ in range(3):
        _, state = optimizer.update(np.ones(2), state)
    assert seen == [0, 1, 2]
    assert [type(x) for x in seen] == [int] * 3


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("dtype", ["int8", "int32", "int64"])
def test_an_array_count_stays_one_and_saturates(library: str, dtype: str) -> None:
    like = pytest.importorskip(library).asarray
    if library == "jax.numpy" and dtype == "int64":
        pytest.skip("JAX without 64-bit mode has no int64")
    count = like(np.asarray(0, dtype))
    x = like(np.ones(2, np.float32))
    optimizer = ACProp(clip_exponent=0.25)
    state = optimizer.init(x)._replace(count=count)
    _, state = optimizer.update(x, state)
    assert (int(state.count), state.count.dtype, tuple(state.count.shape)) == (1, count.dtype, ())
    last = np.iinfo(dtype).max
    updates, state = optimizer.update(x, state._replace(count=like(np.asarray(last, dtype))))
    assert int(state.count) == last
    assert bool((updates == updates).all() if library != "array_api_strict" else strict.all(updates == updates))


def test_an_int_count_has_no_limit() -> None:
    optimizer = ACProp(clip_exponent=0.25)
    state = State(2**40, np.zeros(2), np.ones(2))
    updates, state = optimizer.update(np.ones(2), state)
    assert state.count == 2**40 + 1
    np.testing.assert_allclose(updates, -1e-3, rtol=1e-15)


# containers, masks, None


def test_containers_come_back_as_they_came() -> None:
    params = {"layers": [Layer(np.ones(2), np.zeros(1)), (np.ones(3), None)]}
    optimizer = ACProp()
    state = optimizer.init(params)
    updates, state = optimizer.update(params, state, params)
    params = optimizer.apply(params, updates)
    for tree in (updates, state.mu, state.nu, params):
        assert isinstance(tree["layers"][0], Layer)
        assert isinstance(tree["layers"][1], tuple)
        assert tree["layers"][1][1] is None


def test_a_gradient_of_none_leaves_its_leaf_alone() -> None:
    params = {"a": np.ones(2), "b": np.ones(2)}
    optimizer = ACProp()
    state = optimizer.init(params)
    _, state = optimizer.update(params, state)
    updates, after = optimizer.update({"a": None, "b": np.ones(2)}, state)
    assert updates["a"] is None
    assert after.mu["a"] is state.mu["a"]
    assert after.nu["a"] is state.nu["a"]
    assert after.mu["b"] is not state.mu["b"]
    assert optimizer.apply(params, updates)["a"] is params["a"]


def test_nothing_to_do() -> None:
    for params in ({}, [], {"a": None}):
        optimizer = ACProp(weight_decay=0.1)
        updates, state = optimizer.update(params, optimizer.init(params), params)
        assert (updates, state) == (params, State(1, params, params))


@pytest.mark.parametrize("shape", [(), (0,), (2, 0), (1,)])
def test_arrays_stay_arrays(shape: tuple[int, ...]) -> None:
    x = np.ones(shape, np.float32)
    optimizer = ACProp(weight_decay=0.1, clip_exponent=0.25)
    state = optimizer.init(x)
    for _ in range(2):
        updates, state = optimizer.update(x, state, x)
        for result in (updates, state.mu, state.nu, optimizer.apply(x, updates)):
            assert type(result) is np.ndarray
            assert (result.shape, result.dtype) == (shape, np.float32)


@pytest.mark.parametrize("optimizer", [ACProp(), ACProp(b2=jnp.float32(0.9))])
def test_nothing_to_do_while_traced(optimizer: ACProp) -> None:
    updates, state = jax.jit(optimizer.update)({}, optimizer.init({}), {})
    assert updates == {}
    assert int(state.count) == 1


def test_masks_are_read_as_prefixes() -> None:
    params = {"a": [np.ones(2), np.ones(2)], "b": np.ones(2)}
    zeros = {"a": [np.zeros(2), np.zeros(2)], "b": np.zeros(2)}
    for mask in ({"a": [True, True], "b": False}, {"a": True, "b": np.bool_(False)}, lambda p: {"a": True, "b": False}):
        optimizer = ACProp(0.5, weight_decay=0.5, mask=mask)
        updates, _ = optimizer.update(zeros, optimizer.init(params), params)
        np.testing.assert_array_equal(updates["a"][1], [-0.25, -0.25])
        np.testing.assert_array_equal(updates["b"], [0.0, 0.0])


def test_a_mask_may_be_none_where_there_is_no_parameter() -> None:
    params = {"a": np.ones(1), "b": None}
    optimizer = ACProp(0.5, weight_decay=1.0, mask=lambda p: {"a": True, "b": None})
    updates, _ = optimizer.update({"a": np.zeros(1), "b": None}, optimizer.init(params), params)
    assert updates["a"].tolist() == [-0.5]


# bad input


@pytest.mark.parametrize(
    ("moment", "message"),
    [
        ("mu", "first moment of 'a' has dtype float64, its parameter complex128; use a complex dtype"),
        ("nu", "second moment of 'a' has dtype complex128"),
    ],
)
def test_moments_of_a_complex_parameter(moment: str, message: str) -> None:
    params = {"a": np.ones(2, complex)}
    state = ACProp().init(params)
    wrong = {"a": np.zeros(2, float if moment == "mu" else complex)}
    with pytest.raises(TypeError, match=message):
        ACProp().update(params, state._replace(**{moment: wrong}), params)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.complex64])
def test_a_limit_that_no_float_holds_is_none(dtype: Any) -> None:
    grad = np.full(2, 3.0, dtype)
    state = State(10_000, np.zeros(2, dtype), np.ones(2, np.zeros(1, dtype).real.dtype))
    updates, _ = ACProp(clip_exponent=100.0).update(grad, state)
    np.testing.assert_array_equal(updates, ACProp().update(grad, state)[0])


# JAX: one compilation, vmap, and a carry that keeps its types


def test_jit_compiles_once() -> None:
    traces = []
    optimizer = ACProp(clip_exponent=0.25)

    @jax.jit
    def step(grads: Any, state: State, params: Any) -> Any:
        traces.append(1)
        updates, state = optimizer.update(grads, state, params)
        return optimizer.apply(params, updates), state

    params = {"w": jnp.ones((2, 3))}
    state = optimizer.init(params)
    for grad in G:
        params, state = step({"w": jnp.asarray(grad)}, state, params)
    assert len(traces) == 1
    assert int(state.count) == len(G)


def test_vmap_over_hyperparameters_equals_a_loop() -> None:
    rates = jnp.array([0.1, 0.01]), jnp.array([0.0, 0.75]), jnp.array([0.25, 0.9375])

    def run(lr: Any, b1: Any, b2: Any) -> Any:
        optimizer = ACProp(lr, b1=b1, b2=b2)
        params = jnp.ones((2, 3))
        state = optimizer.init(params)
        for grad in G:
            updates, state = optimizer.update(jnp.asarray(grad, jnp.float32), state)
            params = optimizer.apply(params, updates)
        return params

    together = jax.vmap(run)(*rates)
    for i in range(2):
        alone = run(*(float(r[i]) for r in rates))
        assert jnp.abs(together[i] - alone).max() <= 4 * jnp.finfo(jnp.float32).eps * jnp.abs(alone).max()


def test_vmap_over_the_state() -> None:
    optimizer = ACProp(clip_exponent=0.25)
    grads = jnp.asarray(G, jnp.float32)
    states = State(jnp.arange(5, dtype=jnp.int32), jnp.zeros_like(grads), jnp.full_like(grads, 0.5))
    updates, after = jax.vmap(optimizer.update)(grads, states)
    np.testing.assert_array_equal(after.count, np.arange(1, 6))
    for i in range(5):
        alone, _ = optimizer.update(grads[i], State(i, states.mu[i], states.nu[i]))
        assert jnp.abs(updates[i] - alone).max() <= 4 * jnp.finfo(jnp.float32).eps * jnp.abs(alone).max()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "complex64"])
def test_scan_keeps_the_types_of_its_carry(dtype: str) -> None:
    optimizer = ACProp(halving, weight_decay=0.1, clip_exponent=0.25)
    params = jnp.ones((2, 3), dtype)

    def step(carry: Any, grad: Any) -> Any:
        params, state = carry
        updates, state = optimizer.update(grad, state, params)
        return (optimizer.apply(params, updates), state), None

    (params, state), _ = jax.lax.scan(step, (params, optimizer.init(params)), jnp.asarray(G, dtype))
    assert params.dtype == jnp.dtype(dtype)
    assert int(state.count) == len(G)


def halving(count: Any) -> Any:
    return 0.1 * jnp.power(0.5, count)


# torch


def test_torch_func_sees_through_the_update() -> None:
    torch = pytest.importorskip("torch")
    optimizer = ACProp(0.1, clip_exponent=0.25)
    state = State(3, torch.zeros(3), torch.full((3,), 1e-3))

    def update(grad: Any) -> Any:
        return optimizer.update(grad, state)[0]

    grads = torch.tensor([[1.0, -2.0, 0.1], [0.0, 0.5, 9.0]])
    together = torch.func.vmap(update)(grads)
    torch.testing.assert_close(together, torch.stack([update(g) for g in grads]), rtol=0, atol=0)
    derivative = torch.func.grad(lambda g: update(g).sum())(grads[1])
    assert derivative[2] == 0  # clipped
    assert (derivative[:2] < 0).all()
