"""Bad input of acprop_stepper."""

import math
from typing import Any

import array_api_strict as strict
import jax.numpy as jnp
import ml_dtypes
import numpy as np

import acprop_stepper
from acprop_core import ACProp
from bad_input.rows import (
    A_STATE,
    AN_ARRAY,
    AN_INT,
    BOTH,
    CENTERING,
    COUNT,
    DECAY,
    INTEGER,
    INTEGER_OR_ARRAY,
    KINDS,
    MINUS_ONE,
    NUMBER,
    OWN_ERROR,
    OWN_OR_SAVED,
    RANGE,
    REAL,
    SOME_KIND,
    SOME_NUMBER,
    STRUCTURE,
    THE_STATE,
    TRUE_OR_FALSE,
    WRONG_VALUES,
    Bad,
    From,
    bad,
    boom,
    leaves,
    readonly,
    table,
)
from cases import prescribed
from hosts import Stepper as Host

GRADS = {"w": np.linspace(0.1, 0.6, 6).reshape(2, 3), "b": np.asarray([0.7, -0.8])}
PARAMS = {"w": np.linspace(-1.0, 1.0, 6).reshape(2, 3), "b": np.ones(2)}


class Stepper:
    """A stepper in the middle of a run: parameters "w" and "b", and a schedule that can be made bad."""

    def __init__(self, backend: str) -> None:
        self.bad_rate: Any = ...
        hyper = {"learning_rate": self.rate, "clip_exponent": 0.25}
        case = prescribed(hyper, {leaf: x[None] for leaf, x in GRADS.items()})
        self.host = Host(case, engine=backend.removeprefix("stepper_"))
        self.host.put(PARAMS)
        self.stepper, self.params = self.host.stepper, self.host.params
        self.own = dict(self.params)
        self.grads = {leaf: x.copy() for leaf, x in GRADS.items()}
        self.step()
        self.step()

    def rate(self, count: int) -> Any:
        if self.bad_rate is ...:
            return 0.1
        return self.bad_rate() if callable(self.bad_rate) else self.bad_rate

    def step(self) -> None:
        self.host.step(GRADS)

    def bits(self) -> Any:
        state = self.stepper.state
        return state.count, leaves((self.own, self.grads, state.mu, state.nu))

    def mend(self) -> None:
        self.bad_rate = ...
        self.params.clear()
        self.params.update(self.own)
        for x in self.own.values():
            x.flags.writeable = True

    def new(self, params: Any = None, **options: Any) -> None:
        params = {"w": np.ones(2), "b": np.ones(3)} if params is None else params
        acprop_stepper.Stepper(params, **options)

    def new_in_one_memory(self, name: str) -> None:
        self.new(in_one_memory(name))

    def gradients(self, grads: Any) -> None:
        self.stepper.step(grads)

    def gradient(self, b: Any) -> None:
        self.stepper.step({**self.grads, "b": b})

    def schedule(self, rate: Any) -> None:
        """Take a step with a schedule that returns this, or what calling it returns."""
        self.bad_rate = rate
        self.step()

    def schedule_that_steps(self) -> None:
        self.schedule(lambda: self.stepper.step(self.grads))

    def schedule_that_loads(self) -> None:
        self.schedule(lambda: self.stepper.load_state(self.stepper.state))

    def remove(self, name: str) -> None:
        del self.params[name]
        self.step_in_place()

    def exchange(self, **params: Any) -> None:
        self.params.update(params)
        self.step_in_place()

    def make_readonly(self, name: str) -> None:
        readonly(self.params[name])
        self.step_in_place()

    def step_in_place(self) -> None:
        self.stepper.step(self.grads)

    def load_state(self, state: Any) -> None:
        self.stepper.load_state(state)

    def load(self, **replace: Any) -> None:
        self.stepper.load_state(self.stepper.state._replace(**replace))

    def load_leaf(self, field: str, leaf: Any) -> None:
        """Load a state whose moment of "w" is this leaf."""
        self.load(**{field: {**getattr(self.stepper.state, field), "w": leaf}})

    def export(self) -> Any:
        return acprop_stepper.export_state(self.stepper)

    def export_of(self, stepper: Any) -> None:
        acprop_stepper.export_state(stepper)

    def import_into(self, stepper: Any) -> None:
        acprop_stepper.import_state(stepper, *self.export())

    def import_swapped(self) -> None:
        acprop_stepper.import_state(self.stepper, *reversed(self.export()))

    def import_state(self, change: Any = None, saved: Any = None, prefer: str | None = "own") -> None:
        """Import the own state with these changes, or under other hyperparameters."""
        own, state = self.export()
        acprop_stepper.import_state(self.stepper, saved or own, state._replace(**(change or {})), prefer=prefer)

    def import_leaf(self, field: str, **replace: Any) -> None:
        """Import a state with these arrays in a moment."""
        self.import_state({field: {**getattr(self.export()[1], field), **replace}})


