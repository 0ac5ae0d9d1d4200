"""Laws that the steps of every backend obey, by hypothesis: what must come out to the bit for any gradients.

The parameters of these cases are zeros before every step, so that each parameter afterwards is the update itself.
"""

import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from acprop_core import ACProp
from cases import DTYPES, Hyper, prescribed
from hosts import Backend, on_every_backend
from promises import attempt

# torch.compile makes a program for each dtype and each choice of these, for seconds; the reference suite runs them all.
ONE_PROGRAM: Hyper = {"b1": 0.9, "b2": 0.999, "clip_exponent": 0.25, "centering": "current", "asynchronous": True}

every_backend = on_every_backend()


def holds(backend: Backend, **strategies: st.SearchStrategy[Any]) -> Callable[[Callable[..., None]], None]:
    """Run the decorated law on examples of these strategies: always the same ones, each counted as one attempt."""

    def decorate(law: Callable[..., None]) -> None:
        @settings(
            max_examples=3 if backend.slow_start else 12,
            derandomize=True,
            database=None,
            deadline=None,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
        )
        @given(**strategies)
        def run(**example: Any) -> None:
            with attempt():
                law(**example)

        run()

    return decorate


@st.composite
def gradients(draw: Any, backend: Backend, low: float = -3.0, high: float = 3.0, steps: int = 6) -> np.ndarray:
    """Return gradients, (steps, n): noise between the powers of ten `low` and `high`, and values laid into it."""
    dtypes = ["float32", "float64", "bfloat16"]
    if backend.name == "torch_fused_by_inductor":
        dtypes = ["float32"]
    dtype = draw(st.sampled_from([d for d in dtypes if d not in backend.lacks]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    # with and without elements that are left over from the lanes of a vector; Dask pays for each chunk of two
    n = draw(st.sampled_from([7, 1, 8] if backend.name == "dask" else [37, 1, 8, 67]))
    x = rng.choice([-1.0, 1.0], (steps, n)) * 10.0 ** rng.uniform(low, high, (steps, n))
    special = st.one_of(
        st.sampled_from([0.0, -0.0, 1.0, -1.0, 10.0**low, -(10.0**high)]),
        st.floats(10.0**low, 10.0**high),
        st.floats(-(10.0**high), -(10.0**low)),
    )
    for i, j, value in draw(st.lists(st.tuples(st.integers(0, steps - 1), st.integers(0, n - 1), special), max_size=8)):
        x[i, j] = value
    if draw(st.booleans()):
        x[:, 0] = x[0, 0]  # a constant gradient, whose residual vanishes
    return x.astype(DTYPES[dtype])


def hypers(backend: Backend, **fixed: Any) -> st.SearchStrategy[Hyper]:
    """Return hyperparameters, of which some may be fixed."""
    if backend.name == "torch_fused_by_inductor":
        fixed = ONE_PROGRAM | fixed
    free: dict[str, st.SearchStrategy[Any]] = {
        "learning_rate": st.sampled_from([1e-3, 0.1, 1.0, 2.0**-7]),
        "b1": st.sampled_from([0.9, 0.3, 0.0, 0.999]),
        "b2": st.sampled_from([0.999, 0.2, 0.0, 0.9, 0.99999]),
        "eps": st.sampled_from([1e-16, 1e-8, 1e-3]),
        "eps_root": st.sampled_from([1e-16, 1e-8, 0.0]),
        "clip_exponent": st.sampled_from([None, 0.25, 0.0]),
        "centering": st.sampled_from(["current", "previous", "none"]),
        "asynchronous": st.booleans(),
    }
    return st.fixed_dictionaries({k: st.just(fixed[k]) if k in fixed else v for k, v in free.items()})


class Steps(NamedTuple):
    """Updates and moments after each step, (steps, *shape)."""

    update: np.ndarray
    mu: np.ndarray
    nu: np.ndarray


def steps_of(backend: Backend, hyper: Hyper, grads: dict[str, np.ndarray], **options: Any) -> dict[str, Steps]:
    """Run gradients, (steps, *shape) by leaf, through a backend."""
    records = backend.run(prescribed(hyper, grads, **options))
    return {
        leaf: Steps(*(np.stack([getattr(record[leaf], name) for record in records]) for name in ("param", "mu", "nu")))
        for leaf in grads
    }


def assert_same(a: Steps, b: Steps) -> None:
    for x, y in zip(a, b, strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x.astype(np.float64), y.astype(np.float64), strict=True)


@pytest.mark.promise("sign")
@every_backend
def test_opposite_gradients_give_opposite_updates(backend: Backend) -> None:
    @holds(backend, grads=gradients(backend), hyper=hypers(backend))
    def _(grads: np.ndarray, hyper: Hyper) -> None:
        steps = steps_of(backend, hyper, {"w": grads, "v": -grads})
        there, back = steps["w"], steps["v"]
        assert_same(there, Steps(-back.update, -back.mu, back.nu))


@pytest.mark.promise("scale")
@every_backend
def test_the_scale_of_the_gradients_does_not_matter(backend: Backend) -> None:
    # Exactly for powers of two, which round nothing. There must be something to divide by: a first gradient that is not
    # 0, and averages (for b2 = 0 a constant gradient has s = 0, for b1 = 0 every gradient; see test_extremes.py).
    averages = {"b1": st.sampled_from([0.9, 0.3, 0.999]), "b2": st.sampled_from([0.999, 0.2, 0.9, 0.99999])}

    @holds(
        backend,
        grads=gradients(backend),
        hyper=hypers(backend, eps=0.0, eps_root=0.0),
        rates=st.fixed_dictionaries(averages),
        power=st.integers(-12, 12),
    )
    def _(grads: np.ndarray, hyper: Hyper, rates: Hyper, power: int) -> None:
        grads[0][grads[0] == 0.0] = 1.0
        if backend.name != "torch_fused_by_inductor":
            hyper = hyper | rates
        factor = 2.0**power
        scaled = (grads.astype(np.float64) * factor).astype(grads.dtype)
        steps = steps_of(backend, hyper, {"w": grads, "v": scaled})
        one, other = steps["w"], steps["v"]
        np.testing.assert_array_equal(one.mu * factor, other.mu)
        np.testing.assert_array_equal(one.nu * factor**2, other.nu)
        np.testing.assert_array_equal(one.update[1:], other.update[1:])


@pytest.mark.promise("permutation")
@every_backend
def test_elements_do_not_know_their_places(backend: Backend) -> None:
    @holds(backend, grads=gradients(backend), hyper=hypers(backend), seed=st.integers(0, 2**32 - 1))
    def _(grads: np.ndarray, hyper: Hyper, seed: int) -> None:
        order = np.random.default_rng(seed).permutation(grads.shape[1])
        steps = steps_of(backend, hyper, {"w": grads, "v": grads[:, order]})
        assert_same(Steps(*(x[:, order] for x in steps["w"])), steps["v"])


@pytest.mark.promise("split")
@every_backend
def test_the_parts_of_an_array_step_as_the_whole(backend: Backend) -> None:
    places = st.floats(0.0, 1.0, allow_subnormal=False)  # what Inductor of torch 2.5 links flushes them in the process

    @holds(backend, grads=gradients(backend), hyper=hypers(backend), where=places)
    def _(grads: np.ndarray, hyper: Hyper, where: float) -> None:
        cut = round(where * grads.shape[1])
        whole = steps_of(backend, hyper, {"w": grads})["w"]
        parts = steps_of(backend, hyper, {"a": grads[:, :cut], "b": grads[:, cut:]})
        joined = (np.concatenate([x, y], axis=1) for x, y in zip(parts["a"], parts["b"], strict=True))
        assert_same(whole, Steps(*joined))


class Pair(NamedTuple):
    first: Any
    second: Any


@pytest.mark.promise("nesting")
@every_backend
def test_containers_do_not_matter(backend: Backend) -> None:
    # The torch optimizer has groups for containers: one of two parameters stands against two of one.
    def nest(leaves: dict[str, Any]) -> Any:
        return [{"deep": (Pair(leaves["b"], {}),)}, leaves["a"]]

    def unnest(tree: Any) -> dict[str, Any]:
        return {"a": tree[1], "b": tree[0]["deep"][0].first}

    @holds(backend, grads=gradients(backend), hyper=hypers(backend), cut=st.integers(0, 8))
    def _(grads: np.ndarray, hyper: Hyper, cut: int) -> None:
        leaves = {"a": grads[:, cut:], "b": grads[:, :cut]}
        flat = steps_of(backend, hyper, leaves)
        nested = steps_of(backend, hyper, leaves, nest=nest, unnest=unnest)
        for leaf in leaves:
            assert_same(flat[leaf], nested[leaf])


@pytest.mark.promise("resume")
@every_backend
def test_a_run_that_was_stopped_goes_on_as_if_it_were_not(backend: Backend) -> None:
    @holds(backend, grads=gradients(backend), hyper=hypers(backend), stop=st.integers(1, 5))
    def _(grads: np.ndarray, hyper: Hyper, stop: int) -> None:
        whole = steps_of(backend, hyper, {"w": grads})["w"]
        start = stop, {"w": whole.mu[stop - 1]}, {"w": whole.nu[stop - 1]}
        rest = steps_of(backend, hyper, {"w": grads[stop:]}, start=start)["w"]
        assert_same(Steps(*(x[stop:] for x in whole)), rest)


@pytest.mark.promise("clip")
@every_backend
def test_no_step_is_larger_than_the_clip_allows(backend: Backend) -> None:
    @holds(
        backend,
        grads=gradients(backend, -15.0, 15.0),
        hyper=hypers(backend),
        exponent=st.sampled_from([0.25, 0.0, 0.5, 1.0]),
        count=st.sampled_from([0, 1, 1000, 10**6]),
    )
    def _(grads: np.ndarray, hyper: Hyper, exponent: float, count: int) -> None:
        zero = np.zeros(grads.shape[1:], np.float64 if grads.dtype == np.float64 else np.float32)
        steps = steps_of(backend, {**hyper, "clip_exponent": exponent}, {"w": grads}, start=(count, *[{"w": zero}] * 2))
        t = np.arange(count + 1, count + 1 + len(grads), dtype=np.float64)
        # lr and t^p are rounded to the arithmetic, and so is their product; rounding is monotonic, so no more is lost.
        # A count that is an array has its power in the widest float of the library, float32 in JAX: 2 epsilons of it.
        slack = 2.0**-22 if backend.name.startswith(("jax", "optax")) and zero.dtype == np.float32 else 0.0
        bound = (zero.dtype.type(hyper["learning_rate"]) * (t**exponent * (1.0 + slack)).astype(zero.dtype))[:, None]
        assert np.all(np.abs(steps["w"].update) <= bound.astype(grads.dtype))


@pytest.mark.promise("finite")
@every_backend
def test_the_second_moment_is_never_negative_and_nothing_is_nan(backend: Backend) -> None:
    @holds(backend, grads=gradients(backend, -18.0, 18.0), hyper=hypers(backend))
    def _(grads: np.ndarray, hyper: Hyper) -> None:
        steps = steps_of(backend, hyper, {"w": grads})["w"]
        assert np.all(steps.nu >= 0.0)
        assert np.all(np.isfinite(steps.mu))
        assert not np.any(np.isnan(steps.update))


@pytest.mark.promise("first step")
@every_backend
def test_the_first_step_is_that_of_gradient_descent(backend: Backend) -> None:
    # of an asynchronous step; exactly, with an eps that is invisible next to 1: d = g / (sqrt(1) + eps) = g, and one
    # rounding for -lr g
    @holds(backend, grads=gradients(backend, -18.0, 18.0, steps=1), hyper=hypers(backend, eps=1e-17, asynchronous=True))
    def _(grads: np.ndarray, hyper: Hyper) -> None:
        arithmetic = np.float64 if grads.dtype == np.float64 else np.float32
        g = grads.astype(arithmetic)
        if hyper["clip_exponent"] is not None:
            g = np.clip(g, -1.0, 1.0)
        expected = (arithmetic(-hyper["learning_rate"]) * g).astype(grads.dtype)
        update = steps_of(backend, hyper, {"w": grads})["w"].update
        np.testing.assert_array_equal(update.astype(np.float64), expected.astype(np.float64))


@pytest.mark.promise("vmap")
@pytest.mark.parametrize("backend", ["jax", "optax", "torch"])
def test_vmap_is_a_loop(backend: str) -> None:
    # The namespaces that have a vmap; of the others, test_the_parts_of_an_array_step_as_the_whole says the same.
    if importlib.util.find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")
    grads = np.random.default_rng(0).normal(size=(6, 5, 7)).astype(np.float32)
    hyper: Hyper = {"learning_rate": 0.1, "clip_exponent": 0.25}
    if backend == "torch":
        import torch

        vmap, asarray = torch.func.vmap, torch.from_numpy
    else:
        import jax

        vmap, asarray = jax.vmap, jax.numpy.asarray
    if backend == "optax":
        import acprop_optax

        init, update = acprop_optax.acprop(**hyper)
    else:
        init, update = ACProp(**hyper).init, ACProp(**hyper).update

    def run(gs: Any) -> Any:
        params = gs[0] * 0.0
        state = init(params)
        steps = []
        for g in gs:
            updates, state = update(g, state, params)
            steps.append(updates)
        return tuple(steps)

    together = vmap(run, 1)(asarray(grads))
    for i in range(5):
        alone = run(asarray(grads[:, i].copy()))
        for x, y in zip(together, alone, strict=True):
            with attempt():
                np.testing.assert_array_equal(np.asarray(x[i]), np.asarray(y))
