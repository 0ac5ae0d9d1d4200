"""compensate=True keeps small updates of 16-bit parameters. How exactly, the suite says (compensated-*)."""

import pytest

pytest.importorskip("torch")

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import array_api_compat.numpy
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import torch

import acprop_optax
import acprop_stepper
import acprop_torch
from acprop_core import ACProp, State, load, rule, save
from agreement import Record
from cases import DTYPES, Case, prescribed
from hosts import Host, compensated
from test_portable import HOSTS

pytestmark = pytest.mark.promise("compensation")
SIXTEEN_BITS = ["bfloat16", "float16"]
HYPER = {
    "learning_rate": 1e-4,
    "b1": 0.0,
    "clip_exponent": 0.0,
    "compensate": True,
}  # a constant gradient moves by 1e-4


def ones(dtype: str) -> np.ndarray:
    return np.ones(3, DTYPES[dtype])


@pytest.mark.parametrize("begin", HOSTS)
@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
def test_updates_below_half_a_place_add_up(dtype: str, begin: Callable[[Case], Host]) -> None:
    """A thousand updates of -1e-4 take 1 to 0.9; without carry, each is rounded away."""

    def run(**hyper: Any) -> Record:
        host = begin(prescribed({**HYPER, **hyper}, {"w": np.broadcast_to(ones(dtype), (1000, 3))}))
        host.put({"w": ones(dtype)})
        host.advance({"w": host.case.grads("w")})
        return host.read()["w"]

    _, param, _, _, carry = run()
    assert (param.dtype, carry.dtype) == (DTYPES[dtype], DTYPES[dtype])
    unit = 2.0**-16  # in the last place of 16 significant bits
    np.testing.assert_allclose(param.astype(np.float64) + carry.astype(np.float64), 0.9, rtol=0, atol=2 * unit)
    assert (param == DTYPES[dtype].type(0.9)).all()
    _, param, _, _, carry = run(compensate=False)
    assert (param == 1).all()
    assert carry is None


def numbers_of(count: Any, xp: Any) -> rule.Numbers:
    return rule.numbers_of(rule.Hyperparameters(compensate=True), count, xp)


def sixteen(x: np.ndarray, dtype: str) -> np.ndarray:
    """Return the numbers of a 16-bit dtype as float64, the nearest to `x`."""
    return x.astype(DTYPES[dtype]).astype(np.float64)


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
def test_nothing_is_lost_in_a_step(dtype: str) -> None:
    """The update is a 16-bit number, parameter plus update is one, and the carry what is missing, to a last place."""
    rng = np.random.default_rng(0)
    digits, least = {"bfloat16": (8, 0.0), "float16": (11, 2.0**-23)}[dtype]  # float16 has few numbers that small
    size = 2.0 ** rng.uniform(-10, 10, 20_000)
    signs = rng.choice([-1, 1], (3, size.size))
    param = sixteen(size * signs[0], dtype)
    carry = sixteen(np.abs(param) * 2.0 ** -rng.uniform(digits + 1, 2 * digits, size.size) * signs[1], dtype)
    update = (size * 2.0 ** rng.uniform(-3 * digits, 2, size.size) * signs[2]).astype(np.float32)
    v, kept = compensated(update, *(x.astype(DTYPES[dtype]) for x in (param, carry)), numbers_of(5, np))
    assert (v.dtype, kept.dtype) == (DTYPES[dtype], DTYPES[dtype])
    new = param + v.astype(np.float64)
    larger = np.abs(new) > np.abs(param)  # a sum of more bits must then be rounded: by everyone, to the same number
    assert (sixteen(new, dtype) == new)[~larger].all()
    new = sixteen(new, dtype)
    lost = param + carry + update.astype(np.float64) - new
    place = np.maximum(2.0 ** (np.floor(np.log2(np.maximum(np.abs(new), 1e-300))) - 2 * digits), least)
    # where the update had to be rounded for its size, so much is lost that the carry has a larger last place too
    place = place + 2.0**-digits * np.abs(lost)
    in_float32 = 2.0**-23 * np.maximum.reduce([np.abs(param), np.abs(new), np.abs(update)])  # as the rule runs
    assert (np.abs(kept.astype(np.float64) - lost) <= place + in_float32).all()
    assert (np.abs(lost) <= 2.0**-digits * np.abs(new) * 1.01 + least)[np.abs(update) < np.abs(param) / 2].all()


