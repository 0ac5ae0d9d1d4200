"""The functional core: what it returns, what it refuses, and that it leaves its arguments alone."""

import pickle
import re
import warnings
from typing import Any, NamedTuple

import array_api_strict as strict
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from acprop_core import ACProp, State
from acprop_core._checks import check_carry
from acprop_core.adapt import with_values
from acprop_core.checkpoint import to_numpy

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


@pytest.mark.parametrize(
    "dtype",
    ["float16", "float32", "float64", "longdouble", "int8", "uint8", "int64"]
    + [f"ml_dtypes.{name}" for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2", "int4")],
)
@pytest.mark.parametrize("enter", [lambda x: x, np.asarray], ids=["scalar", "array"])
def test_a_hyperparameter_may_be_a_number_of_any_real_dtype(enter: Any, dtype: str) -> None:
    module, _, name = dtype.rpartition(".")
    kind = getattr(ml_dtypes if module else np, name)
    zero, one = enter(kind(0)), enter(kind(1))
    options = ACProp(one, eps=one, weight_decay=one, clip_exponent=one, b2=zero)
    assert [type(x) for x in (options.learning_rate, options.eps, options.clip_exponent)] == [float] * 3
    assert options == ACProp(1.0, eps=1.0, weight_decay=1.0, clip_exponent=1.0, b2=0.0)
    x = np.ones(3, np.float32)
    scheduled = ACProp(lambda count: one, weight_decay=lambda count: one)
    expected = ACProp(1.0, weight_decay=1.0)
    for a, b in zip(*(o.update(x, o.init(x), x)[0] for o in (scheduled, expected)), strict=True):
        assert a == b


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8", "uint8", "int32"])
@pytest.mark.parametrize("library", ["jax.numpy", "torch"])
def test_an_array_of_any_real_dtype_is_as_good_as_a_number(library: str, dtype: str) -> None:
    xp = pytest.importorskip(library)
    x = xp.ones(3, dtype=xp.float32)
    one = xp.asarray(1, dtype=getattr(xp, dtype))
    zero = xp.asarray(0, dtype=getattr(xp, dtype))
    for option in (one, lambda count: one):
        a, b = (
            ACProp(option, b1=zero, eps=one, weight_decay=option, clip_exponent=0.5),
            ACProp(1.0, b1=0.0, eps=1.0, weight_decay=1.0, clip_exponent=0.5),
        )
        results = [o.update(x, o.init(x), x)[0] for o in (a, b)]
        assert results[0].dtype == xp.float32
        assert bool((results[0] == results[1]).all())


def test_sixteen_bits_of_a_decay_rate_are_widened_before_they_are_used() -> None:
    b2 = jnp.asarray(0.999, jnp.float16)
    got, expected = (
        ACProp(b2=x, clip_exponent=0.25).update(jnp.ones(3), ACProp().init(jnp.ones(3))) for x in (b2, float(b2))
    )
    np.testing.assert_allclose(got[1].nu, expected[1].nu, rtol=1e-6)


# values of schedules


@pytest.mark.parametrize("name", ["learning_rate", "weight_decay"])
def test_a_constructor_refuses_a_negative_number_and_a_schedule_does_not(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is -0.5; use a number that is at least 0 and finite"):
        ACProp(**{name: -0.5})
    x = np.ones(3)
    optimizer = ACProp(**{"learning_rate": 0.1, name: lambda count: -0.5})
    update, _ = optimizer.update(x, optimizer.init(x), x)
    np.testing.assert_allclose(update, 0.5 if name == "learning_rate" else -0.05)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["learning_rate", "weight_decay"])
def test_a_schedule_that_is_not_finite_is_named_with_its_count(name: str, value: float) -> None:
    optimizer = ACProp(**{name: lambda count: value if count == 1 else 0.1})
    x = np.ones(3)
    _, state = optimizer.update(x, optimizer.init(x), x)
    with pytest.raises(ValueError, match=re.escape(f"{name}(1) is {value}; use a finite number")):
        optimizer.update(x, state, x)


def test_values_of_a_schedule_can_be_recorded() -> None:
    optimizer = ACProp(1e-3, b1=0.8)
    record = with_values(optimizer, learning_rate=-1.5e-20, weight_decay=np.float32(-0.5))
    assert (record.learning_rate, record.weight_decay, record.b1) == (-1.5e-20, -0.5, 0.8)
    assert optimizer == ACProp(1e-3, b1=0.8)
    for options, error, message in (
        ({"learning_rate": np.nan}, ValueError, "learning_rate is nan; use a finite number"),
        ({"weight_decay": -np.inf}, ValueError, "weight_decay is -inf; use a finite number"),
        ({"b1": 1.0}, ValueError, "b1 is 1.0; use a number that is at least 0 and below 1"),
        ({"lr": 1.0}, TypeError, "an ACProp has no option 'lr'; use one of learning_rate, b1,"),
    ):
        with pytest.raises(error, match=message):
            with_values(optimizer, **options)


# b1 = 0


@pytest.mark.parametrize("b1", [0, 0.0, np.float32(0), np.asarray(0)])
def test_b1_zero_without_a_remedy_warns_once_at_the_line_of_the_caller(b1: Any) -> None:
    x = np.ones(3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer = ACProp(b1=b1)
        _, state = optimizer.update(x, optimizer.init(x))
        optimizer.update(x, state)
        with_values(optimizer, learning_rate=-0.5)
    assert "use clip_exponent=0.25, or centering='previous'" in str(caught[0].message)
    assert [warning.filename for warning in caught] == [__file__]


@pytest.mark.parametrize(
    "options",
    [{"clip_exponent": 0.25}, {"clip_exponent": 0}, {"centering": "previous"}, {"b1": 1e-3}, {"b1": jnp.zeros(())}],
)
def test_b1_with_a_remedy_does_not_warn(options: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ACProp(**{"b1": 0.0, **options})


def test_why_b1_zero_warns() -> None:
    x, grads = np.zeros(1), np.random.default_rng(0).normal(size=(5, 1))

    def largest(**remedy: Any) -> float:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer = ACProp(1.0, b1=0.0, **remedy)
        state, updates = optimizer.init(x), []
        for grad in grads:
            update, state = optimizer.update(grad, state)
            updates.append(abs(float(update[0])))
        return max(updates)

    assert largest() > 1e6
    assert largest(clip_exponent=0.25) <= 5**0.25
    assert largest(centering="previous") < 100.0


# the explosion, and its cure


@pytest.mark.parametrize("way", ["zero gradients", "a parameter that has grown", "a count set by hand"])
def test_zero_moments_at_a_count_explode_as_zero_gradients_do_and_the_clip_cures_them(way: str) -> None:
    def step(clip_exponent: float | None) -> np.ndarray:
        optimizer = ACProp(1.0, eps_root=0.0, clip_exponent=clip_exponent)
        old = np.zeros(1 if way == "a parameter that has grown" else 2)
        state = optimizer.init(old)
        if way != "a count set by hand":
            for grad in (1.0, 0.5, -1.0):
                _, state = optimizer.update(np.full_like(old, 0.0 if way == "zero gradients" else grad), state)
        if way == "a parameter that has grown":
            state = State(state.count, *(np.concatenate([x, np.zeros(1)]) for x in state[1:3]))
        state = state._replace(count=3)
        return np.abs(optimizer.update(np.ones(2), state)[0])

    assert step(None)[1] == 1e16  # 1 / eps
    assert step(0.25)[1] == 4**0.25
    assert step(0.25)[0] <= 4**0.25


# masks, sparse arrays, unknown shapes


@pytest.mark.parametrize("yes", [1, np.int8(1), np.bool_(True), True])
@pytest.mark.parametrize("no", [0, np.uint8(0), np.bool_(False), False])
def test_a_mask_may_hold_exact_zeros_and_ones(yes: Any, no: Any) -> None:
    x = {"w": np.ones(2), "b": np.ones(2)}
    got, expected = (ACProp(weight_decay=0.1, mask={"w": a, "b": b}) for a, b in ((yes, no), (True, False)))
    for a, b in zip(*(o.update(x, o.init(x), x)[0].values() for o in (got, expected)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("kind", ["csr_matrix", "coo_array", "csc_array"])
def test_sparse_arrays_of_scipy_are_told_to_be_made_dense(kind: str) -> None:
    sparse = getattr(pytest.importorskip("scipy.sparse"), kind)(np.eye(2))
    optimizer, x = ACProp(), np.eye(2)
    state = optimizer.init(x)
    message = re.escape(f"is sparse ({kind}); make it dense: toarray()")
    for act in (
        lambda: optimizer.init({"w": sparse}),
        lambda: optimizer.update(sparse, state),
        lambda: optimizer.update(x, state._replace(mu=sparse)),
        lambda: optimizer.apply(x, sparse),
        lambda: to_portable_leaf(sparse),
    ):
        with pytest.raises(TypeError, match=message):
            act()


def to_portable_leaf(x: Any) -> None:
    to_numpy("first moment", "w", x)


def test_unknown_chunk_sizes_are_named() -> None:
    da = pytest.importorskip("dask.array")
    known = da.ones(4, chunks=2)
    unknown = known[known > 0]
    optimizer = ACProp()
    state = optimizer.init(known)
    for act in (
        lambda: optimizer.init({"w": unknown}),
        lambda: optimizer.update(unknown, state, known),
        lambda: optimizer.update(unknown, state, unknown),
        lambda: optimizer.update(known, state._replace(nu=unknown), known),
        lambda: optimizer.apply(known, unknown),
        lambda: check_carry("w", unknown.astype("float16"), known.astype("float16")),
    ):
        with pytest.raises(ValueError, match=r"has unknown chunk sizes.*call compute_chunk_sizes\(\)"):
            act()
    updates, _ = optimizer.update(unknown.compute_chunk_sizes(), state, known)
    assert updates.shape == (4,)


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


@pytest.mark.filterwarnings("ignore:b1 is 0:UserWarning")  # the point is any b1, and b1=0 without a clip is one
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


@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
@pytest.mark.parametrize("kind", [np.ma.MaskedArray, np.matrix])
def test_arrays_whose_arithmetic_differs_are_refused_where_all_leaves_are_such(kind: Any) -> None:
    x = kind([[1.0, 2.0]])
    with pytest.raises(TypeError, match=f"'w' is a {kind.__name__}, whose arithmetic differs from an array's"):
        ACProp().apply({"w": x}, {"w": x})
