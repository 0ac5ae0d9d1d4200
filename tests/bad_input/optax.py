"""Bad input of acprop_optax: `acprop`, and `scale_by_acprop`, its part without learning rate and decay."""

import math
from typing import Any

import array_api_strict as strict
import jax
import jax.numpy as jnp
import numpy as np
import optax

import acprop_optax
from acprop_core import State
from bad_input.core import CASE, GRADS, PARAMS
from bad_input.rows import (
    AN_ARRAY,
    ARRAY_OR_NUMBER,
    BOTH,
    CENTERING,
    COUNT,
    DECAY,
    HYPER,
    INTEGER,
    INTEGER_OR_ARRAY,
    KINDS,
    MINUS_ONE,
    NUMBER,
    OWN_ERROR,
    REAL,
    SOME_KIND,
    TRUE_OR_FALSE,
    WRONG_NUMBERS,
    WRONG_VALUES,
    Bad,
    From,
    bad,
    boom,
    leaves,
    table,
)
from hosts import Optax as Host

WHOLE, PART = acprop_optax.acprop(**HYPER), acprop_optax.scale_by_acprop()
UPDATE_WHOLE, UPDATE_PART = jax.jit(WHOLE.update), jax.jit(PART.update)


class Optax:
    """One of the two transformations in the middle of a run: parameters "w" and "b.0"."""

    def __init__(self, backend: str) -> None:
        self.whole = backend == "optax"
        self.transform = WHOLE if self.whole else PART
        self.host = Host(CASE, self.transform, UPDATE_WHOLE if self.whole else UPDATE_PART)
        self.host.put(PARAMS)
        self.grads = self.host.tree(GRADS)
        self.step()
        self.step()

    @property
    def params(self) -> Any:
        return self.host.params

    @property
    def state(self) -> Any:
        return self.host.state

    def step(self) -> None:
        self.host.step(GRADS)

    def bits(self) -> Any:
        return leaves((self.params, self.grads, self.state))

    def mend(self) -> None: ...

    def update(self, grads: Any = ..., state: Any = ..., params: Any = ..., **replace: Any) -> None:
        """Update with another gradient, state, parameter, count or moment."""
        moments = (self.state[0] if self.whole else self.state)._replace(**replace)
        own_state = (moments, *self.state[1:]) if self.whole else moments
        given = zip((grads, state, params), (self.grads, own_state, self.params), strict=True)
        self.transform.update(*(own if x is ... else x for x, own in given))

    def traced_count(self, count: Any) -> None:
        jax.jit(lambda count: self.update(count=count))(count)

    def put(self, where: str, leaf: Any) -> None:
        """Use a tree whose "w" is this leaf as the gradients, moments or parameters."""
        self.update(**{where: {**self.grads, "w": leaf}})

    def init(self, params: Any) -> None:
        self.transform.init(params)

    def without_parameter(self, grads: Any) -> None:
        """Update for "a", which is None."""
        self.transform.update(grads, self.transform.init({"a": None}), {"a": None})

    def option(self, **options: Any) -> None:
        """Take a step with other options, of `acprop`."""
        transform = acprop_optax.acprop(**{"learning_rate": 0.1, "weight_decay": 0.1, **options})
        transform.update(self.grads, transform.init(self.params), self.params)

    def schedule(self, rate: Any) -> None:
        """Take a step with a schedule that returns this."""
        self.option(learning_rate=lambda count: rate)

    def no_options(self) -> None:
        acprop_optax.acprop()  # type: ignore[call-arg]


IN_STRUCTURE = "are not in the structure of the first moments"
MASK_STRUCTURE = "the mask is not in the structure of the parameters"
ONE_THAT = "pass the one that"

