"""Runs of optax's own Adam, AdamW, AdaBelief and ACProp continue in every host of the rule, and come back."""

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import acprop_optax
import acprop_stepper
from acprop_core import ACProp, State, load, save

Arrays = dict[str, np.ndarray]


@pytest.fixture(autouse=True)
def x64() -> Iterator[None]:
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)


def schedule(count: Any) -> Any:
    return 0.02 / (count + 1.0) ** 0.5


HAS_SCHEDULES = bool(jax.tree.leaves(optax.add_decayed_weights(schedule).init(None)))
NO_SCHEDULES = "this version of optax has no schedules of the decay"
WITH_SCHEDULES = {"a decay, no schedule", "decay before"}  # rows below that need one


# One model in two layouts: named and stored as in PyTorch, and as in flax, with its kernel transposed

MODEL: Arrays = {
    "0.weight": np.linspace(-1.0, 1.0, 6).reshape(2, 3),
    "0.bias": np.linspace(0.5, -0.5, 2),
    "scale": np.array(0.3),
}
TO_FLAX = {"0.weight": "params.Dense_0.kernel", "0.bias": "params.Dense_0.bias", "scale": "params.scale"}
TO_TORCH = {flax: torch for torch, flax in TO_FLAX.items()}


def turned(name: str, x: Any) -> Any:
    return x.T if name.endswith(("weight", "kernel")) else x


def as_flax(values: dict[str, Any]) -> Any:
    dense = {"kernel": values["0.weight"], "bias": values["0.bias"]}
    return {"params": {"Dense_0": dense, "scale": values["scale"]}}


def as_torch(tree: Any) -> Arrays:
    dense = tree["params"]["Dense_0"]
    return {
        name: np.array(turned(name, x))
        for name, x in zip(MODEL, (dense["kernel"], dense["bias"], tree["params"]["scale"]), strict=True)
    }


def gradients(params: Arrays, t: int) -> Arrays:
    return {name: np.sin(3.0 * x + t) + 0.2 for name, x in params.items()}


# The hyperparameters of each family, and the hosts that can take its steps

ADAM = ACProp(0.01, 0.85, 0.99, 1e-8, eps_root=0.0, asynchronous=False, centering="none")
MASK = {"0.weight": True, "0.bias": False, "scale": True}
OURS = ["core", "Stepper", "acprop_optax"]
FAMILIES: dict[str, tuple[ACProp, list[str]]] = {
    "Adam": (ADAM, ["optax.adam", "optax.adamw", *OURS]),
    "AdamW": (replace(ADAM, learning_rate=schedule, weight_decay=0.1, mask=MASK), ["optax.adamw", *OURS]),
    "AdamW, decay by schedule": (replace(ADAM, weight_decay=schedule), ["optax.adamw", "core"]),
    "AdaBelief": (ACProp(0.01, 0.85, 0.99, 1e-8, 1e-12, asynchronous=False), ["optax.adabelief", *OURS]),
    "ACProp": (
        ACProp(schedule, 0.85, 0.99, 1e-8, 1e-12, weight_decay=0.1, mask=MASK, centering="previous"),
        ["optax.contrib.acprop", *OURS],
    ),
}


# Hosts take gradients, and show parameters and moments, in PyTorch's layout


class Core:
    """The functional core on NumPy."""

    layout = "torch"

    def __init__(self, family: str, params: Arrays) -> None:
        self.hyper, self.params = FAMILIES[family][0], params
        self.state = self.hyper.init(params)

    def step(self, grads: Arrays) -> None:
        updates, self.state = self.hyper.update(grads, self.state, self.params)
        self.params = self.hyper.apply(self.params, updates)

    def read(self) -> tuple[Arrays, ...]:
        return self.params, self.state.mu, self.state.nu

    def exported(self) -> tuple[ACProp, State]:
        return self.hyper, self.state

    def resume(self, saved: ACProp, state: State) -> None:
        assert saved == self.hyper
        self.state = state


class Stepper(Core):
    def __init__(self, family: str, params: Arrays) -> None:
        self.params = {name: x.copy() for name, x in params.items()}
        self.stepper = acprop_stepper.Stepper(self.params, **vars(FAMILIES[family][0]))

    def step(self, grads: Arrays) -> None:
        self.stepper.step(grads)

    def read(self) -> tuple[Arrays, ...]:
        return {name: x.copy() for name, x in self.params.items()}, *self.stepper.state[1:3]

    def exported(self) -> tuple[ACProp, State]:
        return acprop_stepper.export_state(self.stepper)

    def resume(self, saved: ACProp, state: State) -> None:
        acprop_stepper.import_state(self.stepper, saved, state)


