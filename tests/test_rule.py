"""The mathematics of one array: the numbers of a step, the first step, derivatives, and what must not be NaN."""

import math
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from acprop_core import ACProp, State, rule
from reference import mp

DECAY_RATES = (0.0, 0.5, 0.9, 0.999, 0.99999, 1.0 - 2.0**-24)
COUNTS = (1, 2, 3, 10, 1_000, 65_537, 16_777_216, 2**31 - 1)


def numbers_of(count: Any, xp: Any, **hyper: Any) -> rule.Numbers:
    return rule.numbers_of(rule.Hyperparameters(**hyper), count, xp)


def exact_scale(b2: float, count: int) -> Any:
    return 1 / (1 - mp.mpf(b2) ** count)


@pytest.mark.parametrize("b2", DECAY_RATES)
@pytest.mark.parametrize("count", [*COUNTS, 10**12])
def test_bias_correction_of_an_int_count(b2: float, count: int) -> None:
    k = numbers_of(count, np, b2=b2)
    error = abs(mp.mpf(k.scale) / exact_scale(b2, count) - 1)
    assert error <= 4 * np.finfo(np.float64).eps
    assert k.offset == 0.0


@pytest.mark.parametrize("b2", DECAY_RATES)
@pytest.mark.parametrize("count", COUNTS)
def test_bias_correction_of_a_traced_count(b2: float, count: int) -> None:
    scale, offset = jax.jit(lambda count: numbers_of(count, jnp, b2=b2)[:2])(jnp.int32(count))
    assert scale.dtype == jnp.float32
    # of the second moment; the update sees its root, half of it
    error = abs(mp.mpf(float(scale)) / exact_scale(b2, count) - 1)
    assert error / 2 <= 2e-7
    assert offset == 0


@pytest.mark.parametrize("b2", DECAY_RATES)
@pytest.mark.parametrize("count", COUNTS)
def test_bias_correction_of_a_traced_rate(b2: float, count: int) -> None:
    b2 = float(np.float32(b2))
    scale = jax.jit(lambda b2: numbers_of(count, jnp, b2=b2).scale)(jnp.float32(b2))
    assert abs(mp.mpf(float(scale)) / exact_scale(b2, count) - 1) / 2 <= 2e-7


@pytest.mark.parametrize("count", [0, jnp.int32(0), jnp.uint8(0)])
def test_first_step_has_a_denominator_of_one(count: Any) -> None:
    k = numbers_of(count, jnp)
    assert float(k.scale) == 0.0
    assert float(k.offset) == 1.0


