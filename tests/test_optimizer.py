"""The functional core: what it returns, what it refuses, and that it leaves its arguments alone."""

import math
import pickle
from typing import Any, NamedTuple

import array_api_strict as strict
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch

from acprop_core import ACProp, State

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


@pytest.mark.parametrize(
    "dtype", ["float32", np.float32, np.dtype("float32"), jnp.float32, torch.float32, strict.float32]
)
def test_moment_dtype_is_known_by_its_name(dtype: Any) -> None:
    assert ACProp(moment_dtype=dtype).moment_dtype == "float32"


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf, -math.inf, np.float32(-1), np.asarray(math.nan)])
@pytest.mark.parametrize("name", ["learning_rate", "b1", "b2", "eps", "eps_root", "weight_decay", "clip_exponent"])
def test_numbers_out_of_range_are_refused(name: str, bad: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{name} is .*; give a number that is at least 0 and"):
        ACProp(**{name: bad})


@pytest.mark.parametrize("name", ["b1", "b2"])
@pytest.mark.parametrize("bad", [1, 1.0, 1.5])
def test_decay_rates_are_below_one(name: str, bad: float) -> None:
    with pytest.raises(ValueError, match=rf"^{name} is {bad}; .* below 1"):
        ACProp(**{name: bad})


@pytest.mark.parametrize("bad", ["0.1", True, [0.1], 1j, {}, np.array([0.1]), jnp.array([0.1]), torch.tensor(1)])
@pytest.mark.parametrize("name", ["learning_rate", "b2", "eps", "clip_exponent"])
def test_what_is_no_number_is_refused(name: str, bad: Any) -> None:
    with pytest.raises(TypeError, match=rf"^{name} is .*; give a number"):
        ACProp(**{name: bad})


def test_none_is_no_number() -> None:
    with pytest.raises(TypeError, match="b1 is None; give a number"):
        ACProp(b1=None)


@pytest.mark.parametrize("bad", ["Current", "none", None, 1])
def test_unknown_centering_is_refused(bad: Any) -> None:
    with pytest.raises(ValueError, match=r"centering is .*; give 'current' or 'previous'"):
        ACProp(centering=bad)


@pytest.mark.parametrize("bad", ["int32", "float8", "double", np.complex64, torch.int8])
def test_moment_dtype_must_be_a_float(bad: Any) -> None:
    with pytest.raises(ValueError, match=r"moment_dtype is .*; give one of float16, bfloat16, float32, float64"):
        ACProp(moment_dtype=bad)


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


@pytest.mark.parametrize("hyper", [np.float64(0.1), np.asarray(0.1), 0.1])
def test_hyperparameters_never_change_a_dtype(hyper: Any) -> None:
    for x in (np.ones(3, np.float32), torch.ones(3), jnp.ones(3), strict.ones(3, dtype=strict.float32)):
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


@pytest.mark.parametrize(
    ("value", "error"), [(math.nan, ValueError), (-1.0, ValueError), ("x", TypeError), (None, TypeError)]
)
def test_a_schedule_that_goes_wrong_is_named(value: Any, error: type[Exception]) -> None:
    optimizer = ACProp(lambda count: value)
    state = optimizer.init(np.ones(2))
    with pytest.raises(error, match=r"^learning_rate\(0\) is "):
        optimizer.update(np.ones(2), state)


@pytest.mark.parametrize("like", [np.asarray, jnp.asarray, strict.asarray, torch.as_tensor])
@pytest.mark.parametrize("dtype", ["int8", "int32", "int64"])
def test_an_array_count_stays_one_and_saturates(like: Any, dtype: str) -> None:
    if like is jnp.asarray and dtype == "int64":
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
    assert bool((updates == updates).all() if like is not strict.asarray else strict.all(updates == updates))


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


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        ({"a": True}, ValueError, "the mask lacks 'b'"),
        ({"a": True, "b": True, "c": True}, ValueError, "the mask has 'c', which the parameters lack"),
        ({"a": 1, "b": True}, TypeError, r"mask of 'a' is 1; give True \(decay\) or False"),
        ({"a": np.int8(1), "b": True}, TypeError, r"mask of 'a' is .*; give True \(decay\) or False"),
        (lambda params: 1, TypeError, r"mask of 'a' is 1"),
    ],
)
def test_bad_masks(mask: Any, error: type[Exception], message: str) -> None:
    params = {"a": np.ones(2), "b": np.ones(2)}
    optimizer = ACProp(weight_decay=0.1, mask=mask)
    state = optimizer.init(params)
    with pytest.raises(error, match=message):
        optimizer.update(params, state, params)


