"""A traced step of optax's transformation has the bits of the functional core on NumPy."""

import dataclasses
import gc
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


def differences(dtype: str, steps: int, *, jit: bool = True, **options: Any) -> list[list[int]]:
    """Return how many elements of update, parameter, moments and carry differ after each step."""
    params, grads = start(dtype, steps)
    core, transform = ACProp(1e-2, **options), acprop(1e-2, **options)
    state, own = core.init(params), jnp.asarray(params)
    own_state = transform.init(own)
    step = jax.jit(train_step(transform)) if jit else train_step(transform)
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


@widths("float32", "float64")
def test_only_what_the_mask_marks_decays_and_all_has_the_same_bits(width: Width) -> None:
    mask = {"a": True, "b": False}
    params, grads = start(width.dtype, 30)
    options = {"weight_decay": 0.1, "mask": mask, "clip_exponent": 0.25}
    core, transform = ACProp(1e-2, **options), acprop(1e-2, **options)
    wanted = dict.fromkeys(mask, params)
    own = jax.tree.map(jnp.asarray, wanted)
    state, own_state = core.init(wanted), transform.init(own)
    step = jax.jit(train_step(transform))
    for grad in grads:
        update, state = core.update(dict.fromkeys(mask, grad), state, wanted)
        wanted = core.apply(wanted, update)
        own, own_state, _ = step(own, own_state, dict.fromkeys(mask, grad))
    assert differing(own["a"], own["b"]) > 900
    for name in mask:
        assert not differing(own[name], wanted[name])


@widths("float32", "float64")
def test_a_step_that_is_differentiated_has_the_same_bits(width: Width) -> None:
    params, grads = start(width.dtype, 30)
    core, transform = (f(1e-2, clip_exponent=0.25, weight_decay=0.1) for f in (ACProp, acprop))
    step = train_step(transform)

    def loss(grad: Any, params: Any, state: Any) -> Any:
        after = step(params, state, grad)[:2]
        return jnp.sum(after[0]), after

    state, own = core.init(params), jnp.asarray(params)
    own_state = transform.init(own)
    differentiated = jax.jit(jax.value_and_grad(loss, has_aux=True))
    for grad in grads:
        update, state = core.update(grad, state, params)
        params = core.apply(params, update)
        (_, (own, own_state)), _ = differentiated(grad, own, own_state)
        assert not differing(own, params)
        assert not differing(own_state[0].nu, state.nu)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_injected_hyperparameters_have_the_same_bits_if_decay_rates_stay_numbers(dtype: str) -> None:
    params, grads = start(dtype, 30)
    options = {"b1": 0.9, "b2": 0.999, "clip_exponent": 0.25}
    core = ACProp(1e-2, weight_decay=0.1, **options)
    inject = optax.inject_hyperparams(acprop, static_args=tuple(options), hyperparam_dtype=jnp.float32)
    transform = inject(1e-2, weight_decay=0.1, **options)
    state, own = core.init(params), jnp.asarray(params)
    own_state = transform.init(own)
    step = jax.jit(train_step(transform))
    for grad in grads:
        update, state = core.update(grad, state, params)
        params = core.apply(params, update)
        own, own_state, _ = step(own, own_state, grad)
        assert not differing(own, params)


def ulps(options: dict[str, Any], counts: range, dtype: str, *, jit: bool = True) -> dict[str, tuple[int, int]]:
    """Return for each number of these steps in how many of them JAX's differs, and by how many units at most."""
    transform = ACProp(1.0, **options)
    hyper = rule.Hyperparameters(**options)

    def numbers(count: Any) -> Any:
        found = rule.numbers_of(hyper, count, _xla.namespace)
        return _xla._from_table(found, transform, count) if jit else found

    own = jax.vmap(numbers)
    own = (jax.jit(own) if jit else own)(jnp.arange(counts.start, counts.stop))
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


@pytest.mark.parametrize(("b2", "of_scale", "units_of_scale"), [(0.999, 0, 0), (0.9999, 1_600, 1), (0.99999, 8_200, 5)])
@widths("float32")
def test_the_numbers_of_later_steps_are_next_to_those_of_the_host(
    width: Width, b2: float, of_scale: int, units_of_scale: int
) -> None:
    later = ulps({"b2": b2, "clip_exponent": 0.25}, range(_xla.STEPS, _xla.STEPS + 10_000), "float32")
    for name, steps, units in (("scale", of_scale, units_of_scale), ("limit", 11, 1)):  # as docs/guarantees.md says
        assert np.all(np.less_equal(later[name], (0, 0) if width.has_64_bits else (steps, units)))


@widths("float32")
def test_the_numbers_of_a_step_that_is_not_compiled(width: Width) -> None:
    found = ulps({"clip_exponent": 0.25}, range(10_000), "float32", jit=False)
    for name, steps, units in (("scale", 2_200, 5), ("limit", 4, 1)):  # as docs/guarantees.md says
        assert np.all(np.less_equal(found[name], (0, 0) if width.has_64_bits else (steps, units)))


@widths("float32")
def test_a_step_that_is_not_compiled_has_the_moments_of_numpy(width: Width) -> None:
    update, _, mu, nu = np.transpose(differences("float32", 100, jit=False))
    assert not np.any([mu, nu])
    assert ((update > 0).sum() > 0) != width.has_64_bits


def test_a_sweep_of_learning_rates_keeps_no_program() -> None:
    params = jnp.ones(3)

    def sweep(rates: range) -> int:
        for rate in rates:
            transform = acprop(rate / 1e3, clip_exponent=0.25)
            jax.eval_shape(transform.update, params, transform.init(params), params)
        gc.collect()
        return len(gc.get_objects())

    before = sweep(range(1, 41))  # more than are kept
    assert sweep(range(41, 61)) - before < 20 * 20  # a program is some 180 objects


def test_a_table_is_made_once() -> None:
    _xla._table.cache_clear()
    params = jnp.ones(3)
    for rate in (1e-2, 1e-3):
        transform = acprop(rate, clip_exponent=0.25)
        for _ in range(2):
            jax.jit(transform.update).lower(params, transform.init(params), params)
    assert _xla._table.cache_info().misses == 1
