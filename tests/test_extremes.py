"""The ends of the number line, on every backend: what the equations say there, or what replaces them."""

from typing import Any

import numpy as np
import pytest

from agreement import violations
from cases import Case, Hyper, prescribed
from hosts import Backend, on_every_backend
from promises import attempt

every_backend = on_every_backend()

STEPS = 7
SIGNS = {
    "alike": np.ones(STEPS),
    "alternating": (-1.0) ** np.arange(STEPS),
    "both": np.array([1, 1, -1, 1, -1, -1, 1]),
}
FLOATS = {"float32": np.finfo(np.float32), "float64": np.finfo(np.float64)}


def largest(dtype: str) -> float:
    """Return up to which magnitude the square of a difference of two gradients is finite."""
    return float(np.sqrt(FLOATS[dtype].max)) / 2.0


def magnitudes(dtype: str) -> np.ndarray:
    """Return numbers from where lr (1 - b1) times them is still normal up to `largest`."""
    low, high = float(FLOATS[dtype].smallest_normal) * 2.0**20, largest(dtype)
    return np.geomspace(low, high, 25).clip(low, high)


def streams(dtype: str, x: np.ndarray) -> dict[str, np.ndarray]:
    return {name: (signs[:, None] * x).astype(dtype) for name, signs in SIGNS.items()}


HYPERS: dict[str, Hyper] = {
    "default": {},
    "clip": {"clip_exponent": 0.25},
    "b1-zero": {"b1": 0.0, "clip_exponent": 0.25},
    "b2-zero": {"b2": 0.0, "clip_exponent": 0.25},
    "b2-largest": {"b2": 1.0 - 2.0**-53, "clip_exponent": 0.25},
}
# random: to the bounds of those, for an average whose rate is so near 1
EXTREMES: list[Any] = [
    pytest.param(prescribed(h, streams(dtype, magnitudes(dtype)), random=name == "b2-largest"), id=f"{name}-{dtype}")
    for name, h in HYPERS.items()
    for dtype in FLOATS
]


@pytest.mark.promise("magnitudes")
@every_backend
@pytest.mark.parametrize("case", EXTREMES)
def test_from_the_smallest_normal_number_to_the_largest_square(backend: Backend, case: Case) -> None:
    if backend.name == "torch_fused_by_inductor" and case.dtypes == {"float64"}:
        pytest.skip("each dtype is a program of its own, for seconds; the reference suite runs them")
    assert not violations(case, backend.run(case))


@pytest.mark.promise("denormals")
@every_backend
@pytest.mark.parametrize("dtype", FLOATS)
def test_what_is_below_the_smallest_normal_number(backend: Backend, dtype: str) -> None:
    info = FLOATS[dtype]
    x = float(info.smallest_subnormal) * np.array([1.0, 3.0, 2.0**10 + 1.0, 2.0**22])
    case = prescribed({"learning_rate": 1.0, "clip_exponent": 0.25}, streams(dtype, x))
    got = backend.run(case)
    if backend.flushes:
        case = prescribed(case.hyper, {leaf: 0.0 * g for leaf, g in case.gradients.items()})
        assert not any(np.any(got[t][leaf].param) for t in range(STEPS) for leaf in SIGNS)
    assert not violations(case, got)


@pytest.mark.promise("signed zero")
@every_backend
@pytest.mark.parametrize("clip", [None, 0.25])
@pytest.mark.parametrize("eps", [1e-16, 0.0])
def test_a_zero_gradient_moves_nothing_whatever_its_sign(backend: Backend, clip: float | None, eps: float) -> None:
    # With eps = eps_root = 0 the equations say 0 / 0. The rule takes the smallest normal number for eps, so it is 0.
    zeros = np.zeros((STEPS, 5), np.float32) * SIGNS["both"][:, None].astype(np.float32)
    hyper = {"clip_exponent": clip, "eps": eps, "eps_root": eps}
    for step in backend.run(prescribed(hyper, {"w": zeros})):
        for x in step["w"][1:3]:
            np.testing.assert_array_equal(x, np.zeros(5))
        assert np.all(step["w"].nu >= 0.0)