# A row a line
# fmt: off
LEAVES = [
    ("transposed", jnp.ones((3, 2)), ValueError, "(3, 2)", "(2, 3)", "make them equal"),
    ("a number", 1.0, ValueError, "()", "(2, 3)", "make them equal"),
    ("int", jnp.ones((2, 3), int), TypeError, "has dtype int32", KINDS),
    ("bool", jnp.ones((2, 3), bool), TypeError, "has dtype bool", KINDS),
    ("an 8-bit float", From(lambda w: jnp.ones((2, 3), "float8_e4m3fn")), TypeError, "float8_e4m3fn", KINDS),
    ("a float0", np.zeros((2, 3), jax.dtypes.float0), TypeError, "has dtype void", KINDS),
    ("random keys", From(lambda w: jax.random.split(jax.random.key(0), (2, 3))), TypeError, "dtype key<fry>", KINDS),
    ("an object array", np.ones((2, 3), object), TypeError, "is a ndarray", ARRAY_OR_NUMBER),
    ("a masked array", np.ma.ones((2, 3)), TypeError, "is a MaskedArray", ARRAY_OR_NUMBER),
    ("a string", "x", TypeError, "is a str ('x')", ARRAY_OR_NUMBER),
    ("a set", {1.0}, TypeError, "is a set ({1.0})", ARRAY_OR_NUMBER),
]
TREES = [
    ("a list", From(lambda w: [w.grads["w"], w.grads["b"]]), ValueError),
    ("a tuple for a list", From(lambda w: {**w.grads, "b": tuple(w.grads["b"])}), ValueError),
    ("a bare array", From(lambda w: w.grads["w"]), ValueError),
    ("a string", "grads", ValueError),
    ("a missing leaf", From(lambda w: {"w": w.grads["w"]}), ValueError),
    ("a surplus leaf", From(lambda w: {**w.grads, "c": w.grads["w"]}), ValueError),
    ("a leaf too deep", From(lambda w: {**w.grads, "b": w.grads["b"][0]}), ValueError),
]
OPTAX: list[Bad] = [
    *table("gradient: ", "put", "leaf", LEAVES, "of 'w'", where="grads"),
    *table("first moment: ", "put", "leaf", LEAVES, "of 'w'", where="mu"),
    *table("second moment: ", "put", "leaf", LEAVES, "of 'w'", where="nu"),
    # if a parameter is of another shape or kind, the error names what it is compared with
    *table("parameter: ", "put", "leaf", LEAVES, "'w'", where="params"),
    *table("gradients: ", "update", "grads", TREES, "the gradients", IN_STRUCTURE),
    *table("parameters: ", "update", "params", TREES, "the parameters", IN_STRUCTURE),
    *table("second moments: ", "update", "nu", TREES, "the second moments", IN_STRUCTURE),
    bad("gradients: None", "update", {"grads": None}, ValueError, "the gradients", IN_STRUCTURE, "None"),
    bad("parameter: a dict", "put", {"where": "params", "leaf": From(lambda w: {"inner": w.params["w"]})}, TypeError,
        "parameter 'w' is a dict", ARRAY_OR_NUMBER),
    bad("gradient for no parameter", "without_parameter", {"grads": {"a": jnp.ones(2)}}, ValueError,
        f"gradient of 'a' is an array, its parameter None; {BOTH}"),
    bad("gradient: complex", "put", {"where": "grads", "leaf": jnp.ones((2, 3), complex)}, TypeError,
        "gradient of 'w' has dtype complex64", REAL),
    bad("second moment: None", "put", {"where": "nu", "leaf": None}, ValueError,
        f"second moment of 'w' is None, its parameter an array; {BOTH}"),
    bad("parameter: None", "put", {"where": "params", "leaf": None}, ValueError,
        f"of 'w' is an array, its parameter None; {BOTH}"),
    *table("state: ", "update", "state", [
        ("None", None, TypeError),
        ("a number", 3, TypeError),
        ("a string", "abc", TypeError),
        ("an empty tuple", (), TypeError),
        ("three numbers", (1, 2, 3), TypeError),
        ("a dict", {"mu": 1}, TypeError),
        ("of the core", From(lambda w: State(0, w.params, w.params)), TypeError),
        ("of sgd", From(lambda w: optax.sgd(0.1).init(w.params)), TypeError),
        ("of adam", From(lambda w: optax.adam(0.1).init(w.params)), TypeError),
        ("of the other transformation", From(lambda w: (PART if w.whole else WHOLE).init(w.params)), TypeError),
    ], "the state is", ONE_THAT),
    bad("state: of other parameters", "update", {"state": From(lambda w: w.transform.init({"w": w.params["w"]}))},
        ValueError, "the gradients", IN_STRUCTURE),
    *table("count: ", "update", "count", [
        ("None", None, TypeError, f"is None; {INTEGER}"),
        ("a string", "1", TypeError, f"is '1'; {INTEGER}"),
        ("a float", 1.0, TypeError, f"is 1.0; {INTEGER}"),
        ("NaN", math.nan, TypeError, f"is nan; {INTEGER}"),
        ("a bool", True, TypeError, f"is True; {INTEGER}"),
        ("a list", [2], TypeError, f"is [2]; {INTEGER}"),
        ("complex", 2j, TypeError, f"is 2j; {INTEGER}"),
        ("a floating-point array", jnp.float32(2), TypeError, INTEGER_OR_ARRAY),
        ("a bool array", jnp.asarray(True), TypeError, INTEGER_OR_ARRAY),
        ("an array with an axis", jnp.zeros(3, int), TypeError, INTEGER_OR_ARRAY),
        ("negative", -1, ValueError, MINUS_ONE),
        ("a negative array of NumPy", np.int32(-1), ValueError, MINUS_ONE),
    ], COUNT),
    bad("count: a float, traced", "traced_count", {"count": jnp.float32(2)}, TypeError, COUNT, INTEGER),
    *table("init: ", "init", "params", [
        ("a string", "x", TypeError, "parameter is a str ('x')", ARRAY_OR_NUMBER),
        ("an object array", [np.ones(2, object)], TypeError, "parameter '0' is a ndarray", AN_ARRAY),
        ("a masked array", [np.ma.ones(2)], TypeError, "parameter '0' is a MaskedArray", AN_ARRAY),
        ("longdouble", [np.ones(2, np.longdouble)], TypeError, "parameter '0' is a ndarray", AN_ARRAY),
        ("a module of Python", math, TypeError, "parameter is a module", ARRAY_OR_NUMBER),
    ]),
]