class Optax:
    """A transformation of optax or of acprop_optax, with one step every so many calls."""

    layout = "flax"

    def __init__(self, make: Callable[[ACProp], Any], calls: int, family: str, params: Arrays) -> None:
        self.calls = calls
        self.params = jax.tree.map(jnp.array, self.tree(params))
        self.hyper, self.transform, self.update, self.traces = compiled(make, family)
        self.state = self.transform.init(self.params)

    def tree(self, values: Arrays) -> Any:
        return as_flax({name: turned(name, x) for name, x in values.items()})

    def step(self, grads: Arrays) -> None:
        for _ in range(self.calls):
            updates, self.state = self.update(self.tree(grads), self.state, self.params)
            self.params = optax.apply_updates(self.params, updates)

    def read(self) -> tuple[Arrays, ...]:
        moments = moments_of(self.state)
        return tuple(map(as_torch, (self.params, moments.mu, moments.nu)))

    def exported(self) -> tuple[ACProp, State]:
        return acprop_optax.export_state(self.state, self.hyper)

    def resume(self, saved: ACProp, state: State) -> None:
        fresh = self.transform.init(self.params)
        self.state = acprop_optax.import_state(fresh, self.hyper, saved, state)
        assert forms(self.state) == forms(fresh)


@functools.cache
def compiled(make: Callable[[ACProp], Any], family: str) -> tuple[ACProp, Any, Any, list[Any]]:
    """Return the hyperparameters, the transformation, its compiled update, and a list of all that it was traced for."""
    hyper = FAMILIES[family][0]
    hyper = replace(hyper, mask=None if hyper.mask is None else as_flax(hyper.mask))
    transform, traces = make(hyper), []

    def update(*args: Any) -> Any:
        traces.append(forms(args[1]))
        return transform.update(*args)

    return hyper, transform, jax.jit(update), traces


def moments_of(state: Any) -> Any:
    def here(x: Any) -> bool:
        return isinstance(x, optax.ScaleByAdamState | optax.ScaleByBeliefState)

    (moments,) = filter(here, jax.tree.leaves(state, is_leaf=here))
    return moments


