"""Bad input of each kind in each host: refused by the right exception, which names culprit, reason and remedy.

Every row of the tables is one bad input. Around all of them stands one test: bit for bit, parameters, moments, counts and
options are afterwards what they were, and the next good step is that of a run that has seen no bad input. Damaged files
are test_checkpoint.py's matter, what is not finite that of test_stepper.py and of the non-finite part of the page.
"""

import copy
import dataclasses
import math
import os
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import array_api_strict as strict
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

import acprop_core
import acprop_optax
import acprop_stepper
from acprop_core import ACProp, State
from acprop_stepper import Stepper

try:
    import torch

    import acprop_torch
except ModuleNotFoundError:  # the oldest versions are tested without
    torch = None  # type: ignore[assignment]

HYPER = {"learning_rate": 0.1, "weight_decay": 0.1, "clip_exponent": 0.25}


class Bad(NamedTuple):
    """One bad input: what is done with a world, and what must be raised, by that type and with these words."""

    name: str
    act: Callable[[Any], Any]
    error: type[BaseException]
    words: tuple[str, ...]


def bad(name: str, act: Callable[[Any], Any], error: type[BaseException], *words: str) -> Bad:
    return Bad(name, act, error, words)


def boom(*_: Any) -> Any:
    raise KeyError("the caller's own")


def bits(x: Any) -> Any:
    """Return all that an array is, and other things as their repr."""
    if torch is not None and isinstance(x, torch.Tensor):
        x = x.detach().numpy()
    if not hasattr(x, "dtype"):
        return repr(x)
    x = np.asarray(x)
    return str(x.dtype), x.shape, x.tobytes()


def leaves(tree: Any) -> list[Any]:
    return [bits(x) for x in jax.tree.leaves(tree)]


# Worlds: an optimizer in the middle of a run


class Core:
    """The functional core: parameters "w" and "b.0"."""

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self.params = {"w": self.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), "b": [self.array([0.5, 1.5])]}
        self.grads = {"w": self.array([[0.1, 0.2, -0.3], [0.4, -0.5, 0.6]]), "b": [self.array([0.7, -0.8])]}
        self.optimizer = ACProp(**HYPER)
        self.state = self.optimizer.init(self.params)
        self.step()
        self.step()

    def array(self, values: Any, dtype: str = "float32") -> Any:
        x = np.asarray(values, dtype)
        return {"NumPy": np.asarray, "JAX": jnp.asarray}.get(self.backend, torch and torch.from_numpy)(x)

    def step(self) -> None:
        updates, self.state = self.optimizer.update(self.grads, self.state, self.params)
        self.params = self.optimizer.apply(self.params, updates)

    def bits(self) -> Any:
        return self.state.count, leaves((self.params, self.grads, self.state.mu, self.state.nu))

    def mend(self) -> None: ...

    def update(self, grads: Any = ..., state: Any = ..., params: Any = ..., **hyper: Any) -> Any:
        replace = {key: hyper.pop(key) for key in ("count", "mu", "nu") if key in hyper}
        state = self.state._replace(**replace) if state is ... else state
        grads, params = (own if x is ... else x for x, own in ((grads, self.grads), (params, self.params)))
        return ACProp(**{**HYPER, **hyper}).update(grads, state, params)

    def apply(self, updates: Any) -> Any:
        return self.optimizer.apply(self.params, updates)

    def put(self, what: str, leaf: Any) -> Any:
        """Use a tree whose "w" is this leaf as the gradients, moments, updates or parameters."""
        call: dict[str, Callable[[Any], Any]] = {
            "gradient": lambda tree: self.update(tree),
            "first moment": lambda tree: self.update(mu=tree),
            "second moment": lambda tree: self.update(nu=tree),
            "update": self.apply,
            "parameter": self.optimizer.init,
        }
        return call[what]({**self.grads, "w": leaf})


