"""Bad input of the functional core."""

import dataclasses
import math
from typing import Any

import array_api_strict as strict
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
from jax.experimental.sparse import BCOO

from acprop_core import ACProp
from bad_input.rows import (
    BOTH,
    CENTERING,
    COUNT,
    DECAY,
    FINITE,
    HYPER,
    INTEGER,
    INTEGER_OR_ARRAY,
    KINDS,
    MINUS_ONE,
    NUMBER,
    ONE_KIND,
    OWN_ERROR,
    REAL,
    STRUCTURE,
    THE_STATE,
    TRUE_OR_FALSE,
    WRONG_NUMBERS,
    Bad,
    From,
    bad,
    boom,
    leaves,
    table,
)
from cases import prescribed
from hosts import BACKENDS

GRADS = {"w": np.array([[0.1, 0.2, -0.3], [0.4, -0.5, 0.6]], "f4"), "b": np.array([0.7, -0.8], "f4")}
PARAMS = {"w": np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], "f4"), "b": np.array([0.5, 1.5], "f4")}


def nest(x: dict[str, Any]) -> Any:
    return {"w": x["w"], "b": [x["b"]]}


CASE = prescribed(HYPER, {leaf: x[None] for leaf, x in GRADS.items()}, nest=nest)


class Core:
    """The functional core in the middle of a run: parameters "w" and "b.0"."""

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self.host: Any = BACKENDS[backend].begin(CASE)
        self.host.put(PARAMS)
        self.grads = self.host.tree(GRADS)
        self.optimizer = self.host.optimizer
        self.step()
        self.step()

    @property
    def params(self) -> Any:
        return self.host.params

    @property
    def state(self) -> Any:
        return self.host.state

    def array(self, values: Any, dtype: str = "float32") -> Any:
        return self.host.enter(np.asarray(values, dtype))

    def step(self) -> None:
        self.host.step(GRADS)

    def bits(self) -> Any:
        return self.state.count, leaves((self.params, self.grads, self.state.mu, self.state.nu))

    def mend(self) -> None: ...

    def update(self, grads: Any = ..., state: Any = ..., params: Any = ..., **hyper: Any) -> None:
        """Update with other hyperparameters, or with another gradient, state, parameter, count or moment."""
        replace = {key: hyper.pop(key) for key in ("count", "mu", "nu") if key in hyper}
        state = self.state._replace(**replace) if state is ... else state
        grads, params = (own if x is ... else x for x, own in ((grads, self.grads), (params, self.params)))
        ACProp(**{**HYPER, **hyper}).update(grads, state, params)

    def traced_update(self, **replace: Any) -> None:
        jax.jit(self.optimizer.update)(self.grads, self.state._replace(**replace), self.params)

    def schedule(self, rate: Any) -> None:
        """Update with a schedule that returns this."""
        self.update(learning_rate=lambda count: rate)

    def tree(self, what: str, tree: Any) -> None:
        """Use a tree as the gradients, moments, updates or parameters."""
        if what == "update":
            self.optimizer.apply(self.params, tree)
        elif what == "parameter":
            self.optimizer.init(tree)
        else:
            self.update(**{{"gradient": "grads", "first moment": "mu", "second moment": "nu"}[what]: tree})

    def put(self, what: str, leaf: Any) -> None:
        """Use a tree whose "w" is this leaf as the gradients, moments, updates or parameters."""
        self.tree(what, {**self.grads, "w": leaf})

    def init(self, params: Any) -> None:
        self.optimizer.init(params)

    def option(self, **hyper: Any) -> None:
        ACProp(**hyper)

    def moment_dtype(self, dtype: str, params: Any) -> None:
        ACProp(moment_dtype=dtype).init(params)

    def assign(self, name: str, value: Any) -> None:
        setattr(self.optimizer, name, value)


PLACES = ("gradient", "first moment", "second moment", "update")
RATE = "learning_rate(2) is"
LIBRARY = "is an array of array_api_strict"
ONES = np.ones((2, 3))


def of(what: str) -> str:
    return f"{what} 'w'" if what == "parameter" else f"{what} of 'w'"


# A row a line
# fmt: off