@pytest.mark.promise("nothing to divide by")
@every_backend
@pytest.mark.parametrize("clip", [None, 0.25])
def test_a_second_moment_of_zero_without_eps(backend: Backend, clip: float | None) -> None:
    # After a zero gradient s = 0: g is divided by 2**-126, which float32 can hold for |g| < 4; beyond, it is infinite.
    x = np.array([0.0, 1e-30, 1e-3, 1.0, -3.99, 1e9, -1e9], np.float32)
    if backend.name == "stepper_threads" and clip is None:
        x = x[:-2]  # which it refuses, as asked to
    with np.errstate(over="ignore"):
        steps = backend.run(
            prescribed(
                {"learning_rate": 1.0, "eps": 0.0, "eps_root": 0.0, "clip_exponent": clip},
                {"w": np.stack([0.0 * x, x])},
            )
        )
        expected = -x / np.float32(2.0**-126)
    if clip is not None:
        expected = np.clip(expected, -np.float32(2.0**clip), np.float32(2.0**clip))
    np.testing.assert_array_max_ulp(steps[1]["w"].param, expected, 1)


@pytest.mark.promise("constant gradient")
@every_backend
@pytest.mark.parametrize("eps_root", [1e-16, 0.0])
def test_equal_gradients_leave_no_residual(backend: Backend, eps_root: float) -> None:
    # Once m is g, every difference in the rule is 0 exactly, for as long as g stays: s decays to what eps_root holds.
    g = np.array([1.0, -0.3, 1e-3, 12345.678], np.float32)
    steps, b2 = 40 if backend.name == "dask" else 200, 0.5  # which takes its time for each
    hyper = {"learning_rate": 1.0, "b2": b2, "eps_root": eps_root, "clip_exponent": 0.25}
    start = 1000, {"w": g}, {"w": np.ones_like(g)}
    got = backend.run(prescribed(hyper, {"w": np.broadcast_to(g, (steps, g.size)).copy()}, start=start))
    for step in got:
        np.testing.assert_array_equal(step["w"].mu, g)
    exact = np.float64(b2) ** np.arange(1, steps + 1)
    limit = eps_root / (1.0 - b2)
    exact = limit + (1.0 - limit) * exact
    nu = np.stack([step["w"].nu for step in got])
    # to float32 of a geometric series; at the end every backend holds its limit, or 0 by way of denormal numbers
    np.testing.assert_allclose(nu, np.broadcast_to(exact[:, None], nu.shape), rtol=1e-6, atol=2.0**-126)
    t = np.arange(1001, 1001 + steps)[:, None]
    expected = np.clip(g / np.sqrt(np.concatenate([np.ones((1, 1)), exact[:-1, None]])), -(t**0.25), t**0.25)
    np.testing.assert_allclose(np.stack([step["w"].param for step in got])[1:], -expected[1:], rtol=1e-6)


@pytest.mark.promise("many steps done")
@every_backend
@pytest.mark.parametrize("count", [2**24 - 1, 2**31 - 2, 2**31 - 1])
def test_after_two_billion_steps(backend: Backend, count: int) -> None:
    # An int grows; an int32 array stays at 2**31 - 1; torch's own count is a float32, which rounds beyond 2**24. None
    # of that is seen in the update: the bias correction is 1 by then, and t^p is that of the neighbouring numbers.
    rng = np.random.default_rng(0)
    g, mu, nu = rng.normal(size=(3, 7)), rng.normal(size=7), rng.uniform(1e-3, 1.0, 7)
    g[:, 0] *= 1e6  # which the clip holds at t^p
    for b2 in (0.999, 1.0 - 2.0**-53):
        hyper = {"learning_rate": 1.0, "b2": b2, "clip_exponent": 0.25}
        start = count, {"w": mu.astype(np.float32)}, {"w": nu.astype(np.float32)}
        got = backend.run(prescribed(hyper, {"w": g.astype(np.float32)}, start=start))
        s_hat = nu.astype(np.float32).astype(np.float64) / -np.expm1(count * np.log(b2))
        limit = float(count + 1) ** 0.25
        expected = -np.clip(g[0].astype(np.float32) / np.sqrt(s_hat), -limit, limit)
        with attempt():
            np.testing.assert_allclose(got[0]["w"].param, expected, rtol=4 * 2.0**-23)
            assert all(np.all(np.isfinite(x)) for step in got for x in step["w"][1:4])