@pytest.mark.parametrize("exponent", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("count", [0, 1, 99, 10**6])
def test_limit(exponent: float, count: int) -> None:
    exact = mp.mpf(count + 1) ** mp.mpf(exponent)
    limit = numbers_of(count, np, clip_exponent=exponent).limit
    traced = jax.jit(lambda count: numbers_of(count, jnp, clip_exponent=exponent).limit)(jnp.int32(count))
    assert abs(mp.mpf(limit) / exact - 1) <= np.finfo(np.float64).eps
    assert abs(mp.mpf(float(traced)) / exact - 1) <= 2 * np.finfo(np.float32).eps


def test_the_weights_of_an_average_and_which_is_lighter() -> None:
    k = numbers_of(1, np, b1=0.9, b2=0.25)
    flags = rule.flags_of(rule.Hyperparameters(b1=0.9, b2=0.25))
    assert (k.old_weight1, k.new_weight1, flags.old_is_lighter1) == (0.9, 1.0 - 0.9, False)
    assert (k.old_weight2, k.new_weight2, flags.old_is_lighter2) == (0.25, 0.75, True)
    traced = rule.Hyperparameters(b1=jnp.float32(0.9), b2=jnp.float32(0.25))
    assert (rule.flags_of(traced).old_is_lighter1, rule.flags_of(traced).old_is_lighter2) == (None, None)


@pytest.mark.parametrize("b", [0.0, 0.25, 0.5, 0.9])
def test_an_average_that_asks_the_arrays_is_the_same(b: float) -> None:
    rng = np.random.default_rng(0)
    old, new = rng.normal(size=(2, 50))
    known, asked = (
        rule._average(old, new, np.float64(b), np.float64(1.0 - b), lighter, np) for lighter in (b < 0.5, None)
    )
    np.testing.assert_array_equal(known, asked)


@pytest.mark.parametrize("hyper", [{}, {"weight_decay": 0.1}, {"weight_decay": 0.1, "l2": True}])
def test_flags_of_decay(hyper: dict[str, Any]) -> None:
    expected = rule.Decay.NONE if not hyper else rule.Decay.L2 if "l2" in hyper else rule.Decay.DECOUPLED
    assert rule.flags_of(rule.Hyperparameters(**hyper)).decay == expected


def test_maximize_is_the_step_of_the_negative_gradient() -> None:
    rng = np.random.default_rng(0)
    x, g, m, s = rng.uniform(0.1, 1.0, (4, 20))
    for l2 in (False, True):
        hyper = rule.Hyperparameters(weight_decay=0.1, clip_exponent=0.25, l2=l2)
        steps = []
        for maximize, grad, mean in ((False, -g, -m), (True, g, m)):
            own = hyper._replace(maximize=maximize)
            steps.append(rule.step(x, grad, mean, s, None, rule.numbers_of(own, 3, np), rule.flags_of(own), np))
        (u, mu, nu, _), (other_u, other_mu, other_nu, _) = steps
        np.testing.assert_array_equal(other_u, u)
        np.testing.assert_array_equal(other_mu, -mu)
        np.testing.assert_array_equal(other_nu, nu)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_first_step_is_the_plain_gradient(dtype: Any) -> None:
    grad = np.array([3.0, -0.5, 0.0], dtype)
    optimizer = ACProp(0.25, eps=0.0)
    updates, _ = optimizer.update(grad, optimizer.init(grad))
    np.testing.assert_array_equal(updates, -dtype(0.25) * grad)


@pytest.mark.filterwarnings("ignore:b1 is 0:UserWarning")  # which is what is tested
def test_constant_gradient_with_b1_zero_leaves_no_residual() -> None:
    # the mirrored average gives m_t = g_t to the last bit, for every start
    optimizer = ACProp(b1=0.0, eps_root=0.0, eps=1.0)
    state = optimizer.init(np.zeros(3))
    for grad in (np.array([1e8, 3.3, -7.0]), np.array([0.1, 0.7, 1e-9])):
        _, state = optimizer.update(grad, state)
        np.testing.assert_array_equal(state.mu, grad)
        np.testing.assert_array_equal(state.nu, np.zeros(3))


def test_zero_gradient_with_both_eps_zero_gives_a_zero_update() -> None:
    for dtype in (np.float32, np.float64):
        optimizer = ACProp(eps=0.0, eps_root=0.0)
        grad = np.zeros(2, dtype)
        state = optimizer.init(grad)
        for _ in range(3):
            updates, state = optimizer.update(grad, state)
            np.testing.assert_array_equal(updates, grad)


def test_an_array_eps_of_zero_is_like_a_number() -> None:
    grad = jnp.zeros(2)
    optimizer = ACProp(eps=jnp.float32(0.0), eps_root=jnp.float32(0.0))
    state = optimizer.init(grad)
    for _ in range(3):
        updates, state = optimizer.update(grad, state)
        np.testing.assert_array_equal(updates, grad)


def test_the_floor_of_eps_is_invisible() -> None:
    # the smallest second moments that float64 holds; a floor of float32's smallest number would show here
    state = State(1, np.zeros(1), np.full(1, 1e-300))
    updates, _ = ACProp(1.0, b2=0.0, eps=0.0).update(np.full(1, 1e-150), state)
    assert updates[0] == pytest.approx(-1.0, rel=1e-15)


def test_a_step_needs_few_functions_of_the_namespace_and_writes_to_nothing() -> None:
    # what the compilers rely on: nothing of the namespace but these functions
    used = SimpleNamespace(sqrt=np.sqrt, clip=np.clip)
    hyper = rule.Hyperparameters(clip_exponent=0.25, weight_decay=0.1)
    numbers, flags = rule.numbers_of(hyper, 3, np), rule.flags_of(hyper)._replace(scaled=True)
    arrays = [np.full(4, x) for x in (1.0, 0.5, 0.1, 0.2)]
    for x in arrays:
        x.flags.writeable = False
    steps = [rule.step(*arrays, None, numbers, flags, xp) for xp in (used, np)]
    for got, expected in zip(*(step[:3] for step in steps), strict=True):
        np.testing.assert_array_equal(got, expected)


def test_numbers_are_cast_together_and_never_widen_an_array() -> None:
    hyper = rule.Hyperparameters(*(jnp.float32(0.25),) * 7)
    numbers = rule.cast(rule.numbers_of(hyper, jnp.int32(3), jnp), jnp.float16, 2.0**-14, jnp)
    assert {x.dtype for x in numbers if not isinstance(x, float)} == {jnp.dtype("float16")}
    floats = rule.cast(rule.numbers_of(rule.Hyperparameters(eps=0.0), 3, np), np.float32, 2.0**-126, np)
    assert {type(x) for x in floats} == {float}
    assert floats.eps == 2.0**-126


@pytest.mark.parametrize("b1", [0.0, 0.9])
@pytest.mark.parametrize("b2", [0.0, 0.999])
@pytest.mark.parametrize("clip_exponent", [None, 0.25])
@pytest.mark.parametrize("steps", [1, 3])
def test_no_derivative_is_nan(b1: float, b2: float, clip_exponent: float | None, steps: int) -> None:
    grads = jnp.array([[0.0, 1.0, -2.0], [0.0, 0.5, 0.0], [1.0, 0.0, 3.0]])

    def final(params: Any, grads: Any, numbers: Any) -> Any:
        lr, b1, b2, eps = numbers
        optimizer = ACProp(lr, b1=b1, b2=b2, eps=eps, clip_exponent=clip_exponent, weight_decay=0.1)
        state = optimizer.init(params)
        for grad in grads[:steps]:
            updates, state = optimizer.update(grad, state, params)
            params = optimizer.apply(params, updates)
        return (params**2).sum()

    numbers = jnp.array([1e-3, b1, b2, 1e-8])
    for derivative in jax.grad(final, argnums=(0, 1, 2))(jnp.ones(3), grads, numbers):
        assert jnp.isfinite(derivative).all()


def test_derivative_through_the_update_is_that_of_the_equations() -> None:
    # one step from a given state: du/dg = -lr / (sqrt(shat) + eps), du/ds = lr g / (2 shat^(1/2) (..)^2 (1 - b2^t))
    optimizer = ACProp(0.5, b2=0.75, eps=1e-3)
    g, s = 0.7, 0.3
    correction = 1.0 - 0.75**4
    root = math.sqrt(s / correction)

    def update(g: Any, s: Any) -> Any:
        return optimizer.update(g, State(4, jnp.zeros(()), s))[0]

    by_g, by_s = jax.grad(update, argnums=(0, 1))(jnp.float32(g), jnp.float32(s))
    assert float(by_g) == pytest.approx(-0.5 / (root + 1e-3), rel=4e-7)
    assert float(by_s) == pytest.approx(0.5 * g / (root + 1e-3) ** 2 / (2 * root) / correction, rel=4e-7)