@pytest.mark.parametrize("count", [0, 1, 4095, 4096, 123_456_789, 2**31 - 1])
def test_the_dither_is_the_same_number_everywhere(count: int) -> None:
    number = numbers_of(count, np).dither
    assert -0.5 < number < 0.5
    for xp, traced in ((jnp, jnp.asarray(count)), (array_api_compat.numpy, np.asarray(count))):
        assert float(numbers_of(traced, xp).dither) == number


def test_the_dither_has_no_bias() -> None:
    def dithers(counts: range) -> np.ndarray:
        return np.array([numbers_of(count, np).dither for count in counts])

    for first in (0, 4096, 4096 * 12_345):
        some = dithers(range(first, first + 4096))
        assert len({*some}) == 4096
        assert np.abs(np.cumsum(some)).max() < 2.0  # and the first few do not either
    rounds = dithers(range(0, 2**20, 4096))
    assert len({*rounds}) == 256
    assert rounds.mean() == 0.5 / 4096
    assert abs(dithers(range(2**24, 2**24 + 1))[0]) < 2.0**-12  # where a count in float32 stops


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
def test_an_update_of_zero_leaves_the_sum_as_it_is(dtype: str) -> None:
    """To the bit. A carry of half a last place may change its sign, and the parameter become the even neighbour."""
    rng = np.random.default_rng(0)
    param = rng.uniform(0.3, 3.0, 50_000).astype(DTYPES[dtype])
    optimizer = ACProp(compensate=True, clip_exponent=0.25, learning_rate=1e-4)
    state = optimizer.init(param)
    changes = []
    for t in range(20):
        grad = (rng.normal(size=param.shape) if t < 10 else np.zeros(param.shape)).astype(param.dtype)
        before = param.astype(np.float64) + np.asarray(state.carry, np.float64)
        update, state = optimizer.update(grad, state, param)
        param = optimizer.apply(param, update)
        changes.append(int((param.astype(np.float64) + state.carry.astype(np.float64) != before).sum()))
        if t > 10:
            assert not update.any()
    assert min(changes[:10]) > 40_000
    assert changes[10:] == [0] * 10


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
def test_a_step_to_almost_zero_keeps_what_is_left(dtype: str) -> None:
    """Little is left of a large parameter, and the update has to be rounded: the carry can be the larger of the two."""
    rng = np.random.default_rng(0)
    exponents = rng.uniform(0.0, {"bfloat16": 100.0, "float16": 15.0}[dtype], 100_000)
    param = (2.0**exponents).astype(DTYPES[dtype])
    update = (-param.astype(np.float64) * rng.uniform(0.9, 1.1, param.size)).astype(np.float32)
    v, carry = compensated(update, param, np.zeros_like(param), numbers_of(3, np))
    total = (param + v).astype(np.float64) + carry.astype(np.float64)
    digits = {"bfloat16": 8, "float16": 11}[dtype]
    error = np.abs(total - (param.astype(np.float64) + update.astype(np.float64)))
    assert (error <= 2.0 ** (-2 * digits + 1) * param.astype(np.float64)).all()


def test_other_parameters_are_as_without() -> None:
    params = {"w": np.ones((2, 3), np.float32), "d": np.ones(2), "c": np.ones(2, np.complex64), "e": None}
    grads = {name: None if x is None else 0.3 * x for name, x in params.items()}
    results = []
    for compensate in (False, True):
        optimizer = ACProp(clip_exponent=0.25, compensate=compensate)
        state = optimizer.init(params)
        for _ in range(3):
            updates, state = optimizer.update(grads, state, params)
        results.append((updates, state))
    (plain, before), (same, after) = results
    assert before.carry is None
    assert after.carry == dict.fromkeys(params)
    for name in ("w", "d", "c"):
        for x, y in ((plain, same), (before.mu, after.mu), (before.nu, after.nu)):
            assert x[name].tobytes() == y[name].tobytes()