# What cannot be a gradient, a moment, an update or a parameter; a parameter may be of any shape, and complex
SHAPES = [
    ("transposed", From(lambda w: w.array(ONES.T)), ValueError, "has shape (3, 2), its", "(2, 3); make them equal"),
    ("0-d", From(lambda w: w.array(1.0)), ValueError, "has shape (), its", "make them equal"),
    ("complex", From(lambda w: w.array(ONES, "complex64")), TypeError, "has dtype complex64", REAL),
]
ARRAYS = [
    ("int", From(lambda w: w.array(ONES, "int32")), TypeError, "has dtype int32", KINDS),
    ("bool", From(lambda w: w.array(ONES, "bool")), TypeError, "has dtype bool", KINDS),
    ("a number", 1.0, TypeError, "is a float (1.0), not an array", "asarray"),
    ("a string", "x", TypeError, "is a str ('x'), not an array", "asarray"),
    ("a generator", From(lambda w: (x for x in ONES)), TypeError, "is a generator", "asarray"),
    ("a set", {1.0}, TypeError, "is a set ({1.0}), not an array", "asarray"),
    ("a type", From(lambda w: type(w.grads["w"])), TypeError, "not an array", "asarray"),
    ("another library", strict.asarray(ONES), TypeError, "of array_api_strict", "convert one of them"),
]
TREES = [
    ("None", None, ValueError, "is one value (NoneType) where the parameters have a container (dict)", STRUCTURE),
    ("a bare array", From(lambda w: w.grads["w"]), ValueError, "is one value", "a container (dict)", STRUCTURE),
    ("values of a dict", From(lambda w: w.grads.values()), ValueError, "is one value (dict_values)", STRUCTURE),
    ("a string", "grads", ValueError, "is one value (str)", STRUCTURE),
    ("a list", From(lambda w: [w.grads["w"], w.grads["b"]]), ValueError, "lacks 'w', 'b'", STRUCTURE),
    ("a missing leaf", From(lambda w: {"w": w.grads["w"]}), ValueError, "lacks 'b'", STRUCTURE),
    ("a missing inner leaf", From(lambda w: {**w.grads, "b": []}), ValueError, "lacks 'b.0'", STRUCTURE),
    ("a surplus leaf", From(lambda w: {**w.grads, "c": w.grads["w"]}), ValueError,
     "has 'c'", "the parameters lack; leave that out"),
    ("a surplus inner leaf", From(lambda w: {**w.grads, "b": [*w.grads["b"], 1]}), ValueError,
     "has 'b.1'", "leave that out"),
]


def in_every_place() -> list[Bad]:
    rows = []
    for what in (*PLACES, "parameter"):
        rows += table(f"{what}: ", "put", "leaf", ARRAYS, of(what), what=what)
    for what in PLACES:
        container = f"the container of {what}s"
        rows += table(f"{what}: ", "put", "leaf", SHAPES, of(what), what=what)
        rows += table(f"{what}: ", "put", "leaf", [
            ("a list", [[1.0]], ValueError, f"{container} at 'w' is a container (list)", STRUCTURE),
            ("a dict", {"x": 1.0}, ValueError, f"{container} at 'w' is a container (dict)", STRUCTURE),
        ], what=what)
        rows += table(f"container of {what}s: ", "tree", "tree", TREES, container, what=what)
    for what in ("first moment", "second moment"):
        rows.append(bad(f"{what}: None", "put", {"what": what, "leaf": None}, ValueError,
                        f"{of(what)} is None, its parameter an array; {BOTH}"))
    return rows