WRONG_RATES = [line for line in WRONG_NUMBERS if line[0] != "an integer array"]  # which optax converts
SOME_WRONG = [
    line for line in WRONG_NUMBERS
    if line[0] in ("negative", "NaN", "infinite", "a string", "a bool", "a complex array")
]
OPTAX_OPTIONS: list[Bad] = [
    bad("parameters: None under decay", "update", {"params": None}, ValueError,
        "weight_decay is 0.1", "call update(grads, state, params)"),
    *table("learning_rate: ", "option", "learning_rate", WRONG_RATES, "learning_rate is"),
    *table("schedule: ", "schedule", "rate", WRONG_VALUES, "learning_rate(0) is"),
    *(row for name in ("b1", "b2", "eps", "eps_root", "weight_decay", "clip_exponent")
      for row in table(f"{name}: ", "option", name, SOME_WRONG, f"{name} is")),
    bad("learning_rate: an array of bool", "option", {"learning_rate": jnp.asarray(True)}, TypeError,
        "learning_rate is", NUMBER),
    bad("schedule: None", "schedule", {"rate": None}, TypeError, "learning_rate(0) is None", NUMBER),
    bad("schedule: raises", "option", {"learning_rate": boom}, KeyError, OWN_ERROR),
    bad("schedule: of another library", "schedule", {"rate": strict.asarray(0.1)}, TypeError,
        "learning_rate is an array of array_api_strict", "convert it"),
    bad("learning_rate: missing", "no_options", {}, TypeError, "learning_rate"),
    bad("an option that is none", "option", {"amsgrad": True}, TypeError, "unexpected keyword argument 'amsgrad'"),
    bad("asynchronous: 1", "option", {"asynchronous": 1}, TypeError, f"asynchronous is 1; {TRUE_OR_FALSE}"),
    bad("centering: unknown", "option", {"centering": "x"}, ValueError, f"centering is 'x'; {CENTERING}"),
    bad("moment_dtype: int", "option", {"moment_dtype": int}, ValueError, "moment_dtype is", SOME_KIND),
    *table("mask: ", "option", "mask", [
        ("a string", "all", TypeError, f"mask is 'all'; {DECAY}"),
        ("a string leaf", {"w": "no", "b": True}, TypeError, f"mask of 'w' is 'no'; {DECAY}"),
        ("a number", {"w": True, "b": 2}, TypeError, f"mask of 'b' is 2; {DECAY}"),
        ("a float", {"w": 0.0, "b": True}, TypeError, f"mask of 'w' is 0.0; {DECAY}"),
        ("an array with an axis", {"w": jnp.ones(3, bool), "b": True}, TypeError, "mask of 'w' is", DECAY),
        ("a callable's number", lambda params: -1, TypeError, f"mask is -1; {DECAY}"),
        ("None for a parameter", {"w": None, "b": True}, ValueError, MASK_STRUCTURE),
        ("a callable without return", lambda params: None, ValueError, MASK_STRUCTURE),
        ("a list", [True, False], ValueError, MASK_STRUCTURE),
        ("a missing leaf", {"w": True}, ValueError, MASK_STRUCTURE),
        ("a surplus leaf", {"w": True, "b": True, "c": True}, ValueError, MASK_STRUCTURE),
        ("too deep", {"w": [True], "b": True}, ValueError, MASK_STRUCTURE),
        ("a callable that raises", boom, KeyError, OWN_ERROR),
    ]),
]
