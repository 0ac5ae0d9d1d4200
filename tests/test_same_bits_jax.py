"""A traced step of optax's transformation has the bits of the functional core on NumPy."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from acprop_core import ACProp, rule
from acprop_optax import _xla, acprop

SIZE = 1_003  # vectors, and a rest
CORNERS = {
    "plain": {},
    "clip and decay": {"clip_exponent": 0.25, "weight_decay": 0.1},
    "previous": {"centering": "previous", "clip_exponent": 0.5},
    "adashift": {"centering": "none"},
    "adabelief": {"asynchronous": False, "weight_decay": 0.1},
    "adam": {"asynchronous": False, "centering": "none", "clip_exponent": 0.25},
    "light": {"b1": 0.3, "b2": 0.4},
    "slow": {"b1": 0.99, "b2": 0.9999, "eps": 1e-3, "eps_root": 0.0},
}


@dataclasses.dataclass(frozen=True)
class Width:
    """A dtype, in a mode of JAX."""

    dtype: str
    has_64_bits: bool

    def __str__(self) -> str:
        return f"{self.dtype} in {64 if self.has_64_bits else 32}-bit mode"


@pytest.fixture
def width(request: pytest.FixtureRequest) -> Iterator[Width]:
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", request.param.has_64_bits)
    yield request.param
    jax.config.update("jax_enable_x64", before)


def widths(*dtypes: str) -> Any:
    every = [Width(dtype, mode) for dtype in dtypes for mode in (False, True) if mode or dtype != "float64"]
    return pytest.mark.parametrize("width", every, indirect=True, ids=str)


def start(dtype: str, steps: int) -> tuple[Any, Any]:
    """Return parameters and gradients of many magnitudes, some of them 0.0 and -0.0."""
    rng = np.random.default_rng(3)
    params = rng.standard_normal(SIZE).astype(dtype)
    grads = rng.standard_normal((steps, SIZE)) * np.exp(2.0 * rng.standard_normal((steps, SIZE)))
    grads[:, :5], grads[:, 5:10] = 0.0, -0.0
    return params, grads.astype(dtype)


def train_step(transform: optax.GradientTransformation) -> Callable[..., Any]:
    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = transform.update(grads, state, params)
        return optax.apply_updates(params, updates), state, updates

    return step


def differing(a: Any, b: Any) -> int:
    """Return the number of elements that differ in any bit."""
    a, b = np.asarray(a), np.asarray(b)
    assert a.dtype == b.dtype
    return int((a.view(f"u{a.itemsize}") != b.view(f"u{b.itemsize}")).sum())


def differences(dtype: str, steps: int, **options: Any) -> list[list[int]]:
    """Return how many elements of update, parameter, moments and carry differ after each step."""
    params, grads = start(dtype, steps)
    core, transform = ACProp(1e-2, **options), acprop(1e-2, **options)
    state, own = core.init(params), jnp.asarray(params)
    own_state = transform.init(own)
    step = jax.jit(train_step(transform))
    found = []
    for grad in grads:
        update, state = core.update(grad, state, params)
        params = core.apply(params, update)
        own, own_state, own_update = step(own, own_state, grad)
        pairs = [(update, own_update), (params, own), (state.mu, own_state[0].mu), (state.nu, own_state[0].nu)]
        if options.get("compensate"):
            pairs.append((state.carry, own_state[3].carry))
        found.append([differing(*pair) for pair in pairs])
    return found


@pytest.mark.parametrize("options", CORNERS.values(), ids=CORNERS)
@widths("float32", "float64")
def test_a_thousand_steps_have_the_bits_of_numpy(width: Width, options: dict[str, Any]) -> None:
    assert not np.any(differences(width.dtype, 1_000, **options))


@pytest.mark.parametrize("compensate", [False, True], ids=["plain", "compensate"])
@widths("float16", "bfloat16")
def test_16_bits_have_the_bits_of_numpy(width: Width, compensate: bool) -> None:
    assert not np.any(differences(width.dtype, 300, clip_exponent=0.25, weight_decay=0.1, compensate=compensate))


@pytest.fixture
def fresh_caches() -> Iterator[None]:
    """Let no program that JAX has cached pass for one of a changed function, now or afterwards."""
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.mark.usefixtures("fresh_caches")
@widths("float32", "float64")
def test_without_the_zeros_the_moments_differ(width: Width, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_xla._Rounded, "rounded", property(lambda x: x.x))
    _, _, mu, nu = differences(width.dtype, 20)[-1]
    assert mu + nu > 10


@widths("float32")
def test_without_the_table_the_updates_differ(width: Width, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_xla, "_from_table", lambda numbers, optimizer, count: numbers)
    update, _, mu, nu = np.sum(differences(width.dtype, 20), axis=0)
    assert mu == nu == 0
    assert (update > 0) != width.has_64_bits  # there float64 is rounded to float32


@widths("float32", "float64")
def test_scan_and_vmap_have_the_same_bits(width: Width) -> None:
    params, grads = start(width.dtype, 50)
    transform = acprop(1e-2, clip_exponent=0.25)
    step = train_step(transform)

    @jax.jit
    def train(params: Any, state: Any, grads: Any) -> Any:
        return jax.lax.scan(lambda carry, grad: (step(*carry, grad)[:2], None), (params, state), grads)[0]

    core = ACProp(1e-2, clip_exponent=0.25)
    wanted, state = params, core.init(params)
    for grad in grads:
        update, state = core.update(grad, state, wanted)
        wanted = core.apply(wanted, update)
    own = jnp.asarray(params)
    assert not differing(train(own, transform.init(own), grads)[0], wanted)
    rows, states = jnp.stack([own, own]), jax.tree.map(lambda x: jnp.stack([x, x]), transform.init(own))
    for row in jax.jit(jax.vmap(train, in_axes=(0, 0, None)))(rows, states, grads)[0]:
        assert not differing(row, wanted)


def ulps(options: dict[str, Any], counts: range, dtype: str) -> dict[str, tuple[int, int]]:
    """Return for each number of these steps in how many of them JAX's differs, and by how many units at most."""
    transform = ACProp(1.0, **options)
    hyper = rule.Hyperparameters(**options)

    def numbers(count: Any) -> Any:
        return _xla._from_table(rule.numbers_of(hyper, count, _xla.namespace), transform, count)

    own = jax.jit(jax.vmap(numbers))(jnp.arange(counts.start, counts.stop))
    own = {name: np.asarray(x) for name, x in own._asdict().items() if x.shape}
    hosts = [rule.numbers_of(hyper, count, np) for count in counts]
    found = {}
    for name in ("scale", "offset", "mean_scale", "limit", "dither"):
        host = np.array([getattr(k, name) for k in hosts]).astype(dtype)
        mine = np.broadcast_to(own[name].astype(dtype), host.shape) if name in own else host
        apart = np.abs(host.view(f"i{host.itemsize}") - mine.view(f"i{host.itemsize}"))
        found[name] = int((apart > 0).sum()), int(apart.max())
    return found