def in_one_memory(name: str) -> Any:
    x, c = np.ones(8), np.ones(3, complex)
    trees: dict[str, Any] = {
        "two views": {"a": x[:5], "b": x[4:]},
        "one array twice": {"a": x, "b": x},
        "an array and its transpose": {"a": x.reshape(2, 4), "b": x.reshape(2, 4).T},
        "a complex array and its real part": {"a": c, "b": c.real},
        "an array and its reverse": {"a": x, "b": x[::-1]},
    }
    return trees[name]


WITHIN = "step or load_state was called from within one of them"
ENGINES = "for NumPy arrays use 'tiles' or 'numba'"
GUARDS = "use 'allow', 'skip' or 'raise'"
ABOVE_0 = "use a number above 0, or None"
AT_LEAST_0 = "use a number that is at least 0"
THREADS = "use a whole number of at least 1"
A_STEPPER = "pass an acprop_stepper.Stepper"
NUMBERS_ONLY = "a stepper takes numbers: convert it with float()"
NOT_MADE_FOR = "parameter 'w' is not the array that the stepper was made for"

# A row a line
# fmt: off
GRADIENTS = [
    ("None", None, ValueError, "is one value (NoneType)", STRUCTURE),
    ("a list", From(lambda w: list(w.grads.values())), ValueError, "lacks 'w', 'b'", STRUCTURE),
    ("a tuple", From(lambda w: tuple(w.grads.values())), ValueError, "lacks 'w', 'b'", STRUCTURE),
    ("a bare array", From(lambda w: w.grads["w"]), ValueError, "is one value (ndarray)", STRUCTURE),
    ("a string", "grads", ValueError, "is one value (str)", STRUCTURE),
    ("a generator", From(lambda w: (x for x in w.grads.values())), ValueError, "is one value (generator)", STRUCTURE),
    ("other keys", {0: 1.0, 1: 1.0}, ValueError, "lacks 'w', 'b'", STRUCTURE),
    ("a missing leaf", From(lambda w: {"w": w.grads["w"]}), ValueError, "lacks 'b'", STRUCTURE),
    ("a surplus leaf", From(lambda w: {**w.grads, "c": np.ones(1)}), ValueError, "has 'c'", "leave that out"),
]
GRADIENT = [
    ("a number", 1.0, TypeError, "is a float (1.0), not an array", "asarray"),
    ("a string", "x", TypeError, "is a str ('x'), not an array", "asarray"),
    ("a list", [1.0, 1.0], TypeError, "is a list ([1.0, 1.0]), not an array", "asarray"),
    ("a memoryview", memoryview(b"12"), TypeError, "is a memoryview", "not an array", "asarray"),
    ("longer", np.ones(3), ValueError, "has shape (3,), its parameter (2,); make them equal"),
    ("to be broadcast", np.ones(1), ValueError, "has shape (1,), its parameter (2,)"),
    ("with an axis more", np.ones((2, 1)), ValueError, "has shape (2, 1), its parameter (2,)"),
    ("0-d", np.float64(1.0), ValueError, "has shape (), its parameter (2,); make them equal"),
    ("float32", np.ones(2, "f4"), TypeError, "has dtype float32, its parameter float64; convert"),
    ("of another byte order", np.ones(2, ">f8"), TypeError, "has dtype >f8, its parameter float64"),
    ("int", np.ones(2, int), TypeError, "has dtype int64", KINDS),
    ("bool", np.ones(2, bool), TypeError, "has dtype bool", KINDS),
    ("complex", np.ones(2, complex), TypeError, "has dtype complex128", REAL),
    ("objects", np.ones(2, object), TypeError, "has dtype object", KINDS),
    ("strings", np.full(2, "1"), TypeError, "has dtype str32", KINDS),
    ("a masked array", np.ma.ones(2), TypeError, "is a MaskedArray", "np.asarray"),
    ("NumPy's masked", np.ma.masked, TypeError, "is a MaskedConstant", "np.asarray"),
    ("a matrix", From(lambda w: np.ones((1, 2)).view(np.matrix)), TypeError, "is a matrix", "np.asarray"),
    ("of array_api_strict", strict.ones(2), TypeError, "array_api_strict", "convert one of them"),
    ("of JAX", jnp.ones(2), TypeError, "is an array of jax.numpy", "convert one of them"),
]
SHARED = [
    ("the parameter", From(lambda w: w.params["b"]), ValueError),
    ("a view of it", From(lambda w: w.params["b"][:]), ValueError),
    ("its reverse", From(lambda w: w.params["b"][::-1]), ValueError),
    ("a part of another", From(lambda w: w.params["w"][0, :2]), ValueError),
    ("every second of another", From(lambda w: w.params["w"].reshape(-1)[::3]), ValueError),
]
MOMENTS = [
    ("None", None, ValueError, f"is None, its parameter an array; {BOTH}"),
    ("a number", 1.0, TypeError, "is a float (1.0), not an array"),
    ("transposed", np.ones((3, 2)), ValueError, "has shape (3, 2), its parameter (2, 3)"),
    ("float32", np.ones((2, 3), "f4"), TypeError,
     "has dtype float32, this stepper keeps float64; convert it, or set moment_dtype"),
    ("of another byte order", np.ones((2, 3), ">f8"), TypeError, "has dtype >f8, this stepper keeps float64"),
    ("int", np.ones((2, 3), int), TypeError, "has dtype int64", KINDS),
    ("objects", np.ones((2, 3), object), TypeError, "has dtype object", KINDS),
    ("complex", np.ones((2, 3), complex), TypeError, "has dtype complex128", REAL),
    ("a masked array", np.ma.ones((2, 3)), TypeError, "is a MaskedArray", "np.asarray"),
    ("of JAX", jnp.ones((2, 3)), TypeError, "of jax.numpy", "convert one of them"),
]