def test_a_mask_may_be_none_where_there_is_no_parameter() -> None:
    params = {"a": np.ones(1), "b": None}
    optimizer = ACProp(0.5, weight_decay=1.0, mask=lambda p: {"a": True, "b": None})
    updates, _ = optimizer.update({"a": np.zeros(1), "b": None}, optimizer.init(params), params)
    assert updates["a"].tolist() == [-0.5]


# bad input


def good() -> tuple[Any, State, Any]:
    params = {"layer1": {"weight": np.ones((4, 3)), "bias": np.ones(3)}}
    grads = {"layer1": {"weight": np.ones((4, 3)), "bias": np.ones(3)}}
    return grads, ACProp().init(params), params


def _replace(tree: Any, path: str, leaf: Any) -> Any:
    key, _, rest = path.partition(".")
    return {**tree, key: _replace(tree[key], rest, leaf) if rest else leaf}


BAD_LEAVES = [
    ("shape", np.ones((3, 4)), ValueError, r"{what} of 'layer1.weight' has shape \(3, 4\), its parameter \(4, 3\)"),
    ("int", np.ones((4, 3), np.int64), TypeError, r"{what} of 'layer1.weight' has dtype int64"),
    ("bool", np.ones((4, 3), bool), TypeError, r"{what} of 'layer1.weight' has dtype bool"),
    ("object", np.ones((4, 3), object), TypeError, r"{what} of 'layer1.weight' has dtype object"),
    ("complex", np.ones((4, 3), complex), TypeError, r"{what} of 'layer1.weight' has dtype complex128, .* real one"),
    (
        "torch",
        torch.ones(4, 3),
        TypeError,
        r"{what} of 'layer1.weight' is an array of torch, parameter .* numpy",
    ),
    ("jax", jnp.ones((4, 3)), TypeError, r"{what} of 'layer1.weight' is an array of jax.numpy, parameter .* of numpy"),
    ("list", [[1.0] * 3] * 4, ValueError, r"the container of {what}s at 'layer1.weight' is a container \(list\)"),
    ("float", 1.0, TypeError, r"{what} of 'layer1.weight' is a float \(1.0\), not an array"),
    ("string", "x", TypeError, r"{what} of 'layer1.weight' is a str \('x'\), not an array"),
    ("matrix", np.ones((4, 3)).view(np.matrix), TypeError, r"{what} of 'layer1.weight' is a matrix, whose arithmetic"),
    ("masked", np.ma.ones((4, 3)), TypeError, r"{what} of 'layer1.weight' is a MaskedArray, whose arithmetic"),
    ("dict", {"x": np.ones(1)}, ValueError, r"the container of {what}s at 'layer1.weight' is a container \(dict\)"),
]


@pytest.mark.parametrize(("leaf", "error", "message"), [x[1:] for x in BAD_LEAVES], ids=[x[0] for x in BAD_LEAVES])
@pytest.mark.parametrize("what", ["gradient", "first moment", "second moment", "update"])
def test_a_leaf_that_does_not_fit_is_named(what: str, leaf: Any, error: type[Exception], message: str) -> None:
    grads, state, params = good()
    bad = _replace(grads, "layer1.weight", leaf)
    call = {
        "gradient": lambda: ACProp().update(bad, state, params),
        "first moment": lambda: ACProp().update(grads, state._replace(mu=bad), params),
        "second moment": lambda: ACProp().update(grads, state._replace(nu=bad), params),
        "update": lambda: ACProp().apply(params, bad),
    }[what]
    with pytest.raises(error, match=message.format(what=what)):
        call()
    for tree in (grads, params):
        np.testing.assert_array_equal(tree["layer1"]["weight"], np.ones((4, 3)))
    assert state.count == 0
    np.testing.assert_array_equal(state.mu["layer1"]["weight"], np.zeros((4, 3)))


@pytest.mark.parametrize("dtype", [np.int32, bool, object, "U1", np.longdouble])
def test_parameters_must_be_floats(dtype: Any) -> None:
    with pytest.raises(TypeError, match=r"parameter 'a' has dtype .*; give one of float16, bfloat16, float32, float64"):
        ACProp().init({"a": np.ones(3, dtype)})


def test_parameters_of_two_libraries() -> None:
    with pytest.raises(TypeError, match=r"parameter 'b' is an array of torch, parameter 'a' one of numpy; convert one"):
        ACProp().init({"a": np.ones(3), "b": torch.ones(3)})


