"""The optax adapter as a transformation of optax: what optax users expect of one, and where optax's own is wrong."""

import inspect
import math
import pickle
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads
from optax.contrib import mechanize, reduce_on_plateau, schedule_free

from acprop_core import ACProp
from acprop_optax import acprop, export_state, import_state, scale_by_acprop

PARAMS = {"w": jnp.ones((2, 3)), "b": [jnp.zeros(3)]}
HALF = ("float16", "bfloat16")
SCHEDULE = optax.linear_schedule(0.1, 0.0, 10)


@pytest.fixture
def x64() -> Iterator[None]:
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)


def gradients(params: Any, i: Any) -> Any:
    return jax.tree.map(lambda p: jnp.sin(p + i + 1), params)


def run(transform: optax.GradientTransformation, steps: int = 4, params: Any = PARAMS) -> Any:
    state = transform.init(params)
    for i in range(steps):
        updates, state = transform.update(gradients(params, i), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def scan(transform: optax.GradientTransformation, params: Any, grads: Any, **extra_args: Any) -> tuple[Any, Any]:
    """Step once for each row of `grads`. A carry that changes its type is a TypeError."""

    def step(carry: Any, grad: Any) -> Any:
        params, state = carry
        updates, state = transform.update(grad, state, params, **extra_args)
        with jax.numpy_dtype_promotion("standard"):
            return (optax.apply_updates(params, updates), state), updates

    return jax.lax.scan(step, (params, transform.init(params)), grads)


def assert_close(a: Any, b: Any, bound: float) -> None:
    """Compare relative to the largest element of each array; the structures are equal."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        if jnp.issubdtype(x.dtype, jnp.inexact):
            assert jnp.abs(x - y).max(initial=0.0) <= bound * jnp.abs(y).max(initial=1e-300)
        else:
            assert (x == y).all()


# In the place of optax.contrib.acprop


@pytest.mark.parametrize("name", ["acprop", "scale_by_acprop"])
def test_the_signature_begins_as_that_of_optax(name: str) -> None:
    ours = inspect.signature(globals()[name]).parameters
    theirs = inspect.signature(getattr(optax.contrib, name)).parameters
    assert list(ours)[: len(theirs)] == list(theirs)
    for key, parameter in theirs.items():
        assert ours[key].kind == parameter.kind
        assert ours[key].default == parameter.default
    assert {parameter.kind for key, parameter in ours.items() if key not in theirs} == {inspect.Parameter.KEYWORD_ONLY}
    assert not any(isinstance(parameter.annotation, str) for parameter in ours.values())
    if name == "acprop":
        assert ours["learning_rate"].annotation is optax.ScalarOrSchedule


def optax_schedules_the_decay() -> bool:
    decay, x = optax.add_decayed_weights(SCHEDULE), jnp.ones(1)
    try:
        decay.update(x, decay.init(x), x)
    except TypeError:  # 0.2.5
        return False
    return True


NO_SCHEDULE = "the weight decay of this optax takes no schedule, so there is nothing to compare with"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"learning_rate": optax.linear_schedule(0.1, 0.0, 10)},
        {"weight_decay": 0.1},
        {"weight_decay": 0.1, "mask": {"w": True, "b": [False]}},
        {"weight_decay": SCHEDULE},
        {"weight_decay": SCHEDULE, "learning_rate": SCHEDULE, "mask": {"w": True, "b": [False]}},
        {"weight_decay": SCHEDULE, "mask": lambda params: jax.tree.map(lambda x: x.ndim > 1, params)},
    ],
)
def test_the_state_is_that_of_optax(options: dict[str, Any]) -> None:
    if callable(options.get("weight_decay")) and not optax_schedules_the_decay():
        pytest.skip(NO_SCHEDULE)
    options = {"learning_rate": 1e-3, **options}
    ours, theirs = (run(f(**options))[1] for f in (acprop, optax.contrib.acprop))
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(ours)] == [(x.shape, x.dtype) for x in jax.tree.leaves(theirs)]
    assert isinstance(ours[0], optax.ScaleByBeliefState)


# A float32 step of optax.contrib.acprop has a bias correction that is wrong by 1.3e-5 at b2 = 0.999, and by 2e-7 at 0.9
# (it takes 1 - b2**t in float32); in float64 nothing is left of that.
@pytest.mark.parametrize(("b2", "dtype", "bound"), [(0.999, "float32", 2e-5), (0.9, "float32", 2e-6)])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_centering_on_the_previous_mean_is_the_code_of_optax(
    b2: float, dtype: str, bound: float, weight_decay: float
) -> None:
    compare_with_optax(b2, dtype, bound, weight_decay)


def test_in_float64_it_is_that_code_to_the_last_digits(x64: None) -> None:
    compare_with_optax(0.999, "float64", 2e-14, 0.1)


def compare_with_optax(b2: float, dtype: str, bound: float, weight_decay: float) -> None:
    rng = np.random.default_rng(0)
    grads = jnp.asarray(rng.normal(0.3, 1.0, (1000, 50)), dtype)
    options = {"b2": b2, "weight_decay": weight_decay}
    ours, theirs, documented = (
        scan(transform, jnp.linspace(-1, 1, 50, dtype=dtype), grads)
        for transform in (
            acprop(1e-2, **options, centering="previous"),
            optax.contrib.acprop(1e-2, **options),
            acprop(1e-2, **options),
        )
    )
    assert_close(ours, theirs, bound)
    assert jnp.abs(documented[1] / theirs[1] - 1.0).max() > 0.1  # the formula of the documentation is another one


def test_a_state_of_optax_is_continued(x64: None) -> None:
    theirs, ours = optax.contrib.acprop(0.1), acprop(0.1, centering="previous")
    params = jnp.linspace(-1.0, 1.0, 7)
    state = theirs.init(params)
    for i in range(10):  # theirs to the end, and theirs for five steps, then ours
        updates, state = theirs.update(gradients(params, i), state, params)
        params = optax.apply_updates(params, updates)
        if i == 4:
            continued = params, state
    p, s = continued
    for i in range(5, 10):
        updates, s = ours.update(gradients(p, i), s, p)
        p = optax.apply_updates(p, updates)
    assert_close((p, s), (params, state), 1e-13)


def test_acprop_is_its_chain() -> None:
    schedule = optax.linear_schedule(0.1, 0.0, 10)
    chain = optax.chain(
        scale_by_acprop(0.8, 0.99, clip_exponent=0.25),
        optax.add_decayed_weights(0.1),
        optax.scale_by_learning_rate(schedule),
    )
    whole = acprop(schedule, 0.8, 0.99, weight_decay=0.1, clip_exponent=0.25)
    for a, b in zip(jax.tree.leaves(run(chain)), jax.tree.leaves(run(whole)), strict=True):
        assert (a == b).all()


WRAPPERS = {
    "chain": lambda f: optax.chain(optax.clip_by_global_norm(1.0), f(0.1)),
    "MultiSteps": lambda f: optax.MultiSteps(f(0.1), 3).gradient_transformation(),
    "apply_if_finite": lambda f: optax.apply_if_finite(f(0.1), 3),
    "masked": lambda f: optax.masked(f(0.1), {"w": True, "b": [False]}),
    "partition": lambda f: optax.partition({"x": f(0.1), "y": f(0.05)}, {"w": "x", "b": ["y"]}),
    "schedule_free": lambda f: schedule_free(f(0.1, b1=0.0), 0.1),
    "mechanize": lambda f: mechanize(f(1.0)),
    "reduce_on_plateau": lambda f: optax.chain(f(0.1), reduce_on_plateau(patience=2)),
    "flatten": lambda f: optax.flatten(f(0.1)),
    "inject_hyperparams": lambda f: optax.inject_hyperparams(f)(optax.linear_schedule(0.1, 0.0, 20), b2=0.9),
    "schedule of the decay": lambda f: f(0.1, weight_decay=SCHEDULE),
    "schedule of the decay, masked": lambda f: f(SCHEDULE, weight_decay=SCHEDULE, mask={"w": 1, "b": [0]}),
    "schedule of the decay, injected": lambda f: optax.inject_hyperparams(f)(0.1, weight_decay=SCHEDULE),
    "schedule of the decay, below 0": lambda f: f(0.1, weight_decay=lambda count: 0.1 - 0.02 * count),
    "schedule, below 0": lambda f: f(lambda count: 0.1 - 0.02 * count),
    "mask of the decay, 0 and 1": lambda f: f(0.1, weight_decay=0.1, mask={"w": 1, "b": [np.int64(0)]}),
    "mask of the decay, callable": lambda f: f(
        0.1, weight_decay=0.1, mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p)
    ),
    "mask of the decay, prefix": lambda f: f(0.1, weight_decay=0.1, mask={"w": True, "b": False}),
    "mask of the decay, exact": lambda f: f(0.1, weight_decay=0.1, mask={"w": False, "b": [True]}),
    "mask of the decay, all": lambda f: f(0.1, weight_decay=0.1, mask=True),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers_give_what_they_give_with_that_of_optax(name: str, x64: None) -> None:
    is_scheduled = name.startswith("schedule of the decay") and not name.endswith("injected")
    if is_scheduled and not optax_schedules_the_decay():
        pytest.skip(NO_SCHEDULE)
    params = {"w": jnp.linspace(-1.0, 1.0, 6).reshape(2, 3), "b": [jnp.ones(3)]}
    grads = jax.vmap(lambda i: gradients(params, i))(jnp.arange(20.0))
    extra_args = {"value": jnp.float64(1.0)} if name == "reduce_on_plateau" else {}

    def previous(*args: Any, **options: Any) -> optax.GradientTransformation:
        return acprop(*args, **options, centering="previous")

    # inject_hyperparams reads the signature of what it wraps
    previous.__signature__ = inspect.signature(optax.contrib.acprop)
    ours, theirs = (scan(WRAPPERS[name](f), params, grads, **extra_args) for f in (previous, optax.contrib.acprop))
    assert_close(ours, theirs, 1e-12)


def test_lookahead() -> None:
    def quadratic(p: Any) -> jax.Array:
        return ((p - 3.0) ** 2).sum()

    transform = optax.lookahead(acprop(0.1, clip_exponent=0.25), sync_period=5, slow_step_size=0.5)
    params = optax.LookaheadParams.init_synced(jnp.zeros(4))
    state = transform.init(params)
    update = jax.jit(transform.update)
    for _ in range(100):
        updates, state = update(jax.grad(quadratic)(params.fast), state, params)
        params = optax.apply_updates(params, updates)
    assert quadratic(params.slow) < 1e-2


def test_extra_arguments_are_for_others() -> None:
    updates, _ = acprop(0.1).update(PARAMS, acprop(0.1).init(PARAMS), PARAMS, value=1.0, loss=2.0)
    assert jax.tree.structure(updates) == jax.tree.structure(PARAMS)


def test_a_schedule_is_called_with_0_at_the_first_step() -> None:
    def schedule(count: Any) -> Any:
        return 0.5 + count

    grads = jnp.ones((2, 3))
    for transform in (acprop(schedule, clip_exponent=0.0), optax.inject_hyperparams(acprop)(schedule, clip_exponent=0)):
        _, updates = scan(transform, jnp.ones(3), grads)
        assert (updates == jnp.array([[-0.5], [-1.5]])).all()


def test_tree_utilities_know_the_state() -> None:
    transform = acprop(optax.linear_schedule(0.1, 0.0, 10), weight_decay=0.1, mask={"w": True, "b": [False]})
    _, state = run(transform)
    assert optax.tree_utils.tree_get(state[0], "count") == 4
    assert jax.tree.structure(optax.tree_utils.tree_get(state, "mu")) == jax.tree.structure(PARAMS)
    doubled = optax.tree_utils.tree_map_params(transform, lambda x: 2 * x, state)
    assert_close(doubled[0].nu, jax.tree.map(lambda x: 2 * x, state[0].nu), 0.0)
    assert doubled[0].count == state[0].count
    later = optax.tree_utils.tree_set(state, count=jnp.int32(7))
    assert later[0].count == later[2].count == 7
    injected = optax.inject_hyperparams(acprop)(0.1, clip_exponent=0.25)
    state = optax.tree_utils.tree_set(injected.init(PARAMS), learning_rate=jnp.float32(0.0))
    updates, _ = injected.update(PARAMS, state, PARAMS)
    assert (updates["w"] == 0).all()


def test_the_state_can_be_pickled() -> None:
    transform = acprop(optax.linear_schedule(0.1, 0.0, 10), weight_decay=0.1, mask=True)
    _, state = run(transform)
    assert_close(pickle.loads(pickle.dumps(state)), state, 0.0)


def test_a_state_may_be_of_numpy_arrays() -> None:
    transform = acprop(0.1)
    state = jax.device_get(transform.init(PARAMS))
    _, state = transform.update(PARAMS, state, PARAMS)
    assert int(state[0].count) == 1


def test_init_needs_only_shapes() -> None:
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), PARAMS)
    for state in (acprop(0.1).init(abstract), jax.eval_shape(acprop(0.1).init, abstract)):
        assert [x.dtype for x in jax.tree.leaves(state[0].nu)] == [jnp.float32, jnp.float32]


# Types


@pytest.mark.parametrize("dtype", [*HALF, "float32", "complex64"])
def test_scan_keeps_its_types(dtype: str) -> None:
    transform = acprop(1e-2, weight_decay=0.1, clip_exponent=0.25)
    (params, state), updates = scan(transform, jnp.ones(3, dtype), jnp.ones((5, 3), dtype))
    assert params.dtype == updates.dtype == dtype
    assert state[0].mu.dtype == ("complex64" if dtype == "complex64" else "float32")
    assert state[0].nu.dtype == "float32"


@pytest.mark.parametrize("promotion", ["standard", "strict"])
@pytest.mark.parametrize(
    ("params", "grads"),
    [
        ("bfloat16", "float32"),
        ("float32", "bfloat16"),
        ("float32", "float64"),
        ("float64", "float32"),
        ("float16",) * 2,
    ],
)
def test_mixed_dtypes_never_drift(promotion: str, params: str, grads: str, x64: None) -> None:
    hyper = {
        "learning_rate": jnp.float64(1e-2),
        "b1": jnp.float32(0.9),
        "b2": jnp.float64(0.99),
        "eps": np.float64(1e-8),
        "eps_root": jnp.float32(1e-16),
        "weight_decay": jnp.bfloat16(0.1),
        "clip_exponent": jnp.float32(0.25),
    }
    with jax.numpy_dtype_promotion(promotion):
        injected = optax.inject_hyperparams(acprop, hyperparam_dtype=jnp.float32)(**hyper)
        for transform in (acprop(**hyper), injected):
            (x, state), updates = scan(transform, jnp.ones(3, params), jnp.ones((3, 3), grads))
            assert x.dtype == params
            assert updates.dtype == max((params, grads), key=("float16", "bfloat16", "float32", "float64").index)
            assert optax.tree_utils.tree_get(state, "mu").dtype == ("float64" if params == "float64" else "float32")
            assert (x < 1.0).all()


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("hyperparam_dtype", [None, jnp.float32])
def test_16_bit_parameters_train_with_injected_hyperparameters(dtype: str, hyperparam_dtype: Any) -> None:
    # by default all numbers become 16-bit arrays: b2 = 0.999 is 1 in bfloat16, and stands for what rounds to 1
    injected = optax.inject_hyperparams(acprop, hyperparam_dtype=hyperparam_dtype)(1e-2, clip_exponent=0.25)
    grads = jnp.asarray(np.random.default_rng(0).normal(0.5, 1.0, (100, 8)), dtype)
    (_, state), updates = scan(injected, jnp.ones(8, dtype), grads)
    _, plain = scan(acprop(1e-2, clip_exponent=0.25), jnp.ones(8, dtype), grads)
    assert updates.dtype == dtype
    # learning rate, b1 and b2 of 8 (11) bits
    error = jnp.abs(updates.astype(jnp.float32) - plain).max() / jnp.abs(plain.astype(jnp.float32)).max()
    assert error < {"bfloat16": 0.03, "float16": 0.004}[dtype]
    assert state.inner_state[0].nu.dtype == jnp.float32


@pytest.mark.slow
@pytest.mark.parametrize("inject", [False, True])
def test_a_drop_in_noise_is_followed_in_bfloat16(inject: bool) -> None:
    # optax's own keeps b2 = 1 in bfloat16: its update is 125 times too small 20,000 steps after the drop
    make = optax.inject_hyperparams(acprop) if inject else acprop
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(22_000, 16)) * np.where(np.arange(22_000) < 2_000, 10.0, 0.1)[:, None]
    (_, state), _ = scan(make(1e-3), jnp.zeros(16, "bfloat16"), jnp.asarray(noise, "bfloat16"))
    # the variance of g_t - m_t = b1 (g_t - m_{t-1}), of noise of deviation 0.1 and b1 = 0.9
    expected = 0.9**2 * 0.1**2 * (1 + 0.1 / 1.9)
    assert optax.tree_utils.tree_get(state, "nu").mean() == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("dtype", HALF)
def test_16_bit_gradients_may_vanish_and_awake(dtype: str) -> None:
    for value in (0.0, 1e-3, 1.0):
        grads = jnp.zeros((6, 3), dtype).at[3:].set(value)
        (params, state), updates = scan(acprop(1e-3), jnp.ones(3, dtype), grads)
        for x in (params, updates, state[0].mu, state[0].nu):
            assert jnp.isfinite(x).all()
    # rounded once, after the learning rate: d_4 = 1 / sqrt(1e-16 / 0.001 * ...) = 3e6 is above float16, and 3e3 is not
    assert 1e3 < -updates[3, 0] < 1e4


def test_a_wide_number_does_not_widen_in_64_bit_mode(x64: None) -> None:
    params = jnp.ones(3, "float32")
    transform = acprop(np.float64(1e-3), b1=np.float64(0.9), weight_decay=np.float64(0.1))
    updates, _ = transform.update(params, transform.init(params), params)
    assert updates.dtype == jnp.float32


KINDS = ("bfloat16", "float16", "float32", "float64", "complex64", "complex128")


@pytest.mark.parametrize("grads", KINDS)
@pytest.mark.parametrize("params", KINDS)
def test_the_update_has_the_dtype_that_adamw_gives_it(params: str, grads: str, x64: None) -> None:
    if "complex" in grads and "complex" not in params:
        pytest.skip("complex gradients of real parameters are refused")
    x, g = jnp.ones(3, params), jnp.ones(3, grads)
    adamw = optax.adamw(0.1)
    expected = adamw.update(g, adamw.init(x), x)[0].dtype
    for transform in (acprop(0.1), acprop(0.1, weight_decay=0.1), scale_by_acprop()):
        updates, state = transform.update(g, transform.init(x), x)
        assert updates.dtype == expected
        assert optax.tree_utils.tree_get(state, "mu").dtype == optax.tree_utils.tree_get(transform.init(x), "mu").dtype
    finite = optax.apply_if_finite(acprop(0.1), 3)  # which compares the dtype with the gradient's
    assert finite.update(g, finite.init(x), x)[0].dtype == expected if expected == grads else True
    compensated = acprop(0.1, compensate=True)
    updates, _ = compensated.update(g, compensated.init(x), x)
    assert updates.dtype == (params if params in HALF else expected)


def test_a_wide_update_is_not_rounded_to_the_parameter() -> None:
    x, g = jnp.ones(3, "bfloat16"), jnp.array([0.3, -1.7, 2.0])
    narrow, wide = (
        acprop(1e-2, weight_decay=0.1).update(g, acprop(1e-2).init(p), p)[0] for p in (x, x.astype("float32"))
    )
    assert (narrow == wide).all()


def test_without_params_the_update_has_the_dtype_of_the_gradient() -> None:
    for transform in (scale_by_acprop(), acprop(0.1)):
        updates, _ = transform.update(jnp.ones(3), transform.init(jnp.ones(3, "bfloat16")))
        assert updates.dtype == jnp.float32


def test_injected_integers_are_numbers() -> None:
    injected = optax.inject_hyperparams(acprop)(1, b1=0, weight_decay=0, clip_exponent=1)
    (params, _), _ = scan(injected, jnp.ones(3), jnp.ones((3, 3)))
    (expected, _), _ = scan(acprop(1, b1=0, weight_decay=0, clip_exponent=1), jnp.ones(3), jnp.ones((3, 3)))
    assert (params == expected).all()


def test_python_numbers_are_leaves_and_compile_once() -> None:
    transform = acprop(0.5)
    compilations = 0

    @jax.jit
    def update(grads: Any, state: Any, params: Any) -> Any:
        nonlocal compilations
        compilations += 1
        return transform.update(grads, state, params)

    params, state = {"x": 1.0, "n": 2}, transform.init({"x": 1.0, "n": 2})
    for _ in range(3):
        updates, state = update({"x": 0.5, "n": 1}, state, params)
    assert compilations == 1
    assert updates["x"].dtype == updates["n"].dtype == jnp.float32


# Leaves that are not there


def test_subtrees_may_be_empty() -> None:
    for transform in (
        optax.masked(acprop(0.1), {"w": False, "b": [False]}),
        optax.multi_transform({"all": acprop(0.1), "none": acprop(0.2)}, {"w": "all", "b": ["all"]}),
    ):
        run(transform)
    updates, _ = acprop(0.1).update({}, acprop(0.1).init({}), {})
    assert updates == {}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("centering", ["current", "previous"])
def test_a_gradient_of_none_leaves_its_leaf_alone(compiled: bool, centering: str) -> None:
    params = {"a": jnp.ones(2), "absent": None, "c": [jnp.ones(3)]}
    transform = acprop(0.1, weight_decay=0.1, mask={"a": True, "absent": None, "c": True}, centering=centering)
    update = jax.jit(transform.update) if compiled else transform.update
    _, before = update(params, transform.init(params), params)
    updates, after = update({"a": None, "absent": None, "c": [jnp.ones(3)]}, before, params)
    assert updates["a"] is None
    assert updates["absent"] is None
    assert (updates["c"][0] != 0).all()
    for moment in ("mu", "nu"):
        old, new = getattr(before[0], moment), getattr(after[0], moment)
        assert (old["a"] == new["a"]).all()
        assert (old["c"][0] != new["c"][0]).all()
        assert new["absent"] is None
    assert after[0].count == 2


def of_each_kind() -> dict[str, Any]:
    return {
        "w": jnp.ones(2),
        "i": jnp.arange(3),
        "b": jnp.array(True),
        "key": jax.random.key(0),
        "n": np.arange(2, dtype="int32"),
    }


def test_init_takes_all_that_adamw_takes() -> None:
    params = of_each_kind()
    ours, adamw = acprop(0.1).init(params), optax.adamw(0.1).init(params)
    assert jax.tree.structure(ours[0].mu) == jax.tree.structure(adamw[0].mu)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), ours[0].mu) == jax.tree.map(
        lambda x: (x.shape, x.dtype), adamw[0].mu
    )
    with pytest.raises(TypeError):
        optax.adamw(0.1).init({"f": jnp.tanh})
    with pytest.raises(TypeError, match="parameter 'f' is a"):
        acprop(0.1).init({"f": jnp.tanh})


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1, SCHEDULE])
def test_what_has_no_derivative_is_left_alone(compiled: bool, weight_decay: Any) -> None:
    params = of_each_kind()
    transform = acprop(0.1, weight_decay=weight_decay, compensate=True)
    state = transform.init(params)

    def step(state: Any) -> Any:
        grads = jax.grad(lambda p: (p["w"] ** 2).sum(), allow_int=True)(params)
        assert grads["i"].dtype == jax.dtypes.float0
        updates, state = transform.update(grads, state, params)
        assert updates.pop("key") is None
        rest = {name: x for name, x in params.items() if name != "key"}
        return optax.apply_updates(rest, updates), state

    moved, after = (jax.jit(step) if compiled else step)(state)
    assert (moved["w"] != params["w"]).all()
    for name in ("i", "b", "n"):
        assert moved[name].dtype == params[name].dtype
        assert (moved[name] == params[name]).all()
        assert after[0].mu[name].dtype == params[name].dtype
    nothing = dict.fromkeys(params)
    updates, after = transform.update({**nothing, "w": params["w"]}, state, params)
    assert [name for name in params if updates[name] is not None] == ["w"]
    assert jax.tree.structure(after) == jax.tree.structure(state)


def test_integers_with_a_gradient_are_refused() -> None:
    params = {"i": jnp.arange(3)}
    with pytest.raises(TypeError, match="parameter 'i' has dtype int32, which ACProp cannot use"):
        acprop(0.1).update(params, acprop(0.1).init(params), params)
    with pytest.raises(TypeError, match="has dtype void"):  # a float has a derivative
        acprop(0.1).update(np.zeros(2, jax.dtypes.float0), acprop(0.1).init(jnp.ones(2)), jnp.ones(2))


def test_params_are_optional_without_decay() -> None:
    for transform in (scale_by_acprop(), acprop(1.0), acprop(1.0, mask=True), acprop(1.0, weight_decay=jnp.zeros(()))):
        updates, state = transform.update(PARAMS, transform.init(PARAMS))
        assert (jnp.abs(updates["w"]) == PARAMS["w"]).all()  # the first step
        assert optax.tree_utils.tree_get(state, "count") == 1


@pytest.mark.parametrize("weight_decay", [0.1, jnp.float32(0.1)])
def test_decay_without_params_is_refused(weight_decay: Any) -> None:
    transform = acprop(0.1, weight_decay=weight_decay)
    state = transform.init(PARAMS)
    for update in (transform.update, jax.jit(transform.update)):
        with pytest.raises(ValueError, match=r"weight_decay is .*0\.1.*, which needs the parameters"):
            update(PARAMS, state)


# Numbers


def test_hyperparameters_can_be_injected_and_traced() -> None:
    injected = optax.inject_hyperparams(acprop)(learning_rate=1e-2, b2=0.99, weight_decay=0.1)
    params, state = run(injected)
    plain, _ = run(acprop(1e-2, b2=0.99, weight_decay=0.1))
    assert float(state.hyperparams["learning_rate"]) == pytest.approx(1e-2)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(plain), strict=True):
        assert jnp.abs(a - b).max() <= 4 * jnp.finfo(a.dtype).eps


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e4m3fn", "float64", "int8", "uint32", "int64"])
@pytest.mark.parametrize("kind", ["scalar", "array", "jax"])
def test_numbers_of_any_dtype(dtype: str, kind: str, x64: None) -> None:
    number = jnp.dtype(dtype).type(1)
    value = {"scalar": number, "array": np.asarray(number), "jax": jnp.asarray(1).astype(dtype)}[kind]
    options = ("learning_rate", "eps", "eps_root", "weight_decay", "clip_exponent")
    ours = acprop(**dict.fromkeys(options, value), b1=value * 0, b2=value * 0)
    expected = acprop(**dict.fromkeys(options, 1.0), b1=0.0, b2=0.0)
    scheduled = acprop(lambda count: value, *[0, 0, 1, 1], weight_decay=lambda count: value, clip_exponent=1)
    if dtype not in ("float8_e4m3fn", "uint32"):  # which optax cannot multiply or negate
        run(optax.adamw(value, weight_decay=value))
    for transform in (ours, scheduled):
        assert_close(run(transform)[0], run(expected)[0], 1e-6)


def test_a_16_bit_decay_rate_of_one_is_what_rounds_to_it() -> None:
    for rate in (np.asarray(0.9999, "bfloat16"), jnp.bfloat16(0.9999), np.float16(0.9999)):
        assert (run(acprop(0.1, b2=rate))[1][0].nu["w"] > 0.0).all()


@pytest.mark.parametrize("name", ["learning_rate", "weight_decay"])
@pytest.mark.parametrize("value", [math.nan, math.inf, np.float32("nan"), -math.inf])
def test_a_schedule_must_be_finite(name: str, value: Any) -> None:
    transform = acprop(**{"learning_rate": 0.1, name: lambda count: value})
    with pytest.raises(ValueError, match=rf"{name}\(0\) is .*; use a finite number"):
        transform.update(PARAMS, transform.init(PARAMS), PARAMS)


@pytest.mark.parametrize("name", ["learning_rate", "weight_decay"])
def test_a_schedule_is_called_with_the_count_of_optax(name: str) -> None:
    counts = []
    transform = acprop(**{"learning_rate": 0.1, name: lambda count: counts.append(int(count)) or 0.1})
    state = transform.init(PARAMS)
    # an optax without schedules of the decay keeps no count for them, and ACProp's is used
    i = 2 if name == "learning_rate" else int(optax_schedules_the_decay())
    for _ in range(2):
        _, state = transform.update(PARAMS, state, PARAMS)
    own = (*state[:i], state[i]._replace(count=jnp.int32(7)), *state[i + 1 :])
    transform.update(PARAMS, own, PARAMS)
    assert counts == [0, 1, 7]


ADDED = {
    "a mask": {"mask": True},
    "a schedule of learning_rate": {"learning_rate": SCHEDULE},
    "a schedule of weight_decay": {"weight_decay": SCHEDULE},
    "compensate": {"compensate": True},
}


@pytest.mark.parametrize("what", ADDED)
@pytest.mark.parametrize("added", [True, False])
def test_a_run_is_resumed_with_another_option(what: str, added: bool) -> None:
    if what == "a schedule of weight_decay" and not optax_schedules_the_decay():
        pytest.skip("this optax keeps no count for such a schedule, so the states do not differ")
    before = {"learning_rate": 0.1, "weight_decay": 0.1}
    old, new = (before, before | ADDED[what])[:: 1 if added else -1]
    params, state = run(acprop(**old))
    have, want = ("without", "with")[:: 1 if added else -1]
    difference = f"was made {have} {what}, the transformation {want} it"
    if what == "compensate":
        difference = f"does not belong to acprop with compensate={added}"
    with pytest.raises((TypeError, ValueError), match=f"{difference}; .*import_state.*prefer='own'"):
        acprop(**new).update(params, state, params)
    saved = export_state(state, ACProp(**old))
    resumed = import_state(acprop(**new).init(params), ACProp(**new), *saved, prefer="own")
    assert jax.tree.structure(resumed) == jax.tree.structure(acprop(**new).init(params))
    assert_close(resumed[0], state[0], 0.0)
    assert {int(x) for x in jax.tree.leaves(resumed) if x.dtype == jnp.int32} == {4}
    acprop(**new).update(params, resumed, params)


@pytest.mark.parametrize(
    ("option", "remedy"), [({"mu_dtype": "float32"}, "use moment_dtype"), ({"nesterov": True}, "leave it out")]
)
def test_options_of_adamw_are_explained(option: dict[str, Any], remedy: str) -> None:
    optax.adamw(0.1, **option)
    for function in (acprop, scale_by_acprop):
        with pytest.raises(TypeError, match=f"{function.__name__} has no option {next(iter(option))}; {remedy}"):
            function(**({"learning_rate": 0.1} if function is acprop else {}), **option)
        with pytest.raises(TypeError, match="unexpected keyword argument 'amsgrad'"):
            function(**({"learning_rate": 0.1} if function is acprop else {}), amsgrad=True)


@pytest.mark.parametrize("b2", [0.9, 0.999, 0.99999])
def test_traced_bias_correction(b2: float) -> None:
    # with nu = 1 and no eps, d_t = g / sqrt(1 / (1 - b2**(t - 1)))
    state = scale_by_acprop().init(jnp.ones(()))._replace(nu=jnp.ones(()))
    update = jax.jit(scale_by_acprop(b2=b2, eps=0.0).update)
    for count in (1, 2, 3, 10, 100, 1_000, 30_000):
        d, _ = update(jnp.ones(()), state._replace(count=jnp.int32(count)))
        assert float(d) ** 2 == pytest.approx(-math.expm1(count * math.log(b2)), rel=2 * 2e-7)


def test_the_count_saturates() -> None:
    for transform in (scale_by_acprop(clip_exponent=0.25), acprop(0.1, clip_exponent=0.25)):
        last = jnp.int32(2**31 - 1)
        state = optax.tree_utils.tree_set(transform.init(jnp.ones(3)), count=last)
        updates, state = jax.jit(transform.update)(jnp.ones(3), state)
        assert optax.tree_utils.tree_get(state, "count") == last
        assert jnp.isfinite(updates).all()


def test_vmap_over_hyperparameters_and_state() -> None:
    params, grads = jnp.linspace(-1.0, 1.0, 6).reshape(2, 3), jnp.sin(jnp.arange(30.0)).reshape(5, 2, 3)

    def train(learning_rate: Any, b2: Any, params: Any, grads: Any) -> Any:
        return scan(acprop(learning_rate, b2=b2, clip_exponent=0.25), params, grads)[0]

    rates, decays = jnp.array([0.1, 0.2]), jnp.array([0.9, 0.99])
    together = jax.vmap(train, in_axes=(0, 0, 0, 1))(rates, decays, params, grads)
    for i in range(2):
        alone = train(rates[i], decays[i], params[i], grads[:, i])
        assert_close(jax.tree.map(lambda x, i=i: x[i], together), alone, 1e-6)

    # counts that differ: each row is at a step of its own
    transform = acprop(0.1, clip_exponent=0.25)
    state = jax.vmap(transform.init)(params)
    state = optax.tree_utils.tree_set(state, count=jnp.array([0, 5]))
    updates, after = jax.jit(jax.vmap(transform.update))(grads[0], state, params)
    assert after[0].count.tolist() == [1, 6]
    for i in range(2):
        row = jax.tree.map(lambda x, i=i: x[i], state)
        assert_close(updates[i], transform.update(grads[0, i], row, params[i])[0], 1e-6)


def test_the_update_can_be_differentiated(x64: None) -> None:
    grads = jnp.array([[0.0, 1.0, -2.0], [0.5, -1.0, 0.1], [0.3, 0.2, 1.0]])

    def loss(learning_rate: Any, b1: Any, b2: Any, weight_decay: Any, params: Any, grads: Any) -> Any:
        transform = acprop(learning_rate, b1=b1, b2=b2, eps_root=1e-2, weight_decay=weight_decay)
        (params, _), _ = scan(transform, params, grads)
        return (params**2).sum()

    arguments = (0.1, 0.9, 0.99, 0.01, jnp.ones(3), grads)
    for compiled in (loss, jax.jit(loss)):
        check_grads(compiled, arguments, order=1, modes=["rev"], rtol=1e-4)  # of the finite differences
    for derivative in jax.grad(loss, argnums=range(6))(*arguments[:2], 0.0, *arguments[3:]):
        assert jnp.isfinite(derivative).all()  # b2 = 0


@pytest.mark.parametrize("dtype", [*HALF, "float32", "complex64"])
@pytest.mark.parametrize("centering", ["current", "previous"])
def test_compiled_and_eager_steps_agree_on_what_is_not_finite(dtype: str, centering: str) -> None:
    grads = jnp.array([1.0, jnp.nan, jnp.inf, -jnp.inf, 0.0, 1e4, -0.0], dtype)
    transform = acprop(0.5, clip_exponent=0.25, centering=centering)
    params, state = jnp.full(7, jnp.nan, dtype).at[:5].set(1.0), transform.init(grads)
    update = jax.jit(transform.update)
    eager, compiled = state, state
    for _ in range(3):
        u, eager = transform.update(grads, eager, params)
        v, compiled = update(grads, compiled, params)
        for a, b in zip(jax.tree.leaves((u, eager)), jax.tree.leaves((v, compiled)), strict=True):
            np.testing.assert_allclose(
                np.asarray(a, complex), np.asarray(b, complex), rtol=1e-2 if dtype in HALF else 1e-6
            )


def rosenbrock(x: jax.Array) -> jax.Array:
    return (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2


@pytest.mark.parametrize("centering", ["current", "previous"])
def test_the_clip_cures_the_explosion_of_optax_issue_1132(centering: str) -> None:
    def descend(transform: optax.GradientTransformation) -> jax.Array:
        def step(carry: Any, _: None) -> Any:
            x, state = carry
            updates, state = transform.update(jax.grad(rosenbrock)(x), state, x)
            x = optax.apply_updates(x, updates)
            return (x, state), rosenbrock(x)

        return jax.lax.scan(step, (jnp.zeros(2), transform.init(jnp.zeros(2))), length=1000)[1]

    assert rosenbrock(jnp.zeros(2)) == 1.0
    values = descend(acprop(1e-4, clip_exponent=0.25, centering=centering))
    assert values.max() < 1.0
    assert values[-1] < 0.31
    assert descend(acprop(1e-4, centering=centering)).max() > 7_000.0
    assert descend(optax.contrib.acprop(1e-4)).max() == pytest.approx(7_967, rel=1e-3)