def test_one_array_that_needs_no_carry_goes_on(tmp_path: Path) -> None:
    param, grad, optimizer = np.ones(3, np.float32), np.full(3, 0.5, np.float32), ACProp(**HYPER)
    state = optimizer.init(param)
    for _ in range(2):
        update, state = optimizer.update(grad, state, param)
        param = optimizer.apply(param, update)
    own = np.ones(3, np.float32)
    stepper = acprop_stepper.Stepper(own, **HYPER)
    stepper.step(grad)
    own, stepper = copy.deepcopy((own, stepper))
    stepper.load_state(stepper.state)
    stepper.step(grad)
    assert own.tobytes() == param.tobytes()
    transform = acprop_optax.acprop(**HYPER)
    theirs = transform.init(jnp.ones(3))
    for saved in ((optimizer, state), acprop_stepper.export_state(stepper)):
        save(tmp_path / "a", *saved)
        assert load(tmp_path / "a", param)[1].mu.tobytes() == state.mu.tobytes()
        theirs = acprop_optax.import_state(theirs, optimizer, *load(tmp_path / "a"))
        assert acprop_optax.export_state(theirs, optimizer)[1].mu[""].tobytes() == state.mu.tobytes()
    half = np.ones(3, np.float16)
    with pytest.raises(ValueError, match="the state was made without it and has no carry"):
        optimizer.update(half, ACProp().init(half), half)


# what is in the state


def steps_of_torch(optimizer: Any, p: Any, start: int, stop: int) -> None:
    for t in range(start, stop):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(t)).to(p.dtype)
        optimizer.step()


@pytest.mark.parametrize("flags", [{"foreach": False}, {"fused": True}])
def test_torch_state_dicts_hold_the_carry(flags: dict[str, bool], tmp_path: Path) -> None:
    def begin() -> tuple[Any, Any]:
        p = torch.linspace(0.5, 2, 40).to(torch.bfloat16).requires_grad_()
        return p, acprop_torch.ACProp([p], lr=1e-4, clip_exponent=0.25, compensate=True, **flags)

    p, optimizer = begin()
    steps_of_torch(optimizer, p, 0, 60)
    q, other = begin()
    steps_of_torch(other, q, 0, 30)
    torch.save((q.detach(), other.state_dict()), tmp_path / "a")
    value, saved = torch.load(tmp_path / "a", weights_only=True)
    assert saved["state"][0]["carry"].dtype == torch.bfloat16
    again, third = begin()
    with torch.no_grad():
        again.copy_(value)
    third.load_state_dict(saved)
    fourth = copy.deepcopy((again, third))
    before = saved["state"][0]["carry"].clone()
    for parameter, follower in ((again, third), fourth):
        steps_of_torch(follower, parameter, 30, 60)
        assert torch.equal(parameter, p)
        assert torch.equal(follower.state[parameter]["carry"], optimizer.state[p]["carry"])
    assert torch.equal(saved["state"][0]["carry"], before)  # it is a copy that continued


def test_torch_takes_up_and_gives_up_the_carry_with_the_option() -> None:
    p = torch.ones(3, dtype=torch.bfloat16, requires_grad=True)
    optimizer = acprop_torch.ACProp([p], lr=1e-4, clip_exponent=0.25)
    steps_of_torch(optimizer, p, 0, 1)
    assert "carry" not in optimizer.state[p]
    optimizer.param_groups[0]["compensate"] = True
    steps_of_torch(optimizer, p, 1, 2)
    assert optimizer.state[p]["carry"].any()
    optimizer.param_groups[0]["compensate"] = False
    steps_of_torch(optimizer, p, 2, 3)
    assert "carry" not in optimizer.state[p]
    saved = optimizer.state_dict()
    saved["state"][0] = saved["state"][0] | {"carry": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"carry of parameter 0 has shape \(1,\), the parameter \(3,\)"):
        optimizer.load_state_dict(saved)


def test_a_compiled_step_rounds_where_the_rule_does() -> None:
    """torch's compiler leaves out a rounding that is widened again: without care the carry is always 0."""
    results = []
    for compiled in (False, True):
        p = torch.linspace(0.5, 2, 40).to(torch.bfloat16).requires_grad_()
        optimizer = acprop_torch.ACProp([p], lr=1e-4, clip_exponent=0.25, compensate=True, foreach=False)
        whole = SimpleNamespace(step=torch.compile(optimizer.step) if compiled else optimizer.step)
        steps_of_torch(whole, p, 0, 20)
        results.append((p.detach(), optimizer.state[p]["carry"]))
    (eager, carry), (also, other) = results
    assert torch.equal(eager, also)
    assert other.any()
    # the last bits of what is compiled may differ, hence that of a carry
    assert (carry.double() - other.double()).abs().max() <= 2.0**-15