def forms(tree: Any) -> Any:
    """Return all for which a compiled function would be traced again."""
    return jax.tree.structure(tree), [(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(tree)]


def ours(h: ACProp) -> Any:
    return acprop_optax.acprop(**vars(h))


def adam(h: ACProp) -> Any:
    return optax.adam(h.learning_rate, h.b1, h.b2, h.eps)


def adamw(h: ACProp) -> Any:
    return optax.adamw(h.learning_rate, h.b1, h.b2, h.eps, weight_decay=h.weight_decay, mask=h.mask)


def adabelief(h: ACProp) -> Any:
    return optax.adabelief(h.learning_rate, h.b1, h.b2, h.eps, h.eps_root)


def contrib_acprop(h: ACProp) -> Any:
    return optax.contrib.acprop(h.learning_rate, h.b1, h.b2, h.eps, h.eps_root, h.weight_decay, h.mask)


def in_chain(h: ACProp) -> Any:
    return optax.chain(optax.zero_nans(), optax.clip_by_global_norm(1e3), adamw(h), optax.identity())


def injected(h: ACProp) -> Any:
    made = optax.inject_hyperparams(optax.adamw, static_args="mask")
    return made(h.learning_rate, h.b1, h.b2, h.eps, weight_decay=h.weight_decay, mask=h.mask)


def in_parts(h: ACProp) -> Any:
    return optax.named_chain(
        ("adam", optax.scale_by_adam(h.b1, h.b2, h.eps)),
        ("decay", optax.add_decayed_weights(h.weight_decay, h.mask)),
        ("rate", optax.scale_by_learning_rate(h.learning_rate)),
    )


def partitioned(h: ACProp) -> Any:
    return optax.partition({"trained": adamw(h), "frozen": optax.set_to_zero()}, "trained")


# newer versions of optax add gradients up in float32 unless they are told another dtype; older ones have no such option
SUMS: Any = {"accumulator_dtype": "float64"} if "accumulator_dtype" in signature(optax.MultiSteps).parameters else {}


def accumulated(h: ACProp) -> Any:
    return optax.MultiSteps(adamw(h), 2, **SUMS)


def everything(h: ACProp) -> Any:
    some = optax.masked(injected(h), lambda params: jax.tree.map(lambda _: True, params))
    return optax.chain(optax.MultiSteps(optax.apply_if_finite(some, 3), 2, **SUMS), optax.clip_by_global_norm(1e3))


HOSTS: dict[str, Any] = {
    "core": Core,
    "Stepper": Stepper,
    "acprop_optax": functools.partial(Optax, ours, 1),
    "optax.adam": functools.partial(Optax, adam, 1),
    "optax.adamw": functools.partial(Optax, adamw, 1),
    "optax.adabelief": functools.partial(Optax, adabelief, 1),
    "optax.contrib.acprop": functools.partial(Optax, contrib_acprop, 1),
    "in_chain": functools.partial(Optax, in_chain, 1),
    "injected": functools.partial(Optax, injected, 1),
    "in_parts": functools.partial(Optax, in_parts, 1),
    "partitioned": functools.partial(Optax, partitioned, 1),
    "accumulated": functools.partial(Optax, accumulated, 2),
    "everything": functools.partial(Optax, everything, 2),
}
WRAPPED = list(HOSTS)[list(HOSTS).index("in_chain") :]
PAIRS = [(family, *pair) for family, (_, hosts) in FAMILIES.items() for pair in itertools.product(hosts, repeat=2)]
PAIRS += [("AdamW", *pair) for name in WRAPPED for pair in ((name, "core"), ("core", name), (name, name))]


def stepped(host: Any, steps: range) -> list[tuple[Arrays, ...]]:
    """Return parameters and moments after each step."""
    rows = []
    for t in steps:
        host.step(gradients(host.read()[0], t))
        rows.append(host.read())
    return rows


@functools.cache
def uninterrupted(family: str, name: str) -> list[tuple[Arrays, ...]]:
    return stepped(HOSTS[name](family, MODEL), range(100))


@pytest.mark.parametrize(("family", "first", "second"), PAIRS, ids=map("-".join, PAIRS))
def test_fifty_steps_there_and_fifty_here_are_a_hundred_here(
    family: str, first: str, second: str, tmp_path: Path
) -> None:
    hyper = FAMILIES[family][0]
    if callable(hyper.weight_decay) and not HAS_SCHEDULES:
        pytest.skip(NO_SCHEDULES)
    a = HOSTS[first](family, MODEL)
    *_, (params, _, _) = stepped(a, range(50))
    save(tmp_path / "run", *a.exported())
    b = HOSTS[second](family, params)
    bridge = {"rename": TO_FLAX if b.layout == "flax" else TO_TORCH, "transform": turned}
    callables = {name: x for name in ("learning_rate", "weight_decay") if callable(x := getattr(hyper, name))}
    b.resume(*load(tmp_path / "run", **callables, **(bridge if a.layout != b.layout else {})))
    assert b.exported()[1].count == 50
    for got, expected in zip(stepped(b, range(50, 100)), uninterrupted(family, second)[50:], strict=True):
        for tree, like in zip(got, expected, strict=True):
            for name, x in like.items():
                assert np.abs(tree[name] - x).max() <= 1e-12 * np.abs(x).max(), name
    if isinstance(b, Optax):
        assert len(b.traces) == 1  # in all tests together


# What cannot move is refused, with the reason, and nothing has changed

HYPER = ACProp(0.1, eps=1e-8, eps_root=0.0, asynchronous=False, centering="none")
PARAMS = {"w": jnp.ones(3, jnp.float32), "v": jnp.ones(2, jnp.float32)}
GRADS = {"w": jnp.ones(3, jnp.float32), "v": jnp.full(2, 0.5, jnp.float32)}
DECAYS = replace(HYPER, weight_decay=0.1)
TWO = {"w": "a", "v": "b"}
ONLY_W = {"w": True, "v": False}


def falling(count: Any) -> Any:
    return 0.1 / (count + 1)


# name, how the transformation is made, hyperparameters for it, the exception and a part of its message
REFUSED: list[tuple[str, Callable[[], Any], ACProp, type[Exception], str]] = [
    (
        "the defaults of ACProp",
        lambda: optax.adamw(0.1),
        ACProp(0.1),
        ValueError,
        "the hyperparameters have asynchronous=True, centering='current', eps_root=1e-16, but the optax state is of "
        "optax.adam or optax.adamw; pass ACProp(..., eps_root=0.0, asynchronous=False, centering='none')",
    ),
    ("AdaShift's", lambda: optax.adam(0.1), replace(HYPER, asynchronous=True), ValueError, "have asynchronous=True,"),
    ("AdaBelief's", lambda: optax.adam(0.1), replace(HYPER, centering="previous"), ValueError, "centering='previous',"),
    ("eps_root", lambda: optax.adam(0.1, eps_root=1e-9), replace(HYPER, eps_root=1e-9), ValueError, "eps_root=1e-09,"),
    (
        "an injected eps_root",
        lambda: optax.inject_hyperparams(optax.adam)(0.1, eps_root=0.25),
        HYPER,
        ValueError,
        "the hyperparameters have eps_root=0.25, but",
    ),
    ("a clip", lambda: optax.adam(0.1), replace(HYPER, clip_exponent=0.25), ValueError, "have clip_exponent=0.25,"),
    ("compensation", lambda: optax.adam(0.1), replace(HYPER, compensate=True), ValueError, "made without compensate,"),
    (
        "a rate, no schedule",
        lambda: optax.adam(falling),
        HYPER,
        ValueError,
        "made with a schedule of learning_rate, the",
    ),
    ("a schedule, no rate", lambda: optax.adam(0.1), replace(HYPER, learning_rate=falling), ValueError, "are with it;"),
    ("no mask", lambda: optax.adamw(0.1, mask=ONLY_W), DECAYS, ValueError, "made with mask, the hyperparameters are w"),
    ("a mask", lambda: optax.adamw(0.1), replace(DECAYS, mask=ONLY_W), ValueError, "made without mask, the hyperpar"),
    (
        "no mask, injected",
        lambda: optax.inject_hyperparams(optax.adamw, ["mask"])(0.1, mask=ONLY_W),
        HYPER,
        ValueError,
        "made with mask, the hyperparameters are without it",
    ),
    (
        "no mask, compensated",
        lambda: acprop_optax.acprop(0.1, weight_decay=0.1, mask=ONLY_W, compensate=True),
        ACProp(0.1, weight_decay=0.1, compensate=True),
        ValueError,
        "made with mask, the hyperparameters are without it",
    ),
    (
        "a decay, no schedule",
        lambda: acprop_optax.acprop(0.1, weight_decay=falling),
        replace(HYPER, weight_decay=0.1),
        ValueError,
        "made with a schedule of weight_decay, the hyperparameters are without it; pass the hyperparameters of the",
    ),
    (
        "amsgrad",
        lambda: optax.amsgrad(0.1),
        HYPER,
        ValueError,
        "optax.amsgrad, which divides by the root of the largest",
    ),
    ("lion", lambda: optax.lion(0.1), HYPER, ValueError, "holds ScaleByLionState, which a portable state cannot hold"),
    ("sgd", lambda: optax.sgd(0.1), HYPER, ValueError, "holds 0 states with moments of ACProp"),
    ("two", lambda: optax.chain(optax.adam(0.1), acprop_optax.acprop(0.1)), HYPER, ValueError, "holds 2 states with"),
    (
        "two parts",
        lambda: optax.partition({"a": optax.adam(0.1), "b": optax.adamw(0.1)}, TWO),
        HYPER,
        ValueError,
        "2 s",
    ),
    (
        "mu_dtype",
        lambda: optax.adam(0.1, mu_dtype="bfloat16"),
        HYPER,
        TypeError,
        "first moment of 'v' has dtype bfloat16, the second float32, and a portable state has one dtype for both",
    ),
    ("between updates", lambda: optax.MultiSteps(optax.adam(0.1), 3), HYPER, ValueError, "gradients of 1 mini-steps"),
]


@pytest.mark.parametrize(("name", "make", "hyper", "error", "message"), REFUSED, ids=[row[0] for row in REFUSED])
def test_what_cannot_move_is_refused_and_changes_nothing(
    name: str, make: Callable[[], Any], hyper: ACProp, error: type[Exception], message: str
) -> None:
    if name in WITH_SCHEDULES and not HAS_SCHEDULES:
        pytest.skip(NO_SCHEDULES)
    transform = make()
    _, state = transform.update(GRADS, transform.init(PARAMS), PARAMS)
    before = jax.tree.map(np.array, state)
    saved = acprop_optax.export_state(optax.adam(0.1).init(PARAMS), HYPER)
    for call in (
        lambda: acprop_optax.export_state(state, hyper),
        lambda: acprop_optax.import_state(state, hyper, *saved, prefer="own"),
    ):
        with pytest.raises(error) as caught:
            call()
        assert message in str(caught.value)
    jax.tree.map(np.testing.assert_array_equal, state, before)


def by_rate(rate: Any) -> Any:
    return acprop_optax.acprop(rate)


# Of these transformations, a state does not tell which of the hyperparameters are true, so that all must be taken
OURS_ALONE = acprop_optax.scale_by_acprop()
IN_PARTS: dict[str, tuple[Callable[[], Any], ACProp]] = {
    "something else is masked": (
        lambda: optax.chain(OURS_ALONE, optax.masked(optax.clip(1.0), ONLY_W), optax.scale_by_schedule(falling)),
        ACProp(falling),
    ),
    "so is what comes later": (
        lambda: optax.chain(OURS_ALONE, optax.scale(-0.1), optax.masked(optax.clip(1.0), ONLY_W)),
        ACProp(0.1, weight_decay=0.1),
    ),
    "decay before": (
        lambda: optax.chain(optax.add_decayed_weights(falling), OURS_ALONE, optax.scale_by_learning_rate(0.1)),
        ACProp(0.1),
    ),
    "a mask of one's own": (
        lambda: optax.chain(OURS_ALONE, optax.scale(1.0), optax.add_decayed_weights(0.1, ONLY_W), optax.scale(-0.1)),
        ACProp(0.1, weight_decay=0.1, mask=ONLY_W),
    ),
    "a warm-up": (
        lambda: optax.chain(OURS_ALONE, optax.scale_by_schedule(falling), optax.scale(-0.1)),
        ACProp(0.1),
    ),
    "a schedule outside": (
        lambda: optax.chain(optax.chain(OURS_ALONE, optax.clip(1.0)), optax.scale_by_schedule(falling)),
        ACProp(falling),
    ),
    "an injected schedule": (lambda: optax.inject_hyperparams(by_rate)(rate=falling), ACProp(falling)),
    "an injected rate": (lambda: optax.inject_hyperparams(acprop_optax.acprop)(falling), ACProp(falling)),
    "a part": (
        lambda: optax.partition({"a": acprop_optax.acprop(0.1), "b": optax.sgd(falling)}, TWO),
        ACProp(0.1),
    ),
    "a scheduled part": (
        lambda: optax.partition({"a": acprop_optax.acprop(falling), "b": optax.sgd(0.1)}, TWO),
        ACProp(falling),
    ),
}


@pytest.mark.parametrize("name", IN_PARTS)
def test_options_that_a_state_may_have_are_not_refused(name: str) -> None:
    make, hyper = IN_PARTS[name]
    if name in WITH_SCHEDULES and not HAS_SCHEDULES:
        pytest.skip(NO_SCHEDULES)
    transform = make()
    _, state = transform.update(GRADS, transform.init(PARAMS), PARAMS)
    saved = acprop_optax.export_state(state, hyper)
    again = acprop_optax.import_state(transform.init(PARAMS), hyper, *saved)
    jax.tree.map(np.testing.assert_array_equal, again, state)


# name, what is saved (hyperparameters, and how the moments are changed), `prefer`, the exception and its message
MISMATCHED: list[tuple[str, dict[str, Any], Callable[[Any], Any], str | None, type[Exception], str]] = [
    (
        "other hyperparameters",
        {"eps": 1e-6, "weight_decay": 0.01},
        lambda x: x,
        None,
        ValueError,
        "hyperparameters differ: eps is 1e-08 here and 1e-06 in the saved state; weight_decay is 0.0 here and 0.01",
    ),
    (
        "another corner",
        {"asynchronous": True, "centering": "current", "eps_root": 1e-16},
        lambda x: x,
        None,
        ValueError,
        "eps_root is 0.0 here and 1e-16 in the saved state; centering is 'none' here and 'current' in the saved state",
    ),
    ("preferred", {"b1": 0.8}, lambda x: x, "saved", ValueError, "b1 is 0.9 here and 0.8 in the saved state. The tran"),
    ("a shape", {}, lambda x: x | {"w": x["w"][:2]}, None, ValueError, "'w' has shape (2,), here it is (3,)"),
    (
        "a dtype",
        {},
        lambda x: x | {"w": x["w"].astype(float)},
        None,
        TypeError,
        "has dtype float64, here it is float32",
    ),
    ("a missing name", {}, lambda x: {"w": x["w"]}, None, ValueError, "the saved state lacks 'v'; it has 'w'"),
    ("a surplus name", {}, lambda x: x | {"u": x["w"]}, None, ValueError, "the saved state has 'u', but there is no"),
]


@pytest.mark.parametrize(
    ("name", "options", "change", "prefer", "error", "message"), MISMATCHED, ids=[row[0] for row in MISMATCHED]
)
def test_what_does_not_match_is_refused_and_changes_nothing(
    name: str,
    options: dict[str, Any],
    change: Callable[[Any], Any],
    prefer: str | None,
    error: type[Exception],
    message: str,
) -> None:
    transform = optax.adam(0.1)
    _, state = transform.update(GRADS, transform.init(PARAMS), PARAMS)
    before = jax.tree.map(np.array, state)
    _, saved = acprop_optax.export_state(state, HYPER)
    saved = saved._replace(mu=change(saved.mu), nu=change(saved.nu))
    with pytest.raises(error) as caught:
        acprop_optax.import_state(state, HYPER, replace(HYPER, **options), saved, prefer=prefer)  # type: ignore[arg-type]
    assert message in str(caught.value)
    jax.tree.map(np.testing.assert_array_equal, state, before)


def test_injected_numbers_of_adamw_are_read_and_set() -> None:
    transform = optax.inject_hyperparams(optax.adamw)(0.1, weight_decay=0.25)
    state = transform.init(PARAMS)
    hyper, portable = acprop_optax.export_state(state, HYPER)
    assert hyper == replace(HYPER, weight_decay=0.25)  # and eps_root is 0 although HYPER need not say so
    assert acprop_optax.export_state(state, replace(HYPER, eps_root=0.5))[0] == hyper
    taken = acprop_optax.import_state(state, HYPER, replace(hyper, learning_rate=0.5), portable, prefer="saved")
    assert taken.hyperparams["learning_rate"] == 0.5
    assert forms(taken) == forms(state)


def test_a_complex_parameter_of_adam_goes_there_and_back() -> None:
    """optax keeps its second moment as a complex number without imaginary part, the rule as a real one."""
    z = np.array([1.0 + 2.0j, -0.5j])
    transform = optax.adam(0.1)
    params = {"z": jnp.array(z)}
    state = transform.init(params)
    core = replace(HYPER, learning_rate=0.1)
    theirs = {"z": z}
    for t in range(6):
        if t == 3:
            saved, moments = acprop_optax.export_state(state, HYPER)
            assert moments.nu["z"].dtype == np.float64
            assert saved == core
            back = acprop_optax.import_state(transform.init(params), HYPER, saved, moments)
            assert forms(back) == forms(state)
            jax.tree.map(np.testing.assert_array_equal, back, state)
            theirs = {"z": np.array(params["z"])}
        grads = {"z": z * np.exp(1j * t) + t}
        updates, state = transform.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        if t >= 3:
            updates, moments = core.update(grads, moments, theirs)
            theirs = core.apply(theirs, updates)
    np.testing.assert_allclose(params["z"], theirs["z"], rtol=1e-14)
    np.testing.assert_allclose(moments_of(state).nu["z"], moments.nu["z"], rtol=1e-14)


def test_bfloat16_moments_of_adam_are_converted_on_request(tmp_path: Path) -> None:
    """optax keeps the moments of bfloat16 parameters in bfloat16, we in float32."""
    params = {"w": jnp.ones(3, jnp.bfloat16)}
    theirs, here = optax.adam(0.1), acprop_optax.acprop(**vars(HYPER))
    _, state = theirs.update({"w": jnp.full(3, 0.3, jnp.bfloat16)}, theirs.init(params), params)
    save(tmp_path / "run", *acprop_optax.export_state(state, HYPER))
    with pytest.raises(TypeError, match="has dtype bfloat16, here it is float32"):
        acprop_optax.import_state(here.init(params), HYPER, *load(tmp_path / "run"))
    saved = load(tmp_path / "run", transform=lambda _, x: x.astype(np.float32))
    wide = acprop_optax.import_state(here.init(params), HYPER, *saved)
    np.testing.assert_array_equal(moments_of(wide).nu["w"], moments_of(state).nu["w"].astype(jnp.float32))