@pytest.mark.promise("empty and 0-d")
@every_backend
def test_arrays_without_elements_and_without_axes(backend: Backend) -> None:
    # XLA compiles each leaf of a loop's body by itself, and rounds a * b + c once in one and twice in another.
    ulps = 1 if backend.name == "jax_scan" else 0
    shapes: dict[str, tuple[int, ...]] = {
        "one": (1,),
        "none": (),
        "ones": (1, 1, 1),
        "empty": (0,),
        "hollow": (3, 0, 2),
    }
    for dtype in FLOATS:
        one = np.random.default_rng(0).normal(size=STEPS).astype(dtype)
        grads = {
            name: np.broadcast_to(one.reshape(-1, *[1] * len(shape)), (STEPS, *shape)).copy()
            for name, shape in shapes.items()
        }
        for step in backend.run(prescribed({"clip_exponent": 0.25}, grads)):
            with attempt():
                for name, shape in shapes.items():
                    for x, y in zip(step[name][1:4], step["one"][1:4], strict=True):
                        assert x.shape == shape
                        assert x.dtype == y.dtype
                        np.testing.assert_array_max_ulp(x, np.broadcast_to(y[0], shape), ulps)


@pytest.mark.promise("rate of zero")
@every_backend
def test_a_learning_rate_of_zero_moves_nothing_and_still_learns(backend: Backend) -> None:
    grads = streams("float32", magnitudes("float32"))
    still = backend.run(prescribed({"learning_rate": 0.0}, grads))
    moving = backend.run(prescribed({"learning_rate": 1e-3}, grads))
    for a, b in zip(still, moving, strict=True):
        for leaf in grads:
            np.testing.assert_array_equal(a[leaf].param, np.zeros_like(a[leaf].param))
            np.testing.assert_array_equal(a[leaf].mu, b[leaf].mu)
            np.testing.assert_array_equal(a[leaf].nu, b[leaf].nu)


@pytest.mark.promise("isolation")
@every_backend
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30], ids=str)
@pytest.mark.parametrize("clip", [None, 0.25])
def test_what_is_not_finite_spoils_its_own_element_and_no_other(
    backend: Backend, bad: float, clip: float | None
) -> None:
    good = np.random.default_rng(0).normal(size=(STEPS, 19)).astype(np.float32)
    poisoned = good.copy()
    poisoned[3, 7] = bad
    hyper = {"clip_exponent": clip}
    others = np.arange(19) != 7
    if backend.name == "stepper_threads":
        with pytest.raises(FloatingPointError, match="'w'.*; nothing was changed"):
            backend.run(prescribed(hyper, {"w": poisoned, "v": good}))
        return
    with np.errstate(over="ignore", invalid="ignore"):
        got = backend.run(prescribed(hyper, {"w": poisoned, "v": good}))
    for step in got:
        for x, y in zip(step["w"][1:4], step["v"][1:4], strict=True):
            np.testing.assert_array_equal(x[others], y[others])
    # and what becomes of that one, as docs/reliability.md has it
    update, s = np.stack([step["w"].param[7] for step in got]), np.stack([step["w"].nu[7] for step in got])
    assert np.isfinite(update[3]) == (np.isfinite(bad) or (np.isinf(bad) and clip is not None))
    assert not np.isfinite(s[3])
    assert np.all(np.isnan(s[4:]))
    assert np.all(np.isnan(update[5:]))