CASE = prescribed(
    {"learning_rate": 1e-3, "clip_exponent": 0.25, "compensate": True},
    {
        name: np.random.default_rng(0).normal(size=(40, *shape)).astype(DTYPES[dtype])
        for name, dtype, shape in (("w", "bfloat16", (2, 3)), ("h", "float16", (3,)), ("s", "float32", ()))
    },
)


@pytest.mark.parametrize("second", HOSTS)
@pytest.mark.parametrize("first", HOSTS)
def test_every_host_hands_the_carry_on(first: type[Host], second: type[Host], tmp_path: Path) -> None:
    """To the bit: a run of the functional core, half of it in each of two hosts."""
    grads = {leaf: CASE.grads(leaf) for leaf in CASE.leaves}

    def run(hosts: list[Host]) -> dict[str, np.ndarray]:
        params = {leaf: CASE.params(leaf)[0] for leaf in CASE.leaves}
        for i, host in enumerate(hosts):
            if i:
                hosts[i - 1].save(tmp_path / "a")
                host.resume(tmp_path / "a")
            host.put(params)
            part = CASE.steps // len(hosts)
            host.advance({leaf: x[i * part :][:part] for leaf, x in grads.items()})
            params = {leaf: record.param for leaf, record in host.read().items()}
        return params

    expected, got = run([HOSTS[0](CASE)]), run([first(CASE), second(CASE)])
    for leaf in ("w", "h"):
        assert got[leaf].dtype == expected[leaf].dtype
        assert got[leaf].tobytes() == expected[leaf].tobytes()


def test_optax_states_have_a_part_for_the_carry() -> None:
    params = {"w": jnp.ones((4, 2), jnp.bfloat16), "b": jnp.ones(2), "e": None}
    transform = acprop_optax.acprop(1e-3, compensate=True)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    for state in (transform.init(params), transform.init(abstract)):
        assert isinstance(state[3], acprop_optax.CarryState)
        assert (state[3].carry["w"].shape, state[3].carry["w"].dtype) == ((4, 2), jnp.bfloat16)
        assert state[3].carry["b"] is None
        assert state[3].carry["e"] is None
    assert len(acprop_optax.acprop(1e-3).init(params)) == 3


@pytest.mark.parametrize("wrap", [optax.apply_if_finite, optax.MultiSteps, optax.masked])
def test_inside_what_optax_offers(wrap: Any) -> None:
    """What wraps an optimizer and lets its updates through as they are, lets the carry do its work."""
    inner = acprop_optax.acprop(**HYPER)
    arguments: dict[Any, Any] = {optax.apply_if_finite: (3,), optax.MultiSteps: (2,), optax.masked: ({"w": True},)}
    transform = wrap(inner, *arguments[wrap])
    params = {"w": jnp.ones(3, jnp.bfloat16)}
    steps = 400 * (2 if wrap is optax.MultiSteps else 1)

    @jax.jit
    def step(carried: Any, _: None) -> Any:
        params, state = carried
        updates, state = transform.update({"w": jnp.ones_like(params["w"])}, state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (params, transform.init(params)), length=steps)
    assert (params["w"] == jnp.asarray(0.96, jnp.bfloat16)).all()


# what is refused