CORE = [
    *in_every_place(),
    bad("gradient for no parameter", "update", {"params": From(lambda w: {**w.params, "w": None})}, ValueError,
        f"gradient of 'w' is an array, its parameter None; {BOTH}"),
    bad("parameters: None under decay", "update", {"params": None}, ValueError,
        "weight_decay is 0.1", "needs the parameters", "call update(grads, state, params)"),
    *table("state: ", "update", "state", [
        ("None", None, TypeError, f"the state is a NoneType; {THE_STATE} that init or update returned"),
        ("a plain tuple", From(lambda w: tuple(w.state)), TypeError, f"the state is a tuple; {THE_STATE}"),
        ("a dict", From(lambda w: w.state._asdict()), TypeError, f"the state is a dict; {THE_STATE}"),
        ("of another optimizer", From(lambda w: adam_or_empty(w)), TypeError, "the state is a", THE_STATE),
        ("of other parameters", From(lambda w: w.optimizer.init({"v": w.params["w"]})), ValueError,
         "the container of first moments lacks 'w', 'b'", STRUCTURE),
    ]),
    *table("count: ", "update", "count", [
        ("negative", -1, ValueError, MINUS_ONE),
        ("a float", 1.0, TypeError, f"is 1.0; {INTEGER_OR_ARRAY}"),
        ("NaN", math.nan, TypeError, f"is nan; {INTEGER}"),
        ("a string", "1", TypeError, f"is '1'; {INTEGER}"),
        ("None", None, TypeError, f"is None; {INTEGER}"),
        ("a bool", True, TypeError, f"is True; {INTEGER}"),
        ("an array with an axis", From(lambda w: w.array([2], "int32")), TypeError, INTEGER_OR_ARRAY),
        ("a floating-point array", From(lambda w: w.array(2.0)), TypeError, INTEGER),
        ("a bool array", From(lambda w: w.array(True, "bool")), TypeError, INTEGER),
        ("of another library", strict.asarray(2), TypeError,
         f"{LIBRARY}, the parameters are arrays of", "convert it, with float() or int()"),
    ], COUNT),
    *table("schedule: ", "schedule", "rate", [
        ("NaN", math.nan, ValueError, f"{RATE} nan; {FINITE}"),
        ("infinite", math.inf, ValueError, f"{RATE} inf; {FINITE}"),
        ("a string", "0.1", TypeError, f"{RATE} '0.1'", NUMBER),
        ("None", None, TypeError, f"{RATE} None", NUMBER),
        ("a bool", True, TypeError, f"{RATE} True", NUMBER),
        ("an array with an axis", From(lambda w: w.array([0.1])), TypeError, NUMBER),
        ("a complex array", From(lambda w: w.array(0.1, "complex64")), TypeError, NUMBER),
    ], RATE),
    bad("schedule: a decay of NaN", "update", {"weight_decay": lambda count: math.nan}, ValueError,
        f"weight_decay(2) is nan; {FINITE}"),
    bad("schedule: a decay that is a string", "update", {"weight_decay": lambda count: "0.1"}, TypeError,
        f"weight_decay(2) is '0.1'; {NUMBER}"),
    bad("schedule: of another library", "schedule", {"rate": strict.asarray(0.1)}, TypeError,
        f"learning_rate {LIBRARY}", "convert it"),
    bad("schedule: raises", "update", {"learning_rate": boom}, KeyError, OWN_ERROR),
    *table("mask: ", "update", "mask", [
        ("a list", [True, False], ValueError, "the mask lacks 'w', 'b'", STRUCTURE),
        ("a missing leaf", {"w": True}, ValueError, "the mask lacks 'b'", STRUCTURE),
        ("a surplus leaf", {"w": True, "b": True, "c": True}, ValueError,
         "the mask has 'c', which the parameters lack; leave that out"),
        ("too deep", {"w": [True], "b": True}, ValueError, "the mask at 'w' is a container (list)", STRUCTURE),
        ("a string", "all", TypeError, f"mask of 'w' is 'all'; {DECAY}"),
        ("a number", {"w": 2, "b": True}, TypeError, f"mask of 'w' is 2; {DECAY}"),
        ("a float", {"w": 1.0, "b": True}, TypeError, f"mask of 'w' is 1.0; {DECAY}"),
        ("an array", From(lambda w: {"w": True, "b": w.array(True, "bool")}), TypeError, "mask of 'b.0' is", DECAY),
        ("None for a parameter", {"w": None, "b": True}, TypeError, f"mask of 'w' is None; {DECAY}"),
        ("a callable without return", lambda params: None, TypeError, f"mask of 'w' is None; {DECAY}"),
        ("a callable that raises", boom, KeyError, OWN_ERROR),
    ]),
    *table("parameters: ", "init", "params", [
        ("a string", "params", TypeError, "parameter is a str ('params'), not an array"),
        ("a list of numbers", [1.0, 2.0], TypeError, "parameter '0' is a float (1.0), not an array"),
    ]),
    bad("hyperparameter of another library", "update", {"b2": strict.asarray(0.9)}, TypeError,
        f"b2 {LIBRARY}", "convert it"),
]


def adam_or_empty(world: Any) -> Any:
    return optax.adam(0.1).init(world.params)[0] if world.backend == "jax_eager" else optax.EmptyState()