STEPPER: list[Bad] = [
    *table("gradients: ", "gradients", "grads", GRADIENTS, "the container of gradients"),
    *table("gradient: ", "gradient", "b", GRADIENT, "gradient of 'b'"),
    *table("gradient in the memory of parameters: ", "gradient", "b", SHARED, "gradient of 'b'",
           "share memory, so that writing one would change the other; copy one"),
    bad("gradients: the parameters themselves", "gradients", {"grads": From(lambda w: w.params)}, ValueError,
        "share memory", "copy one"),
    *table("schedule: ", "schedule", "rate", [line for line in WRONG_VALUES if not hasattr(line[1], "aval")],
           "learning_rate(2) is"),
    bad("schedule: None", "schedule", {"rate": None}, TypeError, "learning_rate(2) is None", NUMBER),
    bad("schedule: raises", "schedule", {"rate": boom}, KeyError, OWN_ERROR),
    bad("schedule: of JAX", "schedule", {"rate": jnp.float32(0.1)}, TypeError,
        "learning_rate is an array of jax.numpy", "convert it"),
    bad("schedule: steps the stepper", "schedule_that_steps", {}, RuntimeError, WITHIN, "call it later"),
    bad("schedule: loads a state", "schedule_that_loads", {}, RuntimeError, WITHIN),
    bad("a parameter taken away", "remove", {"name": "w"}, ValueError, "params lacks 'w'"),
    bad("a parameter added", "exchange", {"c": np.ones(1)}, ValueError, "params has 'c'", "leave that out"),
    bad("a parameter exchanged", "exchange", {"w": From(lambda w: w.params["w"].copy())}, ValueError,
        f"{NOT_MADE_FOR}; write into that array, or make another"),
    bad("a parameter made None", "exchange", {"w": None}, ValueError, NOT_MADE_FOR),
    bad("a parameter made read-only", "make_readonly", {"name": "w"}, ValueError,
        "parameter 'w' is read-only; a stepper writes into its parameters: copy it"),
    bad("load_state: None", "load_state", {"state": None}, TypeError, f"the state is a NoneType; {A_STATE}"),
    bad("load_state: a tuple", "load_state", {"state": From(lambda w: tuple(w.stepper.state))}, TypeError,
        f"the state is a tuple; {A_STATE}"),
    *table("load_state: count ", "load", "count", [
        ("negative", -1, ValueError, MINUS_ONE),
        ("a float", 1.5, TypeError, f"is 1.5; {INTEGER}"),
        ("NaN", math.nan, TypeError, f"is nan; {INTEGER}"),
        ("a bool", True, TypeError, f"is True; {INTEGER}"),
        ("a string", "3", TypeError, f"is '3'; {INTEGER}"),
        ("None", None, TypeError, f"is None; {INTEGER}"),
        ("an array with an axis", np.asarray([3]), TypeError, INTEGER_OR_ARRAY),
        ("of JAX", jnp.int32(3), TypeError, AN_INT),
    ], COUNT),
    bad("load_state: moments None", "load", {"mu": None}, ValueError,
        "the container of first moments is one value (NoneType)", STRUCTURE),
    bad("load_state: a missing moment", "load", {"nu": {}}, ValueError,
        "the container of second moments lacks 'w', 'b'", STRUCTURE),
    bad("load_state: a surplus moment", "load", {"mu": From(lambda w: {**w.grads, "c": np.ones(1)})}, ValueError,
        "the container of first moments has 'c'", "leave that out"),
    *table("load_state: first moment ", "load_leaf", "leaf", MOMENTS, "first moment of 'w'", field="mu"),
    *table("load_state: second moment ", "load_leaf", "leaf", MOMENTS, "second moment of 'w'", field="nu"),
]