def test_what_does_not_fit_is_refused() -> None:
    params = {"w": ones("bfloat16"), "b": np.ones(2, np.float32)}
    optimizer = ACProp(compensate=True)
    state = optimizer.init(params)
    carry = state.carry
    with pytest.raises(
        ValueError, match=r"compensate is True, which needs the parameters: call update\(grads, state, "
    ):
        optimizer.update(params, state)
    with pytest.raises(TypeError, match="compensate is 1; use True or False"):
        ACProp(compensate=1)
    for other, error, message in (
        (None, ValueError, "compensate is True, but the state was made without it and has no carry; begin with"),
        ({**carry, "w": None}, ValueError, "carry of 'w' is None, its parameter bfloat16; pass zeros_like"),
        ({**carry, "b": np.zeros(2)}, ValueError, "carry of 'b' is an array, its parameter float32; pass None"),
        ({**carry, "w": ones("bfloat16")[:1]}, ValueError, r"carry of 'w' has shape \(1,\), its parameter \(3,\)"),
        ({**carry, "w": np.ones(3)}, TypeError, "carry of 'w' has dtype float64, its parameter bfloat16"),
        ({**carry, "w": "no"}, TypeError, "carry of 'w' is a str"),
        ({"w": carry["w"]}, ValueError, "the container of carries"),
    ):
        with pytest.raises(error, match=message):
            optimizer.update(params, state._replace(carry=other), params)
    with pytest.raises(
        ValueError, match="compensate is False, but the state has a carry; set compensate=True, or drop"
    ):
        ACProp().update(params, state, params)


def test_steppers_refuse_states_that_do_not_fit() -> None:
    params = {"w": ones("bfloat16")}
    plain, compensating = (acprop_stepper.Stepper(params, compensate=x) for x in (False, True))
    for stepper, other in ((plain, compensating), (compensating, plain)):
        with pytest.raises(ValueError, match=f"compensate is {stepper is compensating}, but the state"):
            stepper.load_state(other.state)
    state = compensating.state
    with pytest.raises(TypeError, match="carry of 'w' has dtype float32, its parameter bfloat16"):
        compensating.load_state(state._replace(carry={"w": np.ones(3, np.float32)}))
    compensating.load_state(state._replace(count=7, carry={"w": ones("bfloat16")}))
    assert (compensating.state.count, compensating.state.carry["w"][0]) == (7, 1)


def test_optax_refuses_what_does_not_fit() -> None:
    params = {"w": jnp.ones(3, jnp.bfloat16)}
    plain, compensating = (acprop_optax.acprop(1e-3, compensate=x) for x in (False, True))
    state = compensating.init(params)
    with pytest.raises(ValueError, match="compensate is True, which needs the parameters"):
        compensating.update(params, state)
    for transform, other in ((plain, state), (compensating, plain.init(params))):
        with pytest.raises(TypeError, match=f"does not belong to acprop with compensate={transform is compensating}"):
            transform.update(params, other, params)
    with pytest.raises(TypeError, match="carry of 'w' has dtype float32, its parameter bfloat16"):
        compensating.update(params, (*state[:3], acprop_optax.CarryState({"w": jnp.ones(3)})), params)
    with pytest.raises(ValueError, match="the optax state was made with compensate, the hyperparameters are without"):
        acprop_optax.export_state(state, ACProp(1e-3))


def test_a_carry_is_not_dropped_on_the_way() -> None:
    """A file with a carry does not fit a host that keeps none, or whose parameter is wide enough to hold the sum."""
    p = torch.ones(3, dtype=torch.bfloat16, requires_grad=True)
    saved = ACProp(1e-4, compensate=True)
    moments = {"w": np.zeros(3, np.float32)}
    state = State(3, moments, moments, {"w": np.full(3, 1e-3, ml_dtypes.bfloat16)})
    for compensate, prefer in ((False, None), (True, None), (False, "own")):
        optimizer = acprop_torch.ACProp([p], lr=1e-4, compensate=compensate)
        if not compensate and prefer is None:
            with pytest.raises(ValueError, match="compensate is False here and True in the saved state"):
                acprop_torch.import_state(optimizer, {"w": p}, saved, state)
            continue
        acprop_torch.import_state(optimizer, {"w": p}, saved, state, prefer=prefer)
        assert ("carry" in optimizer.state[p]) == compensate
    for broken, message in (({"w": 3.0}, "carry of 'w' is a float"), ([], "the saved moments are not dicts by name")):
        with pytest.raises(TypeError, match=message):
            acprop_torch.import_state(optimizer, {"w": p}, saved, state._replace(carry=broken))
    wide = torch.ones(3, requires_grad=True)
    optimizer = acprop_torch.ACProp([wide], lr=1e-4, compensate=True)
    with pytest.raises(
        TypeError, match="carry of 'w' is an array, but the parameter here is not of 16 bits; add it to"
    ):
        acprop_torch.import_state(optimizer, {"w": wide}, saved, state)