IN_NUMPY = [
    ("object array", np.ones((2, 3), object), TypeError, "has dtype object", KINDS),
    ("strings", np.full((2, 3), "1.0"), TypeError, "has dtype str", KINDS),
    ("longdouble", np.ones((2, 3), np.longdouble), TypeError, "has dtype float", KINDS),
    ("masked array", np.ma.ones((2, 3)), TypeError, "is a MaskedArray", "convert it with np.asarray"),
    ("matrix", From(lambda w: np.ones((2, 3)).view(np.matrix)), TypeError, "is a matrix", "convert it with np.asarray"),
]
NUMPY = [
    *(row for what in (*PLACES, "parameter")
      for row in table(f"{what}: ", "put", "leaf", IN_NUMPY, of(what), what=what)),
    *table("parameter: ", "put", "leaf", [
        ("dates", np.zeros((2, 3), "M8[D]"), TypeError, "parameter 'w' has dtype datetime64", KINDS),
        ("records", np.zeros((2, 3), "f4,f4"), TypeError, "parameter 'w' has dtype void64", KINDS),
        ("an 8-bit float", np.ones((2, 3), ml_dtypes.float8_e4m3fn), TypeError,
         "parameter 'w' has dtype float8_e4m3fn", KINDS),
        ("a memoryview", memoryview(b"123"), TypeError, "parameter 'w' is a memoryview", "asarray"),
    ], what="parameter"),
    bad("learning_rate: of JAX", "update", {"learning_rate": jnp.float32(0.1)}, TypeError,
        "learning_rate is an array of jax.numpy, the parameters are arrays of numpy; convert it"),
    bad("weight_decay: of array_api_strict", "update", {"weight_decay": strict.asarray(0.1)}, TypeError,
        f"weight_decay {LIBRARY}", "convert it"),
    *table("count: ", "update", "count", [
        ("of JAX", jnp.int32(2), TypeError,
         "is an array of jax.numpy, the parameters are arrays of numpy; convert it"),
        ("a negative array", np.asarray(-1), ValueError, MINUS_ONE),
    ], COUNT),
    bad("schedule: an array of NaN", "schedule", {"rate": np.asarray(math.nan)}, ValueError,
        "learning_rate(2) is nan", FINITE),
]

# Hyperparameters, which belong to no array library: each kind of wrong value for each name
NUMBERS = ("learning_rate", "b1", "b2", "eps", "eps_root", "weight_decay", "clip_exponent")
OPTIONS = [
    *(row for name in NUMBERS for row in table(f"{name}: ", "option", name, WRONG_NUMBERS, f"{name} is ")),
    *(bad(f"{name}: None", "option", {name: None}, TypeError, f"{name} is None", NUMBER) for name in NUMBERS[:-1]),
    *(bad(f"{name}: {x}", "option", {name: x}, ValueError, f"{name} is {x}", "below 1")
      for name in ("b1", "b2") for x in (1, 1.5)),
    *(bad(f"centering: {x!r}", "option", {"centering": x}, ValueError, f"centering is {x!r}; {CENTERING}")
      for x in ("Current", None, 1, ["current"])),
    *(bad(f"asynchronous: {x!r}", "option", {"asynchronous": x}, TypeError, f"asynchronous is {x!r}; {TRUE_OR_FALSE}")
      for x in ("no", None, 0, np.True_)),
    *(bad(f"moment_dtype: {x}", "option", {"moment_dtype": x}, ValueError, "moment_dtype is", ONE_KIND)
      for x in ("int32", "float8", "double", np.complex64, int)),
    bad("moment_dtype: one that the library lacks", "moment_dtype",
        {"dtype": "bfloat16", "params": From(lambda w: w.params)}, TypeError,
        "moment_dtype is 'bfloat16', in which numpy cannot keep", "use a wider one"),
    bad("moment_dtype: none of complex numbers", "moment_dtype",
        {"dtype": "float16", "params": np.ones(2, complex)}, TypeError,
        "moment_dtype is 'float16', in which numpy cannot keep the moments of complex128", "use a wider one"),
    bad("an option that is none", "option", {"amsgrad": True}, TypeError, "unexpected keyword argument 'amsgrad'"),
    bad("an option set afterwards", "assign", {"name": "b1", "value": 0.5}, dataclasses.FrozenInstanceError,
        "cannot assign to field 'b1'"),
]

IN_JAX = [
    ("sparse", From(lambda w: BCOO.fromdense(jnp.eye(2, 3))), TypeError,
     "is sparse (BCOO); make it dense: todense()"),
    ("random keys", From(lambda w: jax.random.split(jax.random.key(0), (2, 3))), TypeError,
     "has dtype key<fry>", KINDS),
    ("an 8-bit float", From(lambda w: jnp.ones((2, 3), "float8_e4m3fn")), TypeError,
     "has dtype float8_e4m3fn", KINDS),
    ("a shape", jax.ShapeDtypeStruct((2, 3), jnp.float32), TypeError, "is a ShapeDtypeStruct", "not an array"),
]
JAX = [
    *table("gradient: ", "put", "leaf", IN_JAX, of("gradient"), what="gradient"),
    *table("parameter: ", "put", "leaf", IN_JAX, of("parameter"), what="parameter"),
    bad("count: a float, traced", "traced_update", {"count": 1.0}, TypeError, COUNT, INTEGER),
]