OPTIONS = [
    ("engine", "fast", ValueError, f"{ENGINES}, or None for the best"),
    ("engine", "cupy", ValueError, ENGINES),
    ("engine", 1, ValueError, ENGINES),
    ("engine", ["numba"], ValueError, ENGINES),
    ("nonfinite", "ignore", ValueError, GUARDS),
    ("nonfinite", None, ValueError, GUARDS),
    ("nonfinite", True, ValueError, GUARDS),
    ("clip_norm", 0.0, ValueError, ABOVE_0),
    ("clip_norm", -1.0, ValueError, AT_LEAST_0),
    ("clip_norm", math.nan, ValueError, AT_LEAST_0),
    ("clip_norm", math.inf, ValueError, f"{AT_LEAST_0} and finite"),
    ("clip_norm", "1", TypeError, SOME_NUMBER),
    ("clip_norm", True, TypeError, SOME_NUMBER),
    ("clip_norm", jnp.float32(1.0), ValueError, ABOVE_0),
    ("threads", 0, ValueError, THREADS),
    ("threads", -1, ValueError, THREADS),
    ("threads", 1.5, ValueError, THREADS),
    ("threads", "2", ValueError, THREADS),
    ("threads", True, ValueError, THREADS),
    ("learning_rate", -1.0, ValueError, RANGE),
    ("learning_rate", strict.asarray(0.1), TypeError, NUMBERS_ONLY),
    ("b1", 1.0, ValueError, "below 1"),
    ("b2", jnp.float32(0.9), TypeError, NUMBERS_ONLY),
    ("centering", "next", ValueError, CENTERING),
    ("asynchronous", 0, TypeError, TRUE_OR_FALSE),
    ("moment_dtype", "int8", ValueError, SOME_KIND),
]
WINDOWS = np.lib.stride_tricks.sliding_window_view
PARAMETERS = [
    ("a string", "x", TypeError, "parameter is a str ('x'), not an array"),
    ("a number", 1.0, TypeError, "parameter is a float (1.0), not an array"),
    ("a list of numbers", [1.0], TypeError, "parameter '0' is a float (1.0), not an array"),
    ("a set", {"a": {1.0}}, TypeError, "parameter 'a' is a set ({1.0}), not an array"),
    ("a generator", From(lambda w: (x for x in ())), TypeError, "parameter is a generator", "not an array"),
    ("int", {"a": np.ones(2, int)}, TypeError, "parameter 'a' has dtype int64", KINDS),
    ("bool", {"a": np.ones(2, bool)}, TypeError, "parameter 'a' has dtype bool", KINDS),
    ("objects", {"a": np.ones(2, object)}, TypeError, "parameter 'a' has dtype object", KINDS),
    ("longdouble", {"a": np.ones(2, np.longdouble)}, TypeError, "parameter 'a' has dtype float", KINDS),
    ("records", {"a": np.ones(2, "f4,f4")}, TypeError, "parameter 'a' has dtype void64", KINDS),
    ("an 8-bit float", [np.ones(2, ml_dtypes.float8_e4m3fn)], TypeError, "parameter '0' has dtype float8_e4m3fn"),
    ("a masked array", {"a": np.ma.ones(2)}, TypeError, "parameter 'a' is a MaskedArray", "np.asarray"),
    ("a matrix", From(lambda w: [np.ones((1, 2)).view(np.matrix)]), TypeError,
     "parameter '0' is a matrix", "np.asarray"),
    ("of array_api_strict", {"a": strict.ones(3)}, TypeError,
     "the parameters are arrays of array_api_strict", "a Stepper takes NumPy or CuPy arrays"),
    ("of JAX", jnp.ones(2), TypeError, "the parameters are arrays of jax.numpy", "acprop_optax"),
    ("of two libraries", [np.ones(2), jnp.ones(2)], TypeError,
     "parameter '1' is an array of jax.numpy, parameter '0' is an array of numpy; convert one"),
    ("read-only", {"a": readonly(np.ones(2))}, ValueError, "parameter 'a' is read-only", "copy it"),
    ("a bare read-only array", readonly(np.ones(2)), ValueError, "parameter is read-only", "copy it"),
    ("a scalar", {"a": np.float64(1.0)}, ValueError, "parameter 'a' is a float64", "pass np.array of it"),
    ("a bare scalar", np.float32(1.0), ValueError, "parameter is a float32", "pass np.array of it"),
    ("broadcast", {"a": np.broadcast_to(np.ones(2), (3, 2))}, ValueError, "parameter 'a' is read-only"),
    ("of another byte order", {"a": np.ones(2, ">f8")}, ValueError,
     "parameter 'a' has dtype >f8, not in native byte order; convert it"),
    ("overlapping itself with a stride of 0", {"a": np.lib.stride_tricks.as_strided(np.ones(6), (3, 2), (0, 8))},
     ValueError, "several elements of parameter 'a' are in the same memory", "copy it"),
    ("overlapping itself as a window", [WINDOWS(np.ones(6), 3, writeable=True)], ValueError,
     "several elements of parameter '0'", "copy it"),
]
MASKS = [
    ("a string", "all", TypeError, f"mask of 'w' is 'all'; {DECAY}"),
    ("a number", {"w": 2, "b": True}, TypeError, f"mask of 'w' is 2; {DECAY}"),
    ("a missing leaf", {"w": True}, ValueError, "the mask lacks 'b'", STRUCTURE),
    ("a surplus leaf", {"w": True, "b": True, "c": True}, ValueError, "the mask has 'c'", "leave that out"),
    ("a callable without return", lambda params: None, TypeError, f"mask of 'w' is None; {DECAY}"),
    ("a callable that raises", boom, KeyError, OWN_ERROR),
]
STEPPER_OPTIONS: list[Bad] = [
    *(bad(f"{name}: {x!r}", "new", {name: x}, error, f"{name} is {x!r}", words) for name, x, error, words in OPTIONS),
    bad("moment_dtype: one that NumPy lacks", "new", {"moment_dtype": "bfloat16"}, TypeError,
        "moment_dtype is 'bfloat16', in which numpy cannot keep", "use a wider one"),
    bad("an option that is none", "new", {"amsgrad": True}, TypeError, "unexpected keyword argument 'amsgrad'"),
    *table("mask: ", "new", "mask", MASKS, weight_decay=0.1),
    *table("parameters: ", "new", "params", PARAMETERS),
    *table("parameters in one memory: ", "new_in_one_memory", "name", [
        (name, name, ValueError, "parameter 'a'", "parameter 'b'", "share memory", "copy one")
        for name in ("two views", "one array twice", "an array and its transpose",
                     "a complex array and its real part", "an array and its reverse")
    ]),
    bad("export_state: None", "export_of", {"stepper": None}, TypeError, f"the stepper is a NoneType; {A_STEPPER}"),
    bad("import_state: into no stepper", "import_into", {"stepper": {}}, TypeError,
        f"the stepper is a dict; {A_STEPPER}"),
    bad("import_state: swapped", "import_swapped", {}, TypeError,
        "import_state got a State and a ACProp; pass the acprop_core.ACProp and the State"),
    bad("import_state: prefer", "import_state", {"prefer": "theirs"}, ValueError,
        f"prefer is 'theirs'; {OWN_OR_SAVED}"),
    bad("import_state: other hyperparameters", "import_state", {"saved": ACProp(0.7), "prefer": None}, ValueError,
        "hyperparameters differ: learning_rate is", "prefer='own' or prefer='saved'"),
    bad("import_state: a mask of other names", "import_state",
        {"saved": ACProp(0.7, weight_decay=0.1, mask={"w": True}), "prefer": "saved"}, ValueError,
        "the mask lacks 'b'"),
    bad("import_state: a mask of strings", "import_state",
        {"saved": ACProp(0.7, weight_decay=0.1, mask={"w": "no", "b": True}), "prefer": "saved"}, TypeError,
        f"mask of 'w' is 'no'; {DECAY}"),
    *table("import_state: ", "import_state", "change", [
        ("a negative count", {"count": -1}, ValueError, COUNT, "is -1"),
        ("a count that is an array", {"count": jnp.int32(1)}, TypeError, COUNT, AN_INT),
        ("moments None", {"mu": None}, TypeError, "the saved moments are not dicts by name", THE_STATE),
        ("a missing name", From(lambda w: {"mu": {"w": w.grads["w"]}, "nu": {"w": w.grads["w"]}}), ValueError,
         "the saved state lacks 'b'; it has 'w'; use load(path, rename=...)"),
    ]),
    *table("import_state: ", "import_leaf", "w", [
        ("a string", "x", TypeError, f"first moment of 'w' is a str ('x'); {AN_ARRAY}"),
        ("one moment None", None, ValueError, "one moment of 'w' is None", BOTH),
        ("a shape", np.ones(3), ValueError, "first moment of 'w' has shape (3,), here it is (2, 3); use load("),
    ], field="mu"),
    *table("import_state: ", "import_leaf", "w", [
        ("a list", [1.0], TypeError, f"second moment of 'w' is a list ([1.0]); {AN_ARRAY}"),
        ("a dtype", np.ones((2, 3), "f4"), TypeError,
         "second moment of 'w' has dtype float32, here it is float64", "transform="),
    ], field="nu"),
    bad("import_state: a surplus name", "import_leaf", {"field": "mu", "c": np.ones((2, 3))}, ValueError,
        "the saved state has 'c'", "use load(path, rename=...)"),
]