class Optax:
    """`acprop`, or `scale_by_acprop`, in optax."""

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self.whole = backend == "optax"
        self.params = {"w": jnp.asarray([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), "b": [jnp.asarray([0.5, 1.5])]}
        self.grads = {"w": jnp.asarray([[0.1, 0.2, -0.3], [0.4, -0.5, 0.6]]), "b": [jnp.asarray([0.7, -0.8])]}
        self.transform = WHOLE if self.whole else PART
        self.state = self.transform.init(self.params)
        self.step()
        self.step()

    def step(self) -> None:
        updates, self.state = (UPDATE_WHOLE if self.whole else UPDATE_PART)(self.grads, self.state, self.params)
        self.params = optax.apply_updates(self.params, updates)

    def bits(self) -> Any:
        return leaves((self.params, self.grads, self.state))

    def mend(self) -> None: ...

    @property
    def moments(self) -> Any:
        return self.state[0] if self.whole else self.state

    def update(self, grads: Any = ..., state: Any = ..., params: Any = ..., **replace: Any) -> Any:
        moments = self.moments._replace(**replace)
        own_state = (moments, *self.state[1:]) if self.whole else moments
        given = zip((grads, state, params), (self.grads, own_state, self.params), strict=True)
        return self.transform.update(*(own if x is ... else x for x, own in given))

    def with_options(self, *args: Any, **options: Any) -> Any:
        """Take a step with other options, of `acprop`."""
        transform = acprop_optax.acprop(*args, **{"weight_decay": 0.1, **options})
        return transform.update(self.grads, transform.init(self.params), self.params)


WHOLE, PART = acprop_optax.acprop(0.1, weight_decay=0.1, clip_exponent=0.25), acprop_optax.scale_by_acprop()
UPDATE_WHOLE, UPDATE_PART = jax.jit(WHOLE.update), jax.jit(PART.update)


class Torch:
    """The torch optimizer: a group with parameter "a" and one with "b"."""

    def __init__(self, backend: str) -> None:
        self.backend = backend
        way = {"torch": {}, "torch foreach": {"foreach": True}, "torch fused": {"fused": True}}[backend]
        self.a = torch.linspace(-1.0, 1.0, 4).requires_grad_()
        self.b = torch.linspace(2.0, 3.0, 6).reshape(2, 3).requires_grad_()
        self.model = torch.nn.ParameterDict({"a": self.a, "b": self.b})
        self.optimizer = acprop_torch.ACProp(
            [{"params": [("a", self.model["a"])]}, {"params": [("b", self.model["b"])]}], lr=0.1, **way
        )
        self.a, self.b = self.model["a"], self.model["b"]
        self.grads = torch.linspace(0.1, 0.4, 4), -torch.linspace(0.1, 0.6, 6).reshape(2, 3)
        self.data = self.a.data, self.b.data
        self.options = [dict(group) for group in self.optimizer.param_groups]
        self.mend()
        self.step()
        self.step()

    def step(self) -> None:
        self.optimizer.step()

    def mend(self) -> None:
        """Put back the objects that a spoiler has exchanged; whatever has been written into them stays."""
        for p, grad, data in zip((self.a, self.b), self.grads, self.data, strict=True):
            p.data, p.grad = data, grad
        for group, options in zip(self.optimizer.param_groups, self.options, strict=True):
            group.update(options)

    def bits(self) -> Any:
        state = self.optimizer.state_dict()
        return leaves(self.data), leaves(self.grads), leaves(state["state"]), repr(state["param_groups"])

    def new(self, **options: Any) -> Any:
        return acprop_torch.ACProp([torch.ones(2, requires_grad=True)], **options)

    def spoilt(self, **options: Any) -> None:
        self.optimizer.param_groups[1].update(options)
        self.optimizer.step()

    def load(self, change: Callable[[Any], Any]) -> None:
        state_dict = copy.deepcopy(self.optimizer.state_dict())
        changed = change(state_dict)
        self.optimizer.load_state_dict(state_dict if changed is None else changed)

    def load_state(self, **state: Any) -> None:
        self.load(lambda saved: saved["state"][1].update(state))

    def load_group(self, **options: Any) -> None:
        self.load(lambda saved: saved["param_groups"][1].update(options))

    def export(self) -> Any:
        return acprop_torch.export_state(self.optimizer, self.model)

    def take(self, saved: Any, state: Any, **options: Any) -> None:
        acprop_torch.import_state(self.optimizer, self.model, saved, state, **options)


class Step:
    """The stepper: parameters "w" and "b"."""

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self.engine = {"stepper Numba": "numba", "stepper tiles": "tiles"}[backend]
        self.params = {"w": np.linspace(-1.0, 1.0, 6).reshape(2, 3), "b": np.ones(2)}
        self.own = dict(self.params)
        self.grads = {"w": np.linspace(0.1, 0.6, 6).reshape(2, 3), "b": np.asarray([0.7, -0.8])}
        self.on = True
        self.bad_rate: Any = None
        self.stepper = Stepper(
            self.params, lambda count: 0.1 if self.on else self.bad_rate(), clip_exponent=0.25, engine=self.engine
        )
        self.step()
        self.step()

    def step(self) -> None:
        self.stepper.step(self.grads)

    def bits(self) -> Any:
        state = self.stepper.state
        return state.count, leaves((self.own, self.grads, state.mu, state.nu))

    def mend(self) -> None:
        self.on = True
        self.params.clear()
        self.params.update(self.own)
        for x in self.own.values():
            x.flags.writeable = True

    def new(self, params: Any = None, **options: Any) -> Stepper:
        return Stepper({"w": np.ones(2), "b": np.ones(3)} if params is None else params, **options)

    def with_gradient(self, b: Any) -> Any:
        return self.stepper.step({**self.grads, "b": b})

    def with_rate(self, rate: Callable[[], Any]) -> None:
        self.on, self.bad_rate = False, rate
        self.step()

    def load(self, **replace: Any) -> None:
        self.stepper.load_state(self.stepper.state._replace(**replace))

    def load_leaf(self, what: str, x: Any) -> None:
        self.load(**{what: {**getattr(self.stepper.state, what), "w": x}})

    def export(self) -> Any:
        saved, state = acprop_stepper.export_state(self.stepper)
        return saved, state

    def take(self, change: dict[str, Any], saved: Any = None, prefer: str | None = "own") -> None:
        own, state = acprop_stepper.export_state(self.stepper)
        acprop_stepper.import_state(self.stepper, saved or own, state._replace(**change), prefer=prefer)


# The tables: a row a line, lest they fill forty pages
# fmt: off

# The functional core

REFUSED_KIND = "give one of float16, bfloat16, float32, float64"
STRUCTURE = "give it the structure of the parameters"
PLACES = ("gradient", "first moment", "second moment", "update")


def of(what: str) -> str:
    return f"{what} 'w'" if what == "parameter" else f"{what} of 'w'"


def core_leaves() -> Iterator[Bad]:
    """What cannot be a gradient, a moment, an update or a parameter, in each of these places."""
    ones = np.ones((2, 3))
    arrays = {
        "transposed": (lambda w: w.array(ones.T), ValueError, ("has shape (3, 2), its", "(2, 3); make them equal")),
        "0-d": (lambda w: w.array(1.0), ValueError, ("has shape (), its", "make them equal")),
        "int": (lambda w: w.array(ones, "int32"), TypeError, ("has dtype int32", REFUSED_KIND)),
        "bool": (lambda w: w.array(ones, "bool"), TypeError, ("has dtype bool", REFUSED_KIND)),
        "complex": (lambda w: w.array(ones, "complex64"), TypeError, ("has dtype complex64", "give a real one")),
        "a number": (lambda w: 1.0, TypeError, ("is a float (1.0), not an array", "asarray")),
        "a string": (lambda w: "x", TypeError, ("is a str ('x'), not an array", "asarray")),
        "a generator": (lambda w: (x for x in ones), TypeError, ("is a generator", "asarray")),
        "a set": (lambda w: {1.0}, TypeError, ("is a set ({1.0}), not an array", "asarray")),
        "a type": (lambda w: type(w.grads["w"]), TypeError, ("not an array", "asarray")),
        "another library": (lambda w: strict.asarray(ones), TypeError, ("of array_api_strict", "convert one of them")),
    }
    for what in (*PLACES, "parameter"):
        for name, (make, error, words) in arrays.items():
            if what == "parameter" and name in ("transposed", "0-d", "complex"):
                continue  # a parameter may be so
            yield bad(f"{what}: {name}", lambda w, what=what, make=make: w.put(what, make(w)), error, of(what), *words)
        if what != "parameter":
            for name, leaf, kind in (("a list", [[1.0]], "list"), ("a dict", {"x": 1.0}, "dict")):
                yield bad(f"{what}: {name}", lambda w, what=what, leaf=leaf: w.put(what, leaf), ValueError, f"the container of {what}s at 'w' is a container ({kind})", STRUCTURE)
    for what in ("first moment", "second moment"):
        yield bad(f"{what}: None", lambda w, what=what: w.put(what, None), ValueError, f"{what} of 'w' is None, its parameter an array; give both or neither")


def core_containers() -> Iterator[Bad]:
    trees = {
        "None": (lambda w: None, ("is one value (NoneType) where the parameters have a container (dict)", STRUCTURE)),
        "a bare array": (lambda w: w.grads["w"], ("is one value", "a container (dict)", STRUCTURE)),
        "values of a dict": (lambda w: w.grads.values(), ("is one value (dict_values)", STRUCTURE)),
        "a string": (lambda w: "grads", ("is one value (str)", STRUCTURE)),
        "a list": (lambda w: [w.grads["w"], w.grads["b"]], ("lacks 'w', 'b'", STRUCTURE)),
        "a missing leaf": (lambda w: {"w": w.grads["w"]}, ("lacks 'b'", STRUCTURE)),
        "a missing inner leaf": (lambda w: {**w.grads, "b": []}, ("lacks 'b.0'", STRUCTURE)),
        "a surplus leaf": (lambda w: {**w.grads, "c": w.grads["w"]}, ("has 'c'", "the parameters lack; leave that out")),
        "a surplus inner leaf": (lambda w: {**w.grads, "b": [*w.grads["b"], 1]}, ("has 'b.1'", "leave that out")),
    }
    for what in PLACES:
        for name, (make, words) in trees.items():
            call: dict[str, Callable[[Any, Any], Any]] = {"gradient": lambda w, x: w.update(x), "first moment": lambda w, x: w.update(mu=x), "second moment": lambda w, x: w.update(nu=x), "update": lambda w, x: w.apply(x)}
            yield bad(f"container of {what}s: {name}", lambda w, call=call[what], make=make: call(w, make(w)), ValueError, f"the container of {what}s", *words)


REMEDY = "give a number, or a 0-d floating-point array"
RANGE = "give a number that is at least 0 and "
SMALL = "the step count (state.count)"
CORE = [
    *core_leaves(),
    *core_containers(),
    bad("gradient for no parameter", lambda w: w.update(params={**w.params, "w": None}), ValueError, "gradient of 'w' is an array, its parameter None; give both or neither"),
    bad("parameters: None under decay", lambda w: w.update(params=None), ValueError, "weight_decay is 0.1", "needs the parameters", "call update(grads, state, params)"),
    bad("state: None", lambda w: w.update(state=None), TypeError, "the state is a NoneType; give the State that init or update returned"),
    bad("state: a plain tuple", lambda w: w.update(state=tuple(w.state)), TypeError, "the state is a tuple; give the State"),
    bad("state: a dict", lambda w: w.update(state=w.state._asdict()), TypeError, "the state is a dict; give the State"),
    bad("state: of another optimizer", lambda w: w.update(state=optax.adam(0.1).init(w.params)[0] if w.backend == "JAX" else optax.EmptyState()), TypeError, "the state is a", "give the State"),
    bad("state: of other parameters", lambda w: w.update(state=w.optimizer.init({"v": w.params["w"]})), ValueError, "the container of first moments lacks 'w', 'b'", STRUCTURE),
    bad("count: negative", lambda w: w.update(count=-1), ValueError, SMALL, "is -1; it cannot be negative"),
    bad("count: a float", lambda w: w.update(count=1.0), TypeError, SMALL, "is 1.0; give an integer or a 0-d integer array"),
    bad("count: NaN", lambda w: w.update(count=math.nan), TypeError, SMALL, "is nan; give an integer"),
    bad("count: a string", lambda w: w.update(count="1"), TypeError, SMALL, "is '1'; give an integer"),
    bad("count: None", lambda w: w.update(count=None), TypeError, SMALL, "is None; give an integer"),
    bad("count: a bool", lambda w: w.update(count=True), TypeError, SMALL, "is True; give an integer"),
    bad("count: an array with an axis", lambda w: w.update(count=w.array([2], "int32")), TypeError, SMALL, "give an integer or a 0-d integer array"),
    bad("count: a floating-point array", lambda w: w.update(count=w.array(2.0)), TypeError, SMALL, "give an integer"),
    bad("count: a bool array", lambda w: w.update(count=w.array(True, "bool")), TypeError, SMALL, "give an integer"),
    bad("count: of another library", lambda w: w.update(count=strict.asarray(2)), TypeError, SMALL, "is an array of array_api_strict, the parameters are arrays of", "convert it, with float() or int()"),
    bad("schedule: NaN", lambda w: w.update(learning_rate=lambda count: math.nan), ValueError, "learning_rate(2) is nan", RANGE),
    bad("schedule: infinite", lambda w: w.update(learning_rate=lambda count: math.inf), ValueError, "learning_rate(2) is inf", RANGE),
    bad("schedule: negative", lambda w: w.update(learning_rate=lambda count: -0.1), ValueError, "learning_rate(2) is -0.1", RANGE),
    bad("schedule: a string", lambda w: w.update(learning_rate=lambda count: "0.1"), TypeError, "learning_rate(2) is '0.1'", REMEDY),
    bad("schedule: None", lambda w: w.update(learning_rate=lambda count: None), TypeError, "learning_rate(2) is None", REMEDY),
    bad("schedule: a bool", lambda w: w.update(learning_rate=lambda count: True), TypeError, "learning_rate(2) is True", REMEDY),
    bad("schedule: an array with an axis", lambda w: w.update(learning_rate=lambda count: w.array([0.1])), TypeError, "learning_rate(2) is", REMEDY),
    bad("schedule: a complex array", lambda w: w.update(learning_rate=lambda count: w.array(0.1, "complex64")), TypeError, "learning_rate(2) is", REMEDY),
    bad("schedule: of another library", lambda w: w.update(learning_rate=lambda count: strict.asarray(0.1)), TypeError, "learning_rate is an array of array_api_strict", "convert it"),
    bad("schedule: raises", lambda w: w.update(learning_rate=boom), KeyError, "the caller's own"),
    bad("mask: a list", lambda w: w.update(mask=[True, False]), ValueError, "the mask lacks 'w', 'b'", STRUCTURE),
    bad("mask: a missing leaf", lambda w: w.update(mask={"w": True}), ValueError, "the mask lacks 'b'", STRUCTURE),
    bad("mask: a surplus leaf", lambda w: w.update(mask={"w": True, "b": True, "c": True}), ValueError, "the mask has 'c', which the parameters lack; leave that out"),
    bad("mask: too deep", lambda w: w.update(mask={"w": [True], "b": True}), ValueError, "the mask at 'w' is a container (list)", STRUCTURE),
    bad("mask: a string", lambda w: w.update(mask="all"), TypeError, "mask of 'w' is 'all'; give True (decay) or False"),
    bad("mask: a number", lambda w: w.update(mask={"w": 1, "b": True}), TypeError, "mask of 'w' is 1; give True (decay) or False"),
    bad("mask: an array", lambda w: w.update(mask={"w": True, "b": w.array(True, "bool")}), TypeError, "mask of 'b.0' is", "give True (decay) or False"),
    bad("mask: None for a parameter", lambda w: w.update(mask={"w": None, "b": True}), TypeError, "mask of 'w' is None; give True (decay) or False"),
    bad("mask: a callable without return", lambda w: w.update(mask=lambda params: None), TypeError, "mask of 'w' is None; give True (decay) or False"),
    bad("mask: a callable that raises", lambda w: w.update(mask=boom), KeyError, "the caller's own"),
    bad("parameters: a string", lambda w: w.optimizer.init("params"), TypeError, "parameter is a str ('params'), not an array"),
    bad("parameters: a list of numbers", lambda w: w.optimizer.init([1.0, 2.0]), TypeError, "parameter '0' is a float (1.0), not an array"),
    bad("hyperparameter of another library", lambda w: w.update(b2=strict.asarray(0.9)), TypeError, "b2 is an array of array_api_strict", "convert it"),
]


def readonly(x: Any) -> Any:
    x.flags.writeable = False
    return x


NUMPY = [
    bad(f"{what}: {name}", lambda w, what=what, make=make: w.put(what, make()), TypeError, of(what), *words)
    for what in (*PLACES, "parameter")
    for name, make, words in [
        ("object array", lambda: np.ones((2, 3), object), ("has dtype object", REFUSED_KIND)),
        ("strings", lambda: np.full((2, 3), "1.0"), ("has dtype str", REFUSED_KIND)),
        ("longdouble", lambda: np.ones((2, 3), np.longdouble), ("has dtype float", REFUSED_KIND)),
        ("masked array", lambda: np.ma.ones((2, 3)), ("is a MaskedArray", "convert it with np.asarray")),
        ("matrix", lambda: np.ones((2, 3)).view(np.matrix), ("is a matrix", "convert it with np.asarray")),
    ]
] + [
    bad("parameter: dates", lambda w: w.put("parameter", np.zeros((2, 3), "M8[D]")), TypeError, "parameter 'w' has dtype datetime64", REFUSED_KIND),
    bad("parameter: records", lambda w: w.put("parameter", np.zeros((2, 3), "f4,f4")), TypeError, "parameter 'w' has dtype void64", REFUSED_KIND),
    bad("parameter: an 8-bit float", lambda w: w.put("parameter", np.ones((2, 3), ml_dtypes.float8_e4m3fn)), TypeError, "parameter 'w' has dtype float8_e4m3fn", REFUSED_KIND),
    bad("parameter: a memoryview", lambda w: w.put("parameter", memoryview(b"123")), TypeError, "parameter 'w' is a memoryview", "asarray"),
    bad("learning_rate: of JAX", lambda w: w.update(learning_rate=jnp.float32(0.1)), TypeError, "learning_rate is an array of jax.numpy, the parameters are arrays of numpy; convert it"),
    bad("weight_decay: of array_api_strict", lambda w: w.update(weight_decay=strict.asarray(0.1)), TypeError, "weight_decay is an array of array_api_strict", "convert it"),
    bad("count: of JAX", lambda w: w.update(count=jnp.int32(2)), TypeError, SMALL, "is an array of jax.numpy, the parameters are arrays of numpy; convert it"),
    bad("count: a negative array", lambda w: w.update(count=np.asarray(-1)), ValueError, SMALL, "is -1; it cannot be negative"),
    bad("schedule: an array of NaN", lambda w: w.update(learning_rate=lambda count: np.asarray(math.nan)), ValueError, "learning_rate(2) is nan", RANGE),
]

# Hyperparameters, which are no array library's: each kind of wrong value for each name
NUMBERS = ("learning_rate", "b1", "b2", "eps", "eps_root", "weight_decay", "clip_exponent")
WRONG_NUMBERS: list[tuple[str, Any, type[BaseException], str]] = [
    ("negative", -0.5, ValueError, RANGE),
    ("NaN", math.nan, ValueError, RANGE),
    ("infinite", math.inf, ValueError, RANGE),
    ("minus infinite", -math.inf, ValueError, RANGE),
    ("beyond floats", 10**400, ValueError, RANGE),
    ("a negative scalar", np.float32(-1.0), ValueError, RANGE),
    ("a 0-d array of NaN", np.asarray(math.nan), ValueError, RANGE),
    ("a string", "0.1", TypeError, REMEDY),
    ("a bool", True, TypeError, REMEDY),
    ("a list", [0.1], TypeError, REMEDY),
    ("a dict", {}, TypeError, REMEDY),
    ("complex", 1j, TypeError, REMEDY),
    ("a decimal", Decimal("0.1"), TypeError, REMEDY),
    ("an array with an axis", np.asarray([0.1]), TypeError, REMEDY),
    ("an integer array", jnp.asarray(1), TypeError, REMEDY),
    ("a complex array", jnp.asarray(0.1j), TypeError, REMEDY),
]
OPTIONS = [bad(f"{name}: {kind}", lambda w, name=name, x=x: ACProp(**{name: x}), error, f"{name} is ", words) for name in NUMBERS for kind, x, error, words in WRONG_NUMBERS] + [
    *(bad(f"{name}: None", lambda w, name=name: ACProp(**{name: None}), TypeError, f"{name} is None", REMEDY) for name in NUMBERS[:-1]),
    *(bad(f"{name}: {x}", lambda w, name=name, x=x: ACProp(**{name: x}), ValueError, f"{name} is {x}", "below 1") for name in ("b1", "b2") for x in (1, 1.5)),
    *(bad(f"centering: {x!r}", lambda w, x=x: ACProp(centering=x), ValueError, f"centering is {x!r}; give 'current' or 'previous'") for x in ("Current", None, 1, ["current"])),
    *(bad(f"moment_dtype: {x}", lambda w, x=x: ACProp(moment_dtype=x), ValueError, "moment_dtype is", REFUSED_KIND[5:]) for x in ("int32", "float8", "double", np.complex64, int)),
    bad("moment_dtype: one that the library lacks", lambda w: ACProp(moment_dtype="bfloat16").init(w.params), TypeError, "moment_dtype is 'bfloat16', in which numpy cannot keep", "choose a wider one"),
    bad("moment_dtype: none of complex numbers", lambda w: ACProp(moment_dtype="float16").init(np.ones(2, complex)), TypeError, "moment_dtype is 'float16', in which numpy cannot keep the moments of complex128", "choose a wider one"),
    bad("an option that is none", lambda w: ACProp(amsgrad=True), TypeError, "unexpected keyword argument 'amsgrad'"),  # type: ignore[call-arg]
    bad("an option set afterwards", lambda w: setattr(w.optimizer, "b1", 0.5), dataclasses.FrozenInstanceError, "cannot assign to field 'b1'"),
]


TORCH_CORE = [
    *(bad(f"{what}: sparse", lambda w, what=what: w.put(what, torch.eye(2, 3).to_sparse()), TypeError, of(what), "is sparse (torch.sparse_coo); make it dense: to_dense()") for what in (*PLACES, "parameter")),
    *(bad(f"{what}: on another device", lambda w, what=what: w.put(what, torch.ones((2, 3), device="meta")), TypeError, of(what), "is on meta, its parameter on cpu; move one of them") for what in PLACES),
    bad("parameter: an 8-bit float", lambda w: w.put("parameter", torch.ones(2).to(torch.float8_e4m3fn)), TypeError, "parameter 'w' has dtype float8_e4m3fn", REFUSED_KIND),
    bad("parameters: a module", lambda w: w.optimizer.init(torch.nn.Linear(2, 2)), TypeError, "parameter is a Linear", "not an array"),
    bad("parameters: a generator of them", lambda w: w.optimizer.init(torch.nn.Linear(2, 2).parameters()), TypeError, "parameter is a generator", "not an array"),
    bad("parameters: of NumPy and torch", lambda w: w.optimizer.init({"a": np.ones(2), "b": torch.ones(2)}), TypeError, "parameter 'b' is an array of torch, parameter 'a' one of numpy; convert one of them"),
]


def jax_core() -> Iterator[Bad]:
    from jax.experimental.sparse import BCOO

    for name, make, words in (
        ("sparse", lambda: BCOO.fromdense(jnp.eye(2, 3)), ("is a BCOO", "not an array")),
        ("random keys", lambda: jax.random.split(jax.random.key(0), (2, 3)), ("has dtype key<fry>", REFUSED_KIND)),
        ("an 8-bit float", lambda: jnp.ones((2, 3), "float8_e4m3fn"), ("has dtype float8_e4m3fn", REFUSED_KIND)),
        ("a shape", lambda: jax.ShapeDtypeStruct((2, 3), jnp.float32), ("is a ShapeDtypeStruct", "not an array")),
    ):
        for what in ("gradient", "parameter"):
            yield bad(f"{what}: {name}", lambda w, what=what, make=make: w.put(what, make()), TypeError, of(what), *words)
    yield bad("count: a float, traced", lambda w: jax.jit(w.optimizer.update)(w.grads, w.state._replace(count=1.0), w.params), TypeError, SMALL, "give an integer")


# optax

IN_STRUCTURE = "are not in the structure of the first moments"


def optax_leaves() -> Iterator[Bad]:
    rows: dict[str, tuple[Callable[[], Any], type[Exception], tuple[str, ...]]] = {
        "transposed": (lambda: jnp.ones((3, 2)), ValueError, ("(3, 2)", "(2, 3)", "make them equal")),
        "a number": (lambda: 1.0, ValueError, ("()", "(2, 3)", "make them equal")),
        "int": (lambda: jnp.ones((2, 3), int), TypeError, ("has dtype int32", REFUSED_KIND)),
        "bool": (lambda: jnp.ones((2, 3), bool), TypeError, ("has dtype bool", REFUSED_KIND)),
        "an 8-bit float": (lambda: jnp.ones((2, 3), "float8_e4m3fn"), TypeError, ("float8_e4m3fn", REFUSED_KIND)),
        "a float0": (lambda: np.zeros((2, 3), jax.dtypes.float0), TypeError, ("has dtype void", REFUSED_KIND)),
        "random keys": (lambda: jax.random.split(jax.random.key(0), (2, 3)), TypeError, ("dtype key<fry>", REFUSED_KIND)),
        "an object array": (lambda: np.ones((2, 3), object), TypeError, ("is a ndarray", "give an array or a number")),
        "a masked array": (lambda: np.ma.ones((2, 3)), TypeError, ("is a MaskedArray", "give an array or a number")),
        "a string": (lambda: "x", TypeError, ("is a str ('x')", "give an array or a number")),
        "a set": (lambda: {1.0}, TypeError, ("is a set ({1.0})", "give an array or a number")),
    }
    for what, field in (("gradient", ""), ("first moment", "mu"), ("second moment", "nu"), ("parameter", "")):
        for name, (make, error, words) in rows.items():

            def act(w: Any, what: str = what, field: str = field, make: Any = make) -> Any:
                tree = {**w.grads, "w": make()}
                if field:
                    return w.update(**{field: tree})
                return w.update(tree) if what == "gradient" else w.update(params=tree)

            # of parameters of another shape or kind, what they are compared with is named
            yield bad(f"{what}: {name}", act, error, "of 'w'" if what != "parameter" else "'w'", *words)


def optax_trees() -> Iterator[Bad]:
    trees: dict[str, Callable[[Any], Any]] = {
        "a list": lambda w: [w.grads["w"], w.grads["b"]],
        "a tuple for a list": lambda w: {**w.grads, "b": tuple(w.grads["b"])},
        "a bare array": lambda w: w.grads["w"],
        "a string": lambda w: "grads",
        "a missing leaf": lambda w: {"w": w.grads["w"]},
        "a surplus leaf": lambda w: {**w.grads, "c": w.grads["w"]},
        "a leaf too deep": lambda w: {**w.grads, "b": w.grads["b"][0]},
    }
    for name, make in trees.items():
        yield bad(f"gradients: {name}", lambda w, make=make: w.update(make(w)), ValueError, "the gradients", IN_STRUCTURE)
        yield bad(f"parameters: {name}", lambda w, make=make: w.update(params=make(w)), ValueError, "the parameters", IN_STRUCTURE)
        yield bad(f"second moments: {name}", lambda w, make=make: w.update(nu=make(w)), ValueError, "the second moments", IN_STRUCTURE)
    yield bad("gradients: None", lambda w: w.update(None), ValueError, "the gradients", IN_STRUCTURE, "None")
    yield bad("parameter: a dict", lambda w: w.update(params={**w.params, "w": {"inner": w.params["w"]}}), TypeError, "parameter 'w' is a dict", "give an array or a number")
    yield bad("gradient for no parameter", lambda w: w.transform.update({"a": jnp.ones(2)}, w.transform.init({"a": None}), {"a": None}), ValueError, "gradient of 'a' is an array, its parameter None; give both or neither")
    yield bad("gradient: complex", lambda w: w.update({**w.grads, "w": jnp.ones((2, 3), complex)}), TypeError, "gradient of 'w' has dtype complex64", "give a real one")
    yield bad("second moment: None", lambda w: w.update(nu={**w.grads, "w": None}), ValueError, "second moment of 'w' is None, its parameter an array; give both or neither")
    yield bad("parameter: None", lambda w: w.update(params={**w.params, "w": None}), ValueError, "of 'w' is an array, its parameter None; give both or neither")


ONE_THAT = "give the one that"
OPTAX = [
    *optax_leaves(),
    *optax_trees(),
    bad("state: None", lambda w: w.update(state=None), TypeError, "the state is", ONE_THAT),
    bad("state: a number", lambda w: w.update(state=3), TypeError, "the state is", ONE_THAT),
    bad("state: a string", lambda w: w.update(state="abc"), TypeError, "the state is", ONE_THAT),
    bad("state: an empty tuple", lambda w: w.update(state=()), TypeError, "the state is", ONE_THAT),
    bad("state: three numbers", lambda w: w.update(state=(1, 2, 3)), TypeError, "the state is", ONE_THAT),
    bad("state: a dict", lambda w: w.update(state={"mu": 1}), TypeError, "the state is", ONE_THAT),
    bad("state: of the core", lambda w: w.update(state=State(0, w.params, w.params)), TypeError, "the state is", ONE_THAT),
    bad("state: of sgd", lambda w: w.update(state=optax.sgd(0.1).init(w.params)), TypeError, "the state is", ONE_THAT),
    bad("state: of adam", lambda w: w.update(state=optax.adam(0.1).init(w.params)), TypeError, "the state is", ONE_THAT),
    bad("state: of the other transformation", lambda w: w.update(state=(PART if w.whole else WHOLE).init(w.params)), TypeError, "the state is", ONE_THAT),
    bad("state: of other parameters", lambda w: w.update(state=w.transform.init({"w": w.params["w"]})), ValueError, "the gradients", IN_STRUCTURE),
    *(
        bad(f"count: {name}", lambda w, x=x: w.update(count=x), error, SMALL, words)
        for name, x, error, words in (
            ("None", None, TypeError, "is None; give an integer"),
            ("a string", "1", TypeError, "is '1'; give an integer"),
            ("a float", 1.0, TypeError, "is 1.0; give an integer"),
            ("NaN", math.nan, TypeError, "is nan; give an integer"),
            ("a bool", True, TypeError, "is True; give an integer"),
            ("a list", [2], TypeError, "is [2]; give an integer"),
            ("complex", 2j, TypeError, "is 2j; give an integer"),
            ("a floating-point array", jnp.float32(2), TypeError, "give an integer or a 0-d integer array"),
            ("a bool array", jnp.asarray(True), TypeError, "give an integer or a 0-d integer array"),
            ("an array with an axis", jnp.zeros(3, int), TypeError, "give an integer or a 0-d integer array"),
            ("negative", -1, ValueError, "is -1; it cannot be negative"),
            ("a negative array of NumPy", np.int32(-1), ValueError, "is -1; it cannot be negative"),
        )
    ),
    bad("count: a float, traced", lambda w: jax.jit(lambda count: w.update(count=count))(jnp.float32(2)), TypeError, SMALL, "give an integer"),
    *(
        bad(f"init: {name}", lambda w, x=x: w.transform.init(x()), TypeError, *words)
        for name, x, words in (
            ("a string", lambda: "x", ("parameter is a str ('x')", "give an array or a number")),
            ("a bool", lambda: {"a": True}, ("parameter 'a' has dtype bool", REFUSED_KIND)),
            ("int", lambda: {"l": {"a": jnp.ones(2, int)}}, ("parameter 'l.a' has dtype int32", REFUSED_KIND)),
            ("a random key", lambda: {"key": jax.random.key(0)}, ("parameter 'key' has dtype key", REFUSED_KIND)),
            ("an object array", lambda: [np.ones(2, object)], ("parameter '0' is a ndarray", "give an array")),
            ("a masked array", lambda: [np.ma.ones(2)], ("parameter '0' is a MaskedArray", "give an array")),
            ("longdouble", lambda: [np.ones(2, np.longdouble)], ("parameter '0' is a ndarray", "give an array")),
            ("a module of Python", lambda: math, ("parameter is a module", "give an array or a number")),
        )
    ),
]
OPTAX_OPTIONS = [
    bad("parameters: None under decay", lambda w: w.update(params=None), ValueError, "weight_decay is 0.1", "call update(grads, state, params)"),
    *(bad(f"learning_rate: {kind}", lambda w, x=x: w.with_options(x), error, "learning_rate is", remedy) for kind, x, error, remedy in WRONG_NUMBERS if kind != "an integer array"),
    *(bad(f"schedule: {kind}", lambda w, x=x: w.with_options(lambda count: x), error, "learning_rate is", remedy) for kind, x, error, remedy in WRONG_NUMBERS if kind != "an integer array"),
    *(
        bad(f"{name}: {kind}", lambda w, name=name, x=x: w.with_options(0.1, **{name: x}), error, f"{name} is", remedy)
        for name in ("b1", "b2", "eps", "eps_root", "weight_decay", "clip_exponent")
        for kind, x, error, remedy in WRONG_NUMBERS
        if kind in ("negative", "NaN", "infinite", "a string", "a bool", "a complex array")
    ),
    bad("learning_rate: an array of bool", lambda w: w.with_options(jnp.asarray(True)), TypeError, "learning_rate is", REMEDY),
    bad("schedule: None", lambda w: w.with_options(lambda count: None), TypeError, "learning_rate is None", REMEDY),
    bad("schedule: raises", lambda w: w.with_options(boom), KeyError, "the caller's own"),
    bad("schedule: of another library", lambda w: w.with_options(lambda count: strict.asarray(0.1)), TypeError, "learning_rate is an array of array_api_strict", "convert it"),
    bad("learning_rate: missing", lambda w: acprop_optax.acprop(), TypeError, "learning_rate"),
    bad("an option that is none", lambda w: w.with_options(0.1, amsgrad=True), TypeError, "unexpected keyword argument 'amsgrad'"),
    bad("centering: unknown", lambda w: w.with_options(0.1, centering="x"), ValueError, "centering is 'x'; give 'current' or 'previous'"),
    bad("moment_dtype: int", lambda w: w.with_options(0.1, moment_dtype=int), ValueError, "moment_dtype is", "give one of float16"),
    *(
        bad(f"mask: {name}", lambda w, mask=mask: w.with_options(0.1, mask=mask), error, *words)
        for name, mask, error, words in (
            ("a string", "all", TypeError, ("mask is 'all'; give True (decay) or False",)),
            ("a string leaf", {"w": "no", "b": True}, TypeError, ("mask of 'w' is 'no'; give True (decay) or False",)),
            ("a number", {"w": True, "b": 1}, TypeError, ("mask of 'b' is 1; give True (decay) or False",)),
            ("a float", {"w": 0.0, "b": True}, TypeError, ("mask of 'w' is 0.0; give True (decay) or False",)),
            ("an array with an axis", {"w": jnp.ones(3, bool), "b": True}, TypeError, ("mask of 'w' is", "give True")),
            ("a callable's number", lambda params: 1, TypeError, ("mask is 1; give True (decay) or False",)),
            ("None for a parameter", {"w": None, "b": True}, ValueError, ("the mask is not in the structure of the parameters",)),
            ("a callable without return", lambda params: None, ValueError, ("the mask is not in the structure of the parameters",)),
            ("a list", [True, False], ValueError, ("the mask is not in the structure of the parameters",)),
            ("a missing leaf", {"w": True}, ValueError, ("the mask is not in the structure of the parameters",)),
            ("a surplus leaf", {"w": True, "b": True, "c": True}, ValueError, ("the mask is not in the structure of the parameters",)),
            ("too deep", {"w": [True], "b": True}, ValueError, ("the mask is not in the structure of the parameters",)),
            ("a callable that raises", boom, KeyError, ("the caller's own",)),
        )
    ),
]

# The stepper

LIKE_THESE = "the container of gradients"


def overlapping(name: str) -> Any:
    x = np.ones(8)
    trees: dict[str, Any] = {
        "two views": {"a": x[:5], "b": x[4:]},
        "one array twice": {"a": x, "b": x},
        "an array and its transpose": {"a": x.reshape(2, 4), "b": x.reshape(2, 4).T},
        "a complex array and its real part": (lambda c: {"a": c, "b": c.real})(np.ones(3, complex)),
        "an array and its reverse": {"a": x, "b": x[::-1]},
    }
    return trees[name]


STEPPER = [
    *(
        bad(f"gradients: {name}", lambda w, make=make: w.stepper.step(make(w)), ValueError, LIKE_THESE, *words)
        for name, make, words in (
            ("None", lambda w: None, ("is one value (NoneType)", STRUCTURE)),
            ("a list", lambda w: list(w.grads.values()), ("lacks 'w', 'b'", STRUCTURE)),
            ("a tuple", lambda w: tuple(w.grads.values()), ("lacks 'w', 'b'", STRUCTURE)),
            ("a bare array", lambda w: w.grads["w"], ("is one value (ndarray)", STRUCTURE)),
            ("a string", lambda w: "grads", ("is one value (str)", STRUCTURE)),
            ("a generator", lambda w: (x for x in w.grads.values()), ("is one value (generator)", STRUCTURE)),
            ("other keys", lambda w: {0: 1.0, 1: 1.0}, ("lacks 'w', 'b'", STRUCTURE)),
            ("a missing leaf", lambda w: {"w": w.grads["w"]}, ("lacks 'b'", STRUCTURE)),
            ("a surplus leaf", lambda w: {**w.grads, "c": np.ones(1)}, ("has 'c'", "leave that out")),
        )
    ),
    *(
        bad(f"gradient: {name}", lambda w, make=make: w.with_gradient(make(w)), error, "gradient of 'b'", *words)
        for name, make, error, words in (
            ("a number", lambda w: 1.0, TypeError, ("is a float (1.0), not an array", "asarray")),
            ("a string", lambda w: "x", TypeError, ("is a str ('x'), not an array", "asarray")),
            ("a list", lambda w: [1.0, 1.0], TypeError, ("is a list ([1.0, 1.0]), not an array", "asarray")),
            ("a memoryview", lambda w: memoryview(b"12"), TypeError, ("is a memoryview", "not an array", "asarray")),
            ("longer", lambda w: np.ones(3), ValueError, ("has shape (3,), its parameter (2,); make them equal",)),
            ("to be broadcast", lambda w: np.ones(1), ValueError, ("has shape (1,), its parameter (2,)",)),
            ("with an axis more", lambda w: np.ones((2, 1)), ValueError, ("has shape (2, 1), its parameter (2,)",)),
            ("0-d", lambda w: np.float64(1.0), ValueError, ("has shape (), its parameter (2,); make them equal",)),
            ("float32", lambda w: np.ones(2, "f4"), TypeError, ("has dtype float32, its parameter float64; convert",)),
            ("of another byte order", lambda w: np.ones(2, ">f8"), TypeError, ("has dtype >f8, its parameter float64",)),
            ("int", lambda w: np.ones(2, int), TypeError, ("has dtype int64", REFUSED_KIND)),
            ("bool", lambda w: np.ones(2, bool), TypeError, ("has dtype bool", REFUSED_KIND)),
            ("complex", lambda w: np.ones(2, complex), TypeError, ("has dtype complex128", "give a real one")),
            ("objects", lambda w: np.ones(2, object), TypeError, ("has dtype object", REFUSED_KIND)),
            ("strings", lambda w: np.full(2, "1"), TypeError, ("has dtype str32", REFUSED_KIND)),
            ("a masked array", lambda w: np.ma.ones(2), TypeError, ("is a MaskedArray", "np.asarray")),
            ("NumPy's masked", lambda w: np.ma.masked, TypeError, ("is a MaskedConstant", "np.asarray")),
            ("a matrix", lambda w: np.ones((1, 2)).view(np.matrix), TypeError, ("is a matrix", "np.asarray")),
            ("of array_api_strict", lambda w: strict.ones(2), TypeError, ("array_api_strict", "convert one of them")),
            ("of JAX", lambda w: jnp.ones(2), TypeError, ("is an array of jax.numpy", "convert one of them")),
        )
    ),
    *(
        bad(f"gradient in the memory of parameters: {name}", lambda w, make=make: w.with_gradient(make(w)), ValueError, "gradient of 'b'", "share memory, so that writing one would change the other; copy one")
        for name, make in (("the parameter", lambda w: w.params["b"]), ("a view of it", lambda w: w.params["b"][:]), ("its reverse", lambda w: w.params["b"][::-1]), ("a part of another", lambda w: w.params["w"][0, :2]), ("every second of another", lambda w: w.params["w"].reshape(-1)[::3]))
    ),
    bad("gradients: the parameters themselves", lambda w: w.stepper.step(w.params), ValueError, "share memory", "copy one"),
    *(bad(f"schedule: {kind}", lambda w, x=x: w.with_rate(lambda: x), error, "learning_rate(2) is", remedy) for kind, x, error, remedy in WRONG_NUMBERS if not hasattr(x, "aval")),
    bad("schedule: None", lambda w: w.with_rate(lambda: None), TypeError, "learning_rate(2) is None", REMEDY),
    bad("schedule: raises", lambda w: w.with_rate(boom), KeyError, "the caller's own"),
    bad("schedule: of JAX", lambda w: w.with_rate(lambda: jnp.float32(0.1)), TypeError, "learning_rate is an array of jax.numpy", "convert it"),
    bad("schedule: steps the stepper", lambda w: w.with_rate(lambda: w.stepper.step(w.grads)), RuntimeError, "step or load_state was called from within one of them", "do it later"),
    bad("schedule: loads a state", lambda w: w.with_rate(lambda: w.stepper.load_state(w.stepper.state)), RuntimeError, "step or load_state was called from within one of them"),
    bad("a parameter taken away", lambda w: (w.params.pop("w"), w.step()), ValueError, "params lacks 'w'"),
    bad("a parameter added", lambda w: (w.params.update(c=np.ones(1)), w.step()), ValueError, "params has 'c'", "leave that out"),
    bad("a parameter exchanged", lambda w: (w.params.update(w=w.params["w"].copy()), w.step()), ValueError, "parameter 'w' is not the array that the stepper was made for; write into that array, or make another"),
    bad("a parameter made None", lambda w: (w.params.update(w=None), w.step()), ValueError, "parameter 'w' is not the array that the stepper was made for"),
    bad("a parameter made read-only", lambda w: (readonly(w.params["w"]), w.step()), ValueError, "parameter 'w' is read-only; a stepper writes into its parameters: copy it"),
    bad("load_state: None", lambda w: w.stepper.load_state(None), TypeError, "the state is a NoneType; give a State"),
    bad("load_state: a tuple", lambda w: w.stepper.load_state(tuple(w.stepper.state)), TypeError, "the state is a tuple; give a State"),
    *(
        bad(f"load_state: count {name}", lambda w, x=x: w.load(count=x), error, SMALL, words)
        for name, x, error, words in (
            ("negative", -1, ValueError, "is -1; it cannot be negative"),
            ("a float", 1.5, TypeError, "is 1.5; give an integer"),
            ("NaN", math.nan, TypeError, "is nan; give an integer"),
            ("a bool", True, TypeError, "is True; give an integer"),
            ("a string", "3", TypeError, "is '3'; give an integer"),
            ("None", None, TypeError, "is None; give an integer"),
            ("an array with an axis", np.asarray([3]), TypeError, "give an integer or a 0-d integer array"),
            ("of JAX", jnp.int32(3), TypeError, "give an int"),
        )
    ),
    bad("load_state: moments None", lambda w: w.load(mu=None), ValueError, "the container of first moments is one value (NoneType)", STRUCTURE),
    bad("load_state: a missing moment", lambda w: w.load(nu={}), ValueError, "the container of second moments lacks 'w', 'b'", STRUCTURE),
    bad("load_state: a surplus moment", lambda w: w.load(mu={**w.grads, "c": np.ones(1)}), ValueError, "the container of first moments has 'c'", "leave that out"),
    *(
        bad(f"load_state: {what} {name}", lambda w, field=field, make=make: w.load_leaf(field, make()), error, f"{what} of 'w'", *words)
        for field, what in (("mu", "first moment"), ("nu", "second moment"))
        for name, make, error, words in (
            ("None", lambda: None, ValueError, ("is None, its parameter an array; give both or neither",)),
            ("a number", lambda: 1.0, TypeError, ("is a float (1.0), not an array",)),
            ("transposed", lambda: np.ones((3, 2)), ValueError, ("has shape (3, 2), its parameter (2, 3)",)),
            ("float32", lambda: np.ones((2, 3), "f4"), TypeError, ("has dtype float32, this stepper keeps float64; convert it, or set moment_dtype",)),
            ("of another byte order", lambda: np.ones((2, 3), ">f8"), TypeError, ("has dtype >f8, this stepper keeps float64",)),
            ("int", lambda: np.ones((2, 3), int), TypeError, ("has dtype int64", REFUSED_KIND)),
            ("objects", lambda: np.ones((2, 3), object), TypeError, ("has dtype object", REFUSED_KIND)),
            ("complex", lambda: np.ones((2, 3), complex), TypeError, ("has dtype complex128", "give a real one")),
            ("a masked array", lambda: np.ma.ones((2, 3)), TypeError, ("is a MaskedArray", "np.asarray")),
            ("of JAX", lambda: jnp.ones((2, 3)), TypeError, ("of jax.numpy", "convert one of them")),
        )
    ),
]
STEPPER_OPTIONS = [
    *(
        bad(f"{name}: {x!r}", lambda w, name=name, x=x: w.new(**{name: x}), error, f"{name} is {x!r}", words)
        for name, x, error, words in (
            ("engine", "fast", ValueError, "for NumPy arrays give 'tiles' or 'numba', or None for the best"),
            ("engine", "cupy", ValueError, "for NumPy arrays give 'tiles' or 'numba'"),
            ("engine", 1, ValueError, "for NumPy arrays give 'tiles' or 'numba'"),
            ("engine", ["numba"], ValueError, "for NumPy arrays give 'tiles' or 'numba'"),
            ("nonfinite", "ignore", ValueError, "give 'allow', 'skip' or 'raise'"),
            ("nonfinite", None, ValueError, "give 'allow', 'skip' or 'raise'"),
            ("nonfinite", True, ValueError, "give 'allow', 'skip' or 'raise'"),
            ("clip_norm", 0.0, ValueError, "give a number above 0, or None"),
            ("clip_norm", -1.0, ValueError, "give a number that is at least 0"),
            ("clip_norm", math.nan, ValueError, "give a number that is at least 0"),
            ("clip_norm", math.inf, ValueError, "give a number that is at least 0 and finite"),
            ("clip_norm", "1", TypeError, "give a number"),
            ("clip_norm", True, TypeError, "give a number"),
            ("clip_norm", jnp.float32(1.0), ValueError, "give a number above 0, or None"),
            ("threads", 0, ValueError, "give a whole number of at least 1"),
            ("threads", -1, ValueError, "give a whole number of at least 1"),
            ("threads", 1.5, ValueError, "give a whole number of at least 1"),
            ("threads", "2", ValueError, "give a whole number of at least 1"),
            ("threads", True, ValueError, "give a whole number of at least 1"),
            ("learning_rate", -1.0, ValueError, RANGE),
            ("learning_rate", strict.asarray(0.1), TypeError, "a stepper takes numbers: convert it with float()"),
            ("b1", 1.0, ValueError, "below 1"),
            ("b2", jnp.float32(0.9), TypeError, "a stepper takes numbers: convert it with float()"),
            ("centering", "next", ValueError, "give 'current' or 'previous'"),
            ("moment_dtype", "int8", ValueError, "give one of float16"),
        )
    ),
    bad("moment_dtype: one that NumPy lacks", lambda w: w.new(moment_dtype="bfloat16"), TypeError, "moment_dtype is 'bfloat16', in which numpy cannot keep", "choose a wider one"),
    bad("an option that is none", lambda w: w.new(amsgrad=True), TypeError, "unexpected keyword argument 'amsgrad'"),
    *(
        bad(f"mask: {name}", lambda w, mask=mask: w.new(weight_decay=0.1, mask=mask), error, *words)
        for name, mask, error, words in (
            ("a string", "all", TypeError, ("mask of 'w' is 'all'; give True (decay) or False",)),
            ("a number", {"w": 1, "b": True}, TypeError, ("mask of 'w' is 1; give True (decay) or False",)),
            ("a missing leaf", {"w": True}, ValueError, ("the mask lacks 'b'", STRUCTURE)),
            ("a surplus leaf", {"w": True, "b": True, "c": True}, ValueError, ("the mask has 'c'", "leave that out")),
            ("a callable without return", lambda params: None, TypeError, ("mask of 'w' is None; give True",)),
            ("a callable that raises", boom, KeyError, ("the caller's own",)),
        )
    ),
    *(
        bad(f"parameters: {name}", lambda w, make=make: w.new(make()), error, *words)
        for name, make, error, words in (
            ("a string", lambda: "x", TypeError, ("parameter is a str ('x'), not an array",)),
            ("a number", lambda: 1.0, TypeError, ("parameter is a float (1.0), not an array",)),
            ("a list of numbers", lambda: [1.0], TypeError, ("parameter '0' is a float (1.0), not an array",)),
            ("a set", lambda: {"a": {1.0}}, TypeError, ("parameter 'a' is a set ({1.0}), not an array",)),
            ("a generator", lambda: (x for x in ()), TypeError, ("parameter is a generator", "not an array")),
            ("int", lambda: {"a": np.ones(2, int)}, TypeError, ("parameter 'a' has dtype int64", REFUSED_KIND)),
            ("bool", lambda: {"a": np.ones(2, bool)}, TypeError, ("parameter 'a' has dtype bool", REFUSED_KIND)),
            ("objects", lambda: {"a": np.ones(2, object)}, TypeError, ("parameter 'a' has dtype object", REFUSED_KIND)),
            ("longdouble", lambda: {"a": np.ones(2, np.longdouble)}, TypeError, ("parameter 'a' has dtype float", REFUSED_KIND)),
            ("records", lambda: {"a": np.ones(2, "f4,f4")}, TypeError, ("parameter 'a' has dtype void64", REFUSED_KIND)),
            ("an 8-bit float", lambda: [np.ones(2, ml_dtypes.float8_e4m3fn)], TypeError, ("parameter '0' has dtype float8_e4m3fn",)),
            ("a masked array", lambda: {"a": np.ma.ones(2)}, TypeError, ("parameter 'a' is a MaskedArray", "np.asarray")),
            ("a matrix", lambda: [np.ones((1, 2)).view(np.matrix)], TypeError, ("parameter '0' is a matrix", "np.asarray")),
            ("of array_api_strict", lambda: {"a": strict.ones(3)}, TypeError, ("the parameters are arrays of array_api_strict", "a Stepper takes NumPy or CuPy arrays")),
            ("of JAX", lambda: jnp.ones(2), TypeError, ("the parameters are arrays of jax.numpy", "acprop_optax")),
            ("of two libraries", lambda: [np.ones(2), jnp.ones(2)], TypeError, ("parameter '1' is an array of jax.numpy, parameter '0' one of numpy; convert one",)),
            ("read-only", lambda: {"a": readonly(np.ones(2))}, ValueError, ("parameter 'a' is read-only", "copy it")),
            ("a bare read-only array", lambda: readonly(np.ones(2)), ValueError, ("parameter is read-only", "copy it")),
            ("a scalar", lambda: {"a": np.float64(1.0)}, ValueError, ("parameter 'a' is read-only", "copy it")),
            ("broadcast", lambda: {"a": np.broadcast_to(np.ones(2), (3, 2))}, ValueError, ("parameter 'a' is read-only",)),
            ("of another byte order", lambda: {"a": np.ones(2, ">f8")}, ValueError, ("parameter 'a' has dtype >f8, not in native byte order; convert it",)),
            ("overlapping itself with a stride of 0", lambda: {"a": np.lib.stride_tricks.as_strided(np.ones(6), (3, 2), (0, 8))}, ValueError, ("several elements of parameter 'a' lie in the same memory", "copy it")),
            ("overlapping itself as a window", lambda: [np.lib.stride_tricks.sliding_window_view(np.ones(6), 3, writeable=True)], ValueError, ("several elements of parameter '0'", "copy it")),
        )
    ),
    *(bad(f"parameters in one memory: {name}", lambda w, name=name: w.new(overlapping(name)), ValueError, "parameter 'a'", "parameter 'b'", "share memory", "copy one") for name in ("two views", "one array twice", "an array and its transpose", "a complex array and its real part", "an array and its reverse")),
    bad("export_state: None", lambda w: acprop_stepper.export_state(None), TypeError, "the stepper is a NoneType; give an acprop_stepper.Stepper"),  # type: ignore[arg-type]
    bad("import_state: into no stepper", lambda w: acprop_stepper.import_state({}, *w.export()), TypeError, "the stepper is a dict; give an acprop_stepper.Stepper"),  # type: ignore[arg-type]
    bad("import_state: swapped", lambda w: acprop_stepper.import_state(w.stepper, *reversed(w.export())), TypeError, "to import are a State and a ACProp; give the acprop_core.ACProp and the State"),
    bad("import_state: prefer", lambda w: w.take({}, prefer="theirs"), ValueError, "prefer is 'theirs'; give 'own' or 'saved'"),
    bad("import_state: other hyperparameters", lambda w: w.take({}, ACProp(0.7), None), ValueError, "hyperparameters differ: learning_rate is", "prefer='own' or prefer='saved'"),
    bad("import_state: a mask of other names", lambda w: w.take({}, ACProp(0.7, weight_decay=0.1, mask={"w": True}), "saved"), ValueError, "the mask lacks 'b'"),
    bad("import_state: a mask of strings", lambda w: w.take({}, ACProp(0.7, weight_decay=0.1, mask={"w": "no", "b": True}), "saved"), TypeError, "mask of 'w' is 'no'; give True (decay) or False"),
    *(
        bad(f"import_state: {name}", lambda w, change=change: w.take(change(w.export()[1])), error, *words)
        for name, change, error, words in (
            ("a negative count", lambda s: {"count": -1}, ValueError, (SMALL, "is -1")),
            ("a count that is an array", lambda s: {"count": jnp.int32(1)}, TypeError, (SMALL, "give an int")),
            ("moments None", lambda s: {"mu": None}, TypeError, ("the saved moments are no dicts by name", "give the State")),
            ("a string", lambda s: {"mu": {**s.mu, "w": "x"}}, TypeError, ("first moment of 'w' is a str ('x'); give an array",)),
            ("a list", lambda s: {"nu": {**s.nu, "w": [1.0]}}, TypeError, ("second moment of 'w' is a list ([1.0]); give an array",)),
            ("one moment None", lambda s: {"mu": {**s.mu, "w": None}}, ValueError, ("of the moments of 'w' one is None", "give both or neither")),
            ("a missing name", lambda s: {"mu": {"w": s.mu["w"]}, "nu": {"w": s.nu["w"]}}, ValueError, ("the saved state lacks 'b'; it has 'w'. Use rename=",)),
            ("a surplus name", lambda s: {"mu": {**s.mu, "c": s.mu["w"]}}, ValueError, ("the saved state has 'c'", "use rename=")),
            ("a shape", lambda s: {"mu": {**s.mu, "w": np.ones(3)}}, ValueError, ("first moment of 'w' has shape (3,), here it is (2, 3); use transform=",)),
            ("a dtype", lambda s: {"nu": {**s.nu, "w": np.ones((2, 3), "f4")}}, TypeError, ("second moment of 'w' has dtype float32, here it is float64", "transform=")),
        )
    ),
]

# Files


def here(w: Any) -> tuple[str, Any, Any]:
    """Return the path of a good file, its hyperparameters and its state."""
    saved, state = w.export()
    path = os.path.join(w.folder, "run.safetensors")
    if not os.path.exists(path):
        acprop_core.save(path, saved, state)
        w.file = Path(path).read_bytes()
    return path, saved, state


def save(w: Any, path: Any = ..., saved: Any = ..., state: Any = ...) -> None:
    good = here(w)
    acprop_core.save(*(own if x is ... else x for x, own in zip((path, saved, state), good, strict=True)))


def load(w: Any, *args: Any, **options: Any) -> Any:
    return acprop_core.load(here(w)[0], *args, **options)


def tree(leaf: Any) -> State:
    return State(0, {"a": leaf}, {"a": leaf})


FILES = [
    bad("save: path None", lambda w: save(w, None), TypeError, "expected str, bytes or os.PathLike object, not NoneType"),
    bad("save: path a number", lambda w: save(w, 3), TypeError, "expected str, bytes or os.PathLike object, not int"),
    bad("save: path with a zero byte", lambda w: save(w, "a\0b"), ValueError, "embedded null byte"),
    bad("save: path a folder", lambda w: save(w, w.folder), IsADirectoryError, "Is a directory", "input"),
    bad("save: path in no folder", lambda w: save(w, w.folder + "/no/x"), FileNotFoundError, "No such file", "/no/"),
    bad("save: swapped", lambda w: save(w, saved=w.export()[1], state=w.export()[0]), TypeError, "the optimizer is a State; give an acprop_core.ACProp"),
    bad("save: the stepper as the optimizer", lambda w: save(w, saved=w.stepper), TypeError, "the optimizer is a Stepper; give an acprop_core.ACProp"),
    bad("save: the stepper as the state", lambda w: save(w, state=w.stepper), TypeError, "the state is a Stepper; give a State, or what export_state returned"),
    *(
        bad(f"save: {name}", lambda w, change=change: save(w, state=change(w.export()[1])), error, *words)
        for name, change, error, words in (
            ("second moments None", lambda s: s._replace(nu=None), ValueError, ("the container of second moments is one value (NoneType)",)),
            ("a missing moment", lambda s: s._replace(nu={"w": s.nu["w"]}), ValueError, ("the container of second moments lacks 'b'",)),
            ("a negative count", lambda s: s._replace(count=-1), ValueError, (SMALL, "is -1; it cannot be negative")),
            ("a count beyond the file", lambda s: s._replace(count=2**63), ValueError, (SMALL, "a file holds counts below 2**63")),
            ("a count of 1.5", lambda s: s._replace(count=1.5), TypeError, (SMALL, "give an integer")),
            ("objects", lambda s: tree(np.ones(2, object)), TypeError, ("first moment of 'a' has dtype object", REFUSED_KIND)),
            ("strings", lambda s: tree("x"), TypeError, ("first moment of 'a' has dtype str", REFUSED_KIND)),
            ("longdouble", lambda s: tree(np.ones(2, np.longdouble)), TypeError, ("first moment of 'a' has dtype float",)),
            ("a masked array", lambda s: tree(np.ma.masked_array(np.ones(2), True)), TypeError, ("first moment of 'a' is a MaskedArray", "np.asarray")),
            ("one name twice", lambda s: State(0, *[{"a.b": np.ones(1), "a": {"b": np.ones(1)}}] * 2), ValueError, ("two arrays are called 'a.b'", "rename a key")),
            ("1 and '1'", lambda s: State(0, *[{1: np.ones(1), "1": np.ones(1)}] * 2), ValueError, ("two arrays are called '1'", "rename a key")),
            ("a name that is no text", lambda s: State(0, *[{"a\ud800": np.ones(1)}] * 2), UnicodeEncodeError, ("surrogates not allowed",)),
            ("a traced array", lambda s: jax.jit(lambda x: save_traced(x))(jnp.ones(2)), TypeError, ("first moment of 'a' cannot be made a NumPy array",)),
        )
    ),
    bad("save: a mask of other names", lambda w: save(w, saved=ACProp(mask={"z": True})), ValueError, "the mask lacks 'w', 'b'"),
    bad("save: a mask of strings", lambda w: save(w, saved=ACProp(mask={"w": "no", "b": True})), TypeError, "mask of 'w' is 'no'; give True (decay) or False"),
    bad("load: path None", lambda w: acprop_core.load(None), TypeError, "expected str, bytes or os.PathLike object, not NoneType"),  # type: ignore[arg-type]
    bad("load: no file", lambda w: acprop_core.load(w.folder + "/no"), FileNotFoundError, "No such file", "/no"),
    bad("load: a folder", lambda w: acprop_core.load(w.folder), IsADirectoryError, "Is a directory"),
    bad("load: learning_rate NaN", lambda w: load(w, learning_rate=math.nan), ValueError, "learning_rate is nan", RANGE),
    bad("load: learning_rate a string", lambda w: load(w, learning_rate="0.1"), TypeError, "learning_rate is '0.1'", REMEDY),
    bad("load: a schedule not given again", lambda w: load(w), ValueError, "learning_rate was a callable", "give it again: load(path, learning_rate=...)"),
    *(
        bad(f"load: {name}", lambda w, options=options: load(w, learning_rate=0.1, **options), error, *words)
        for name, options, error, words in (
            ("rename a list", {"rename": ["w"]}, TypeError, ("rename is ['w']; give a mapping by name, or a callable",)),
            ("rename of an unknown name", {"rename": {"q": "z"}}, ValueError, ("rename names 'q', which the saved state lacks; it has 'w', 'b'",)),
            ("rename to a number", {"rename": {"w": 1}}, TypeError, ("rename makes 1 of 'w'; give a name, or None to leave it out",)),
            ("rename to a name that is there", {"rename": {"w": "b"}}, ValueError, ("two arrays are called 'b'",)),
            ("rename that raises", {"rename": boom}, KeyError, ("the caller's own",)),
            ("transform a string", {"transform": "T"}, TypeError, ("transform is 'T'; give a mapping by name, or a callable",)),
            ("transform of an unknown name", {"transform": {"q": abs}}, ValueError, ("transform names 'q', which the saved state lacks; it has 'w', 'b'",)),
            ("transform by what is no function", {"transform": {"w": 3}}, TypeError, ("transform of 'w' is 3; give a function from array to array",)),
            ("transform without return", {"transform": {"w": lambda x: None}}, TypeError, ("first moment of 'w' has dtype object", REFUSED_KIND)),
            ("transform to strings", {"transform": {"w": lambda x: "x"}}, TypeError, ("first moment of 'w' has dtype str", REFUSED_KIND)),
            ("parameters of a shape", {"params": {"w": np.ones((3, 2)), "b": np.ones(2)}}, ValueError, ("first moment of 'w' has shape (2, 3), here it is (3, 2); use transform=",)),
            ("parameters of a dtype", {"params": {"w": np.ones((2, 3), "f4"), "b": np.ones(2)}}, TypeError, ("first moment of 'w' has dtype float64, here it is float32",)),
            ("parameters that lack one", {"params": {"w": np.ones((2, 3))}}, ValueError, ("the saved state has 'b', for which there is no parameter here; use rename=",)),
            ("parameters with one more", {"params": {"w": np.ones((2, 3)), "b": np.ones(2), "c": np.ones(1)}}, ValueError, ("the saved state lacks 'c'; it has 'w', 'b'. Use rename=",)),
            ("parameters with a None", {"params": {"w": np.ones((2, 3)), "b": None}}, ValueError, ("first moment of 'b' is an array, for which there is no parameter here; leave it out",)),
            ("parameters a string", {"params": "x"}, TypeError, ("is a str ('x'), not an array",)),
        )
    ),
]


def save_traced(x: Any) -> Any:
    acprop_core.save("unused", ACProp(), tree(x))
    return x


# torch

A_NUMBER = "give a number that is at least 0 and "
TORCH_NAMES = {"lr": "learning rate", "eps": "epsilon value", "eps_root": "eps_root value", "weight_decay": "weight_decay value"}


def torch_numbers() -> list[tuple[str, Callable[[], Any], type[Exception], str]]:
    return [
        ("negative", lambda: -1.0, ValueError, "-1.0; " + A_NUMBER),
        ("NaN", lambda: math.nan, ValueError, "nan; " + A_NUMBER),
        ("infinite", lambda: math.inf, ValueError, "inf; " + A_NUMBER),
        ("beyond floats", lambda: 10**400, ValueError, A_NUMBER),
        ("a string", lambda: "0.1", TypeError, "'0.1'; give a number for"),
        ("None", lambda: None, TypeError, "None; give a number for"),
        ("a bool", lambda: True, TypeError, "True; give a number for"),
        ("complex", lambda: 1j, TypeError, "1j; give a number for"),
        ("a list", lambda: [0.1], TypeError, "[0.1]; give a number for"),
        ("an array of NumPy", lambda: np.asarray([0.1]), TypeError, "give a number for"),
        ("a negative tensor", lambda: torch.tensor(-1.0), ValueError, "-1.0; " + A_NUMBER),
        ("a tensor of NaN", lambda: torch.tensor(math.nan), ValueError, "nan; " + A_NUMBER),
        ("a complex tensor", lambda: torch.tensor(1j), TypeError, "give a number, or a tensor of a real one"),
        ("a bool tensor", lambda: torch.tensor(True), TypeError, "give a number, or a tensor of a real one"),
        ("a tensor without value", lambda: torch.tensor(0.1, device="meta"), TypeError, "give a number, or a tensor"),
    ]


def torch_options() -> Iterator[Bad]:
    """Options that the constructor, and a new group, refuse."""
    for name, what in TORCH_NAMES.items():
        for kind, make, error, words in torch_numbers():
            yield bad(f"{name}: {kind}", lambda w, name=name, make=make: w.new(**{name: make()}), error, f"Invalid {what}: ", words)
        for kind, size in (("two elements", 2), ("no element", 0)):
            yield bad(f"{name}: a tensor of {kind}", lambda w, name=name, size=size: w.new(**{name: torch.ones(size)}), ValueError, f"Tensor {name} must be 1-element")
    rate = "Invalid beta parameter at index "
    pair = ("Invalid betas: ", "give two decay rates, such as (0.9, 0.999)")
    for betas, error, words in (
        (None, ValueError, pair),
        (0.9, ValueError, pair),
        ("ab", ValueError, pair),
        ({0.9: 0.99}, ValueError, pair),
        ((0.9,), ValueError, pair),
        ((0.9, 0.99, 0.999), ValueError, pair),
        ((1.0, 0.9), ValueError, (rate + "0: 1.0", "below 1")),
        ((0.9, 1), ValueError, (rate + "1: 1;", "below 1")),
        ((0.9, -0.1), ValueError, (rate + "1: -0.1", "at least 0")),
        ((math.nan, 0.9), ValueError, (rate + "0: nan", "at least 0")),
        (("a", 0.9), TypeError, (rate + "0: 'a'", "give a number for betas[0]")),
        ((0.9, None), TypeError, (rate + "1: None", "give a number for betas[1]")),
        ((False, 0.9), TypeError, (rate + "0: False", "give a number for betas[0]")),
    ):
        yield bad(f"betas: {betas}", lambda w, betas=betas: w.new(betas=betas), error, *words)
    kinds = "betas must be either both floats or both Tensors"
    yield bad("betas: a tensor", lambda w: w.new(betas=torch.tensor([0.9, 0.99])), ValueError, *pair)
    yield bad("betas: b1 a tensor", lambda w: w.new(betas=(torch.tensor(0.9), 0.99)), ValueError, kinds)
    yield bad("betas: b2 a tensor", lambda w: w.new(betas=(0.9, torch.tensor(0.99))), ValueError, kinds)
    yield bad("betas: a tensor of two elements", lambda w: w.new(betas=(torch.tensor(0.9), torch.tensor([0.9, 0.9]))), ValueError, "Tensor betas[1] must be 1-element")
    yield bad("betas: a tensor of 1", lambda w: w.new(betas=(torch.tensor(1.0), torch.tensor(0.9))), ValueError, rate + "0: 1.0", "below 1")
    for name in ("decoupled_weight_decay", "maximize", "foreach", "capturable", "differentiable", "fused"):
        yield bad(f"{name}: a string", lambda w, name=name: w.new(**{name: "no"}), TypeError, f"{name} is 'no'; give True or False")
    for name, make, error, words in (
        ("maximize", lambda: 1, TypeError, "maximize is 1; give True or False"),
        ("foreach", lambda: torch.tensor(True), TypeError, "foreach is tensor(True); give True or False"),
        ("clip_exponent", lambda: -0.5, ValueError, "clip_exponent is -0.5; " + A_NUMBER),
        ("clip_exponent", lambda: math.nan, ValueError, "clip_exponent is nan; " + A_NUMBER),
        ("clip_exponent", lambda: "0.25", TypeError, "clip_exponent is '0.25'; give a number or None"),
        ("clip_exponent", lambda: [0.25], TypeError, "clip_exponent is [0.25]; give a number or None"),
        ("clip_exponent", lambda: torch.tensor(0.25), TypeError, "give a number or None"),
        ("clip_exponent", lambda: True, TypeError, "clip_exponent is True; give a number"),
        ("centering", lambda: "next", ValueError, "centering is 'next'; give 'current' or 'previous'"),
        ("centering", lambda: None, ValueError, "centering is None; give 'current' or 'previous'"),
        ("centering", lambda: ["current"], ValueError, "centering is ['current']; give 'current' or 'previous'"),
        ("moment_dtype", lambda: "float32", TypeError, "moment_dtype is 'float32'; give a torch.dtype or None"),
        ("moment_dtype", lambda: np.float32, TypeError, "give a torch.dtype or None"),
        ("moment_dtype", lambda: torch.int32, ValueError, "moment_dtype is torch.int32; give one of float16"),
        ("moment_dtype", lambda: torch.complex64, ValueError, "moment_dtype is torch.complex64; give one of float16"),
        ("amsgrad", lambda: True, TypeError, "unexpected keyword argument 'amsgrad'"),
    ):
        yield bad(f"{name}: {words}", lambda w, name=name, make=make: w.new(**{name: make()}), error, words)
    apart, both = "`fused` does not support `differentiable`", "`fused` and `foreach` cannot be `True` together"
    yield bad("fused and differentiable", lambda w: w.new(fused=True, differentiable=True), RuntimeError, apart)
    yield bad("fused and foreach", lambda w: w.new(fused=True, foreach=True), RuntimeError, both)
    lists = "as a Tensor is not supported for capturable=False and foreach=True"
    yield bad("foreach: lr a tensor", lambda w: w.new(lr=torch.tensor(0.1), foreach=True), ValueError, "lr " + lists)
    yield bad("foreach: betas tensors", lambda w: w.new(betas=(torch.tensor(0.9), torch.tensor(0.9)), foreach=True), ValueError, "betas[0] " + lists)


def torch_parameters() -> Iterator[Bad]:
    """What cannot be parameters, or a new group of them."""

    def ones() -> Any:
        return torch.ones(2, requires_grad=True)

    new = lambda make: lambda w: acprop_torch.ACProp(make())  # noqa: E731
    dtype = "which ACProp cannot use; give it one of torch.float16"

    def step_of(x: Any, **options: Any) -> None:
        x.grad = x.clone()
        acprop_torch.ACProp([x], **options).step()

    yield bad("parameters: a string", new(lambda: "x"), TypeError, "can only optimize Tensors", "is str")
    yield bad("parameters: a tensor", new(ones), TypeError, "should be an iterable of Tensors or dicts")
    yield bad("parameters: none", new(list), ValueError, "empty parameter list")
    yield bad("parameters: numbers", new(lambda: [1.0]), TypeError, "can only optimize Tensors", "is float")
    yield bad("parameters: of NumPy", new(lambda: [np.ones(2)]), TypeError, "can only optimize Tensors", "numpy.ndarray")
    yield bad("parameters: a None", new(lambda: [None]), TypeError, "can only optimize Tensors", "NoneType")
    yield bad("parameters: a dict of them", new(lambda: {"w": ones()}), TypeError, "can only optimize Tensors", "is str")
    yield bad("parameters: no leaf", new(lambda: [ones() * 2]), ValueError, "can't optimize a non-leaf Tensor")
    yield bad("parameters: named and not", new(lambda: [("a", ones()), ones()]), ValueError, "names are missing")
    yield bad("parameters: a group's set", new(lambda: [{"params": {ones()}}]), TypeError, "ordered collections")
    yield bad("parameters: int", lambda w: step_of(torch.ones(2, dtype=torch.int32)), TypeError, "parameter 0 of its group has dtype torch.int32", dtype)
    yield bad("parameters: bool", lambda w: step_of(torch.ones(2, dtype=torch.bool), foreach=True), TypeError, "parameter 0 of its group has dtype torch.bool", dtype)
    yield bad("parameters: an 8-bit float", lambda w: step_of(torch.ones(2).to(torch.float8_e4m3fn)), TypeError, "parameter 0 of its group has dtype torch.float8_e4m3fn", dtype)
    yield bad("parameters: complex and fused", lambda w: step_of(torch.ones(2, dtype=torch.complex64), fused=True), RuntimeError, "`fused=True` requires all the params to be floating point Tensors")
    yield bad("parameters: without values and fused", lambda w: step_of(torch.ones(2, device="meta"), fused=True), RuntimeError, "`fused=True` requires all the params to be floating point Tensors")
    yield bad("capturable on a CPU", lambda w: step_of(torch.ones(2), capturable=True), AssertionError, "If capturable=True, params and state_steps must be on supported devices")
    yield bad("foreach and differentiable", lambda w: step_of(torch.ones(2), foreach=True, differentiable=True), AssertionError, "_foreach ops don't support autograd")
    add = lambda make: lambda w: w.optimizer.add_param_group(make(w))  # noqa: E731
    yield bad("parameters: a group whose lr is negative", new(lambda: [{"params": [ones()], "lr": -1.0}]), ValueError, "Invalid learning rate: -1.0")
    yield bad("group: a list", add(lambda w: [ones()]), TypeError, "param_group must be a dict")
    yield bad("group: None", add(lambda w: None), TypeError, "param_group must be a dict")
    yield bad("group: without parameters", add(lambda w: {}), KeyError, "params")
    yield bad("group: a parameter of another", add(lambda w: {"params": [("a", w.a)]}), ValueError, "some parameters appear in more than one parameter group")
    yield bad("group: lr a string", add(lambda w: {"params": [("c", ones())], "lr": "x"}), TypeError, "Invalid learning rate: 'x'")
    yield bad("group: lr negative", add(lambda w: {"params": [("c", ones())], "lr": -1.0}), ValueError, "Invalid learning rate: -1.0")
    yield bad("group: maximize a string", add(lambda w: {"params": [("c", ones())], "maximize": "no"}), TypeError, "maximize is 'no'; give True or False")
    yield bad("group: betas out of range", add(lambda w: {"params": [("c", ones())], "betas": (1.0, 0.9)}), ValueError, "Invalid beta parameter at index 0: 1.0")


def torch_states() -> Iterator[Bad]:
    """What cannot be loaded or imported."""
    returned = "give what state_dict() of ACProp returned"
    for name, change, error, words in (
        ("None", lambda s: 0, TypeError, ("the state_dict is a int", returned)),
        ("a list", lambda s: [], TypeError, ("the state_dict is a list", returned)),
        ("an empty dict", lambda s: {}, ValueError, ("the state_dict lacks a dict 'state'", returned)),
        ("no groups", lambda s: {"state": {}}, ValueError, ("or a list of dicts 'param_groups'", returned)),
        ("no state", lambda s: {"param_groups": s["param_groups"]}, ValueError, ("lacks a dict 'state'", returned)),
        ("a model's", lambda s: {"fc.weight": torch.ones(2)}, ValueError, ("lacks a dict 'state'", "not that of a model")),
        ("state a list", lambda s: {**s, "state": []}, ValueError, ("lacks a dict 'state'", returned)),
        ("groups a string", lambda s: {**s, "param_groups": "ab"}, ValueError, ("list of dicts 'param_groups'", returned)),
        ("a group of None", lambda s: {**s, "param_groups": [None]}, ValueError, ("list of dicts", returned)),
        ("no group", lambda s: {**s, "state": {}, "param_groups": []}, ValueError, ("different number of parameter groups",)),
        ("a shorter group", lambda s: s["param_groups"][1].update(params=[]), ValueError, ("parameter 1, which none of its parameter groups has",)),
        ("of another number", lambda s: s["state"].update({7: s["state"].pop(1)}), ValueError, ("the state of parameter 7, which none",)),
        ("a state of None", lambda s: s["state"].update({1: None}), TypeError, ("the state of parameter 1 is a NoneType; load a dict",)),
        ("a state of letters", lambda s: s["state"].update({1: "x"}), TypeError, ("the state of parameter 1 is a str; load a dict",)),
        ("no second moment", lambda s: s["state"][1].pop("exp_avg_var"), ValueError, ("the state of parameter 1 lacks 'exp_avg_var'", "load one that ACProp saved")),
        ("no step", lambda s: s["state"][1].pop("step"), ValueError, ("the state of parameter 1 lacks 'step'",)),
        ("AdamW's", lambda s: torch.optim.AdamW([{"params": [torch.ones(4)]}, {"params": [torch.ones(6)]}]).state_dict(), ValueError, ("parameter group 0 lacks 'eps_root': it is that of another optimizer; load one that ACProp saved",)),
    ):

        def load(w: Any, change: Any = change) -> None:
            def kept(saved: Any) -> Any:
                changed = change(saved)
                return saved if isinstance(changed, torch.Tensor | None) else changed

            w.load(kept)

        yield bad(f"load_state_dict: {name}", load, error, *words)
    for moment in ("exp_avg", "exp_avg_var"):
        for name, make, error, words in (
            ("None", lambda: None, TypeError, "is a NoneType; load a floating-point tensor"),
            ("a list", lambda: [1.0], TypeError, "is a list; load a floating-point tensor"),
            ("an array of NumPy", lambda: np.ones((2, 3), "f4"), TypeError, "is a ndarray; load a floating-point tensor"),
            ("int", lambda: torch.ones(2, 3, dtype=torch.int32), TypeError, "is a torch.int32; load a floating-point"),
            ("bool", lambda: torch.ones(2, 3, dtype=torch.bool), TypeError, "is a torch.bool; load a floating-point"),
            ("complex", lambda: torch.ones(2, 3, dtype=torch.complex64), TypeError, "is a torch.complex64; load a"),
            ("transposed", lambda: torch.ones(3, 2), ValueError, "has shape (3, 2), the parameter (2, 3); load the state"),
            ("to be broadcast", lambda: torch.ones(1), ValueError, "has shape (1,), the parameter (2, 3); load the state"),
            ("sparse", lambda: torch.eye(2, 3).to_sparse(), ValueError, "is sparse; load a dense tensor"),
            ("without values", lambda: torch.ones(2, 3, device="meta"), ValueError, "is without values; load a dense"),
        ):
            yield bad(f"load_state_dict: {moment} {name}", lambda w, moment=moment, make=make: w.load_state(**{moment: make()}), error, f"{moment} of parameter 1 ", words)
    for name, make, error, words in (
        ("None", lambda: None, TypeError, "is None; load a number"),
        ("a string", lambda: "3", TypeError, "is '3'; load a number"),
        ("a bool", lambda: True, TypeError, "is True; load a number"),
        ("negative", lambda: torch.tensor(-1.0), ValueError, "is -1.0; load a whole number that is at least 0"),
        ("NaN", lambda: torch.tensor(math.nan), ValueError, "is nan; load a whole number"),
        ("infinite", lambda: torch.tensor(math.inf), ValueError, "is inf; load a whole number"),
        ("no whole number", lambda: 2.5, ValueError, "is 2.5; load a whole number"),
        ("of three elements", lambda: torch.ones(3), TypeError, "load a number, or a floating-point tensor of one"),
        ("complex", lambda: torch.tensor(1j), TypeError, "load a number, or a floating-point tensor of one"),
        ("an integer tensor", lambda: torch.tensor(3), TypeError, "load a number, or a floating-point tensor of one"),
        ("without value", lambda: torch.tensor(3.0, device="meta"), TypeError, "load a number, or a floating-point"),
    ):
        yield bad(f"load_state_dict: step {name}", lambda w, make=make: w.load_state(step=make()), error, "step of parameter 1 ", words)
    for name, x, error, words in SPOILT:
        yield bad(f"load_state_dict: {name} {x!r}", lambda w, name=name, x=x: w.load_group(**{name: x}), error, words)
    yield bad("load_state_dict: fused and foreach", lambda w: w.load_group(fused=True, foreach=True), RuntimeError, "cannot be `True` together")
    yield bad("load_state_dict: maximize a string", lambda w: w.load_group(maximize="no"), TypeError, "maximize is 'no'; give True or False")

    def put(key: str, x: Any) -> Callable[[Any], None]:
        def act(w: Any) -> None:
            saved, state = w.export()
            w.take(saved, state._replace(mu={**state.mu, key: x}))

        return act

    def other(**replace: Any) -> Callable[[Any], None]:
        return lambda w: w.take(w.export()[0], w.export()[1]._replace(**replace))

    take = acprop_torch.import_state
    yield bad("import_state: into no optimizer", lambda w: take(None, w.model, *w.export()), TypeError, "the optimizer is a NoneType; give an acprop_torch.ACProp")  # type: ignore[arg-type]
    yield bad("import_state: into AdamW", lambda w: take(torch.optim.AdamW(w.model.parameters()), w.model, *w.export()), TypeError, "the optimizer is a AdamW; give an acprop_torch.ACProp")  # type: ignore[arg-type]
    yield bad("import_state: model a list", lambda w: take(w.optimizer, [w.a, w.b], *w.export()), TypeError, "the model is a list; give a Module, or a mapping of names to parameters")  # type: ignore[arg-type]
    yield bad("import_state: model None", lambda w: take(w.optimizer, None, *w.export()), TypeError, "the model is a NoneType; give a Module")  # type: ignore[arg-type]
    yield bad("import_state: another model", lambda w: take(w.optimizer, {"a": w.a}, *w.export()), ValueError, "parameter group 1 has a parameter of shape (2, 3) that the model has not; give the model")
    yield bad("import_state: swapped", lambda w: w.take(*reversed(w.export())), TypeError, "to import are a State and a ACProp")
    yield bad("import_state: prefer", lambda w: w.take(*w.export(), prefer="mine"), ValueError, "prefer is 'mine'; give 'own' or 'saved'")
    yield bad("import_state: other hyperparameters", lambda w: w.take(ACProp(0.5), w.export()[1]), ValueError, "hyperparameters differ: learning_rate is 0.1 here and 0.5 in the saved state", "prefer='own' or prefer='saved'")
    yield bad("import_state: a schedule", lambda w: w.take(ACProp(boom), w.export()[1], prefer="saved"), ValueError, "the saved learning_rate is a callable, which a torch optimizer cannot have", "prefer='own'")
    yield bad("import_state: a negative count", other(count=-1), ValueError, SMALL, "is -1; it cannot be negative")
    yield bad("import_state: a count of 1.0", other(count=1.0), TypeError, SMALL, "is 1.0; give an integer")
    yield bad("import_state: moments None", other(mu=None), TypeError, "the saved moments are no dicts by name")
    yield bad("import_state: missing names", other(mu={}, nu={}), ValueError, "the saved state lacks 'a', 'b'", "Use rename=")
    yield bad("import_state: a string", put("b", "x"), TypeError, "first moment of 'b' is a str ('x'); give an array")
    yield bad("import_state: a list", put("b", [1.0]), TypeError, "first moment of 'b' is a list ([1.0]); give an array")
    yield bad("import_state: objects", put("b", np.ones((2, 3), object)), TypeError, "first moment of 'b' has dtype object, here it is float32")
    yield bad("import_state: float64", put("b", np.ones((2, 3))), TypeError, "first moment of 'b' has dtype float64, here it is float32")
    yield bad("import_state: a shape", put("b", np.ones(3, "f4")), ValueError, "first moment of 'b' has shape (3,), here it is (2, 3); use transform=")
    yield bad("import_state: a surplus name", put("c", np.ones(3, "f4")), ValueError, "the saved state has 'c', for which there is no parameter here; use rename=")
    yield bad("export_state: of no optimizer", lambda w: acprop_torch.export_state(None, w.model), TypeError, "the optimizer is a NoneType; give an acprop_torch.ACProp")  # type: ignore[arg-type]
    yield bad("export_state: hyperparameters a string", lambda w: acprop_torch.export_state(w.optimizer, w.model, "x"), TypeError, "the hyperparameters are a str; give an acprop_core.ACProp")  # type: ignore[arg-type]


# options that someone, or a scheduler, has put into a group
SPOILT: list[tuple[str, Any, type[Exception], str]] = [
    ("lr", math.nan, ValueError, "Invalid learning rate: nan"),
    ("lr", "x", TypeError, "Invalid learning rate: 'x'; give a number for lr"),
    ("lr", None, TypeError, "Invalid learning rate: None; give a number for lr"),
    ("lr", True, TypeError, "Invalid learning rate: True; give a number for lr"),
    ("betas", None, ValueError, "Invalid betas: None; give two decay rates"),
    ("betas", (1.0, 0.9), ValueError, "Invalid beta parameter at index 0: 1.0"),
    ("eps", -1.0, ValueError, "Invalid epsilon value: -1.0"),
    ("weight_decay", math.inf, ValueError, "Invalid weight_decay value: inf"),
    ("clip_exponent", "x", TypeError, "clip_exponent is 'x'; give a number or None"),
    ("clip_exponent", [0.25], TypeError, "clip_exponent is [0.25]; give a number or None"),
    ("clip_exponent", -1.0, ValueError, "clip_exponent is -1.0"),
    ("centering", "next", ValueError, "centering is 'next'; give 'current' or 'previous'"),
    ("moment_dtype", "float32", TypeError, "moment_dtype is 'float32'; give a torch.dtype or None"),
]


def torch_steps() -> Iterator[Bad]:
    """What a step refuses, on each way to step."""
    for name, x, error, words in SPOILT:
        yield bad(f"step: {name} {x!r}", lambda w, name=name, x=x: w.spoilt(**{name: x}), error, words)

    def sparse(w: Any) -> None:
        w.b.grad = torch.eye(2, 3).to_sparse()
        w.step()

    yield bad("gradient: sparse", sparse, RuntimeError, "ACProp does not support sparse gradients, please consider SparseAdam")

    def resized(*shape: int) -> Callable[[Any], None]:
        def act(w: Any) -> None:
            w.b.data = torch.ones(shape)
            w.step()

        return act

    shapes = "a parameter, its gradient, exp_avg and exp_avg_var have the shapes {}, (2, 3), (2, 3), (2, 3); clear"
    for shape in ((3,), (4, 2, 3), (1, 3)):
        yield bad(f"parameter: data of shape {shape}", resized(*shape), RuntimeError, shapes.format(shape), "load the state")
    yield bad("closure: a string", lambda w: w.optimizer.step("x"), TypeError, "not callable")
    yield bad("closure: raises", lambda w: w.optimizer.step(boom), KeyError, "the caller's own")
    yield bad("set by torch: gradient of another shape", lambda w: setattr(w.b, "grad", torch.ones(3, 2)), RuntimeError, "a gradient of size '[3, 2]' to a tensor of size '[2, 3]'")
    yield bad("set by torch: gradient on another device", lambda w: setattr(w.b, "grad", torch.ones((2, 3), device="meta")), RuntimeError, "device type 'meta'")
    yield bad("set by torch: gradient a string", lambda w: setattr(w.b, "grad", "x"), TypeError, "to be a Tensor or None")


# fmt: on

WORLDS: dict[str, tuple[type[Any], list[list[Bad]]]] = {
    "NumPy": (Core, [CORE, NUMPY, OPTIONS]),
    "JAX": (Core, [CORE, [*jax_core()]]),
    "optax": (Optax, [OPTAX, OPTAX_OPTIONS]),
    "optax scale": (Optax, [OPTAX]),
    "stepper Numba": (Step, [STEPPER, STEPPER_OPTIONS, FILES]),
    "stepper tiles": (Step, [STEPPER]),
}
if torch is not None:
    WORLDS |= {
        "torch core": (Core, [CORE, TORCH_CORE]),
        "torch": (Torch, [[*torch_options()], [*torch_parameters()], [*torch_states()], [*torch_steps()]]),
        "torch foreach": (Torch, [[*torch_steps()]]),
        "torch fused": (Torch, [[*torch_steps()]]),
    }
ROWS = [(backend, row) for backend, (_, tables) in WORLDS.items() for table in tables for row in table]


@pytest.mark.promise("bad input")
@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
@pytest.mark.parametrize(("backend", "row"), ROWS, ids=[f"{backend}-{row.name}" for backend, row in ROWS])
def test_bad_input_is_refused_and_changes_nothing(backend: str, row: Bad, tmp_path: Path) -> None:
    kind = WORLDS[backend][0]
    world, twin = kind(backend), kind(backend)
    world.folder = str(tmp_path / "input")
    os.mkdir(world.folder)
    before = world.bits()
    with pytest.raises(row.error) as caught:
        row.act(world)
    assert type(caught.value) is row.error, repr(caught.value)
    missing = [word for word in row.words if word not in str(caught.value)]
    assert not missing, (missing, str(caught.value))
    world.mend()
    assert world.bits() == before
    if hasattr(world, "file"):
        assert [x.read_bytes() for x in Path(world.folder).iterdir()] == [world.file]
    world.step()
    twin.step()
    assert world.bits() == twin.bits()


def test_no_row_stands_twice() -> None:
    names = [(backend, row.name) for backend, row in ROWS]
    assert len(set(names)) == len(names)
    distinct = {(WORLDS[backend][0], row.name) for backend, row in ROWS}
    assert len(distinct) > 600