@pytest.mark.parametrize("b2", [0.9, 0.999, 0.99999])
@pytest.mark.parametrize("asynchronous", [True, False])
@widths("float32", "float64")
def test_the_numbers_of_the_first_steps_are_those_of_the_host(width: Width, b2: float, asynchronous: bool) -> None:
    options = {"b2": b2, "asynchronous": asynchronous, "clip_exponent": 0.25, "compensate": True}
    for name, (steps, _) in ulps(options, range(_xla.STEPS), width.dtype).items():
        assert steps == 0, name


@pytest.mark.parametrize(("b2", "of_scale"), [(0.999, 0), (0.9999, 1_600)])
def test_the_numbers_of_later_steps_are_next_to_those_of_the_host(b2: float, of_scale: int) -> None:
    later = ulps({"b2": b2, "clip_exponent": 0.25}, range(_xla.STEPS, _xla.STEPS + 10_000), "float32")
    for name, bound in (("scale", of_scale), ("limit", 11)):  # as docs/guarantees.md says
        steps, units = later[name]
        assert steps <= bound
        assert units <= 1


def test_a_table_is_made_once() -> None:
    _xla._table.cache_clear()
    params = jnp.ones(3)
    for rate in (1e-2, 1e-3):
        transform = acprop(rate, clip_exponent=0.25)
        for _ in range(2):
            jax.jit(transform.update).lower(params, transform.init(params), params)
    assert _xla._table.cache_info().misses == 1