def test_a_missing_moment() -> None:
    grads, state, params = good()
    with pytest.raises(ValueError, match=r"first moment of 'layer1.bias' is None, its parameter an array; give both"):
        ACProp().update(grads, state._replace(mu=_replace(state.mu, "layer1.bias", None)), params)


def test_a_gradient_for_no_parameter() -> None:
    optimizer = ACProp()
    params = {"a": np.ones(2), "b": None}
    with pytest.raises(ValueError, match="gradient of 'b' is an array, its parameter None; give both or neither"):
        optimizer.update({"a": np.ones(2), "b": np.ones(2)}, optimizer.init(params), params)


@pytest.mark.parametrize(
    ("moment", "message"),
    [
        ("mu", "first moment of 'a' has dtype float64, its parameter complex128; give a complex one"),
        ("nu", "second moment of 'a' has dtype complex128"),
    ],
)
def test_moments_of_a_complex_parameter(moment: str, message: str) -> None:
    params = {"a": np.ones(2, complex)}
    state = ACProp().init(params)
    wrong = {"a": np.zeros(2, float if moment == "mu" else complex)}
    with pytest.raises(TypeError, match=message):
        ACProp().update(params, state._replace(**{moment: wrong}), params)


@pytest.mark.parametrize("state", [None, (0, {}, {}), {"count": 0}, {"layer1": {}}])
def test_what_is_no_state(state: Any) -> None:
    grads, _, params = good()
    with pytest.raises(TypeError, match=r"the state is a \w+; give the State that init or update returned"):
        ACProp().update(grads, state, params)


@pytest.mark.parametrize(
    ("hyper", "name"),
    [
        ({"learning_rate": jnp.float32(0.1)}, "learning_rate"),
        ({"learning_rate": lambda count: jnp.float32(0.1)}, "learning_rate"),
        ({"learning_rate": torch.tensor(0.1)}, "learning_rate"),
        ({"b2": jnp.float32(0.9)}, "b2"),
        ({"weight_decay": strict.asarray(0.1)}, "weight_decay"),
    ],
)
def test_hyperparameters_of_another_library_are_refused(hyper: dict[str, Any], name: str) -> None:
    grads, state, params = good()
    with pytest.raises(TypeError, match=rf"^{name} is an array of .*, the parameters are arrays of numpy; convert it"):
        ACProp(**hyper).update(grads, state, params)


def test_a_count_of_another_library_is_refused() -> None:
    grads, state, params = good()
    with pytest.raises(TypeError, match=r"\(state.count\) is an array of jax.numpy, the parameters are array"):
        ACProp().update(grads, state._replace(count=jnp.int32(0)), params)


def test_numbers_too_large_for_a_float() -> None:
    with pytest.raises(ValueError, match="eps is 1000.*; give a number that is at least 0 and finite"):
        ACProp(eps=10**400)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.complex64])
def test_a_limit_that_no_float_holds_is_none(dtype: Any) -> None:
    grad = np.full(2, 3.0, dtype)
    state = State(10_000, np.zeros(2, dtype), np.ones(2, np.zeros(1, dtype).real.dtype))
    updates, _ = ACProp(clip_exponent=100.0).update(grad, state)
    np.testing.assert_array_equal(updates, ACProp().update(grad, state)[0])


def test_decay_needs_the_parameters() -> None:
    grads, state, _ = good()
    with pytest.raises(ValueError, match=r"weight_decay is 0.1, which needs the parameters: call update\(grads"):
        ACProp(weight_decay=0.1).update(grads, state)


@pytest.mark.parametrize(
    ("count", "error"),
    [(-1, ValueError), (1.0, TypeError), (True, TypeError), (np.array([1]), TypeError), (None, TypeError)],
)
def test_bad_counts(count: Any, error: type[Exception]) -> None:
    grads, state, params = good()
    with pytest.raises(error, match=r"the step count \(state.count\) is"):
        ACProp().update(grads, state._replace(count=count), params)


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
    optimizer = ACProp(0.1, clip_exponent=0.25)
    state = State(3, torch.zeros(3), torch.full((3,), 1e-3))

    def update(grad: torch.Tensor) -> torch.Tensor:
        return optimizer.update(grad, state)[0]

    grads = torch.tensor([[1.0, -2.0, 0.1], [0.0, 0.5, 9.0]])
    together = torch.func.vmap(update)(grads)
    torch.testing.assert_close(together, torch.stack([update(g) for g in grads]), rtol=0, atol=0)
    derivative = torch.func.grad(lambda g: update(g).sum())(grads[1])
    assert derivative[2] == 0  # clipped
    assert (derivative[:2] < 0).all()
