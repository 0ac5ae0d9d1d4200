"""Runs of optax's own Adam, AdamW, AdaBelief and ACProp continue in every host of the rule, and come back."""

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
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


def accumulated(h: ACProp) -> Any:
    return optax.MultiSteps(adamw(h), 2)


def everything(h: ACProp) -> Any:
    some = optax.masked(injected(h), lambda params: jax.tree.map(lambda _: True, params))
    return optax.chain(optax.MultiSteps(optax.apply_if_finite(some, 3), 2), optax.clip_by_global_norm(1e3))


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
