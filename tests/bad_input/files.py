"""Bad input of `save` and `load`. Damaged files are in test_checkpoint.py."""

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import acprop_core
from acprop_core import ACProp, State
from bad_input.rows import (
    A_STATE,
    CORE_ACPROP,
    COUNT,
    DECAY,
    INTEGER,
    KINDS,
    MAPPING_OR_CALLABLE,
    MINUS_ONE,
    NAME_OR_NONE,
    NUMBER,
    OWN_ERROR,
    RANGE,
    Bad,
    From,
    bad,
    boom,
    table,
)
from bad_input.stepper import Stepper


class Files(Stepper):
    """A stepper in the middle of a run, and a folder for a file of it."""

    folder: Path  # set by the test
    file: bytes | None = None

    def good(self) -> tuple[Path, ACProp, State]:
        """Write a good file, and return its path, hyperparameters and state."""
        saved, state = self.export()
        path = self.folder / "run.safetensors"
        if self.file is None:
            acprop_core.save(path, saved, state)
            self.file = path.read_bytes()
        return path, saved, state

    def save(self, path: Any = ..., saved: Any = ..., state: Any = ...) -> None:
        given = zip((path, saved, state), self.good(), strict=True)
        acprop_core.save(*(own if x is ... else x for x, own in given))

    def save_swapped(self) -> None:
        path, saved, state = self.good()
        acprop_core.save(path, state, saved)  # type: ignore[arg-type]

    def save_leaf(self, leaf: Any) -> None:
        """Save a state of one array."""
        self.save(state=one(leaf))

    def save_moments(self, moments: Any) -> None:
        """Save a state whose moments are this container."""
        self.save(state=State(0, moments, moments))

    def save_replaced(self, **replace: Any) -> None:
        """Save the own state with another part."""
        self.save(state=self.export()[1]._replace(**replace))

    def save_traced(self) -> None:
        jax.jit(save_traced)(jnp.ones(2))

    def load_from(self, path: Any) -> None:
        acprop_core.load(path)

    def load_file(self, **options: Any) -> None:
        acprop_core.load(self.good()[0], **options)


def one(leaf: Any) -> State:
    return State(0, {"a": leaf}, {"a": leaf})


def save_traced(x: Any) -> Any:
    acprop_core.save("unused", ACProp(), one(x))
    return x


NOT_A_PATH = "expected str, bytes or os.PathLike object, not"
NO_PARAMETER = "but there is no parameter here"
UNKNOWN = "'q', which the saved state lacks; it has 'w', 'b'"
FIRST = "first moment of 'a'"

# A row a line
# fmt: off
OPTIONS = [
    ("rename a list", {"rename": ["w"]}, TypeError, f"rename is ['w']; {MAPPING_OR_CALLABLE}"),
    ("rename of an unknown name", {"rename": {"q": "z"}}, ValueError, f"rename names {UNKNOWN}"),
    ("rename to a number", {"rename": {"w": 1}}, TypeError, f"rename makes 1 of 'w'; {NAME_OR_NONE}"),
    ("rename to a name that is there", {"rename": {"w": "b"}}, ValueError, "two arrays are called 'b'"),
    ("rename that raises", {"rename": boom}, KeyError, OWN_ERROR),
    ("transform a string", {"transform": "T"}, TypeError, f"transform is 'T'; {MAPPING_OR_CALLABLE}"),
    ("transform of an unknown name", {"transform": {"q": abs}}, ValueError, f"transform names {UNKNOWN}"),
    ("transform by what cannot be called", {"transform": {"w": 3}}, TypeError,
     "transform of 'w' is 3; pass a function from array to array"),
    ("transform without return", {"transform": {"w": lambda x: None}}, TypeError,
     "first moment of 'w' has dtype object", KINDS),
    ("transform to strings", {"transform": {"w": lambda x: "x"}}, TypeError,
     "first moment of 'w' has dtype str", KINDS),
    ("parameters of a shape", {"params": {"w": np.ones((3, 2)), "b": np.ones(2)}}, ValueError,
     "first moment of 'w' has shape (2, 3), here it is (3, 2); use load(path, transform=...)"),
    ("parameters of a dtype", {"params": {"w": np.ones((2, 3), "f4"), "b": np.ones(2)}}, TypeError,
     "first moment of 'w' has dtype float64, here it is float32"),
    ("parameters that lack one", {"params": {"w": np.ones((2, 3))}}, ValueError,
     "the saved state has 'b', but there is no such parameter here; use load(path, rename=...)"),
    ("parameters with one more", {"params": {"w": np.ones((2, 3)), "b": np.ones(2), "c": np.ones(1)}}, ValueError,
     "the saved state lacks 'c'; it has 'w', 'b'; use load(path, rename=...)"),
    ("parameters with a None", {"params": {"w": np.ones((2, 3)), "b": None}}, ValueError,
     f"first moment of 'b' is an array, {NO_PARAMETER}; leave it out"),
    ("parameters a string", {"params": "x"}, TypeError, "is a str ('x'), not an array"),
]
FILES: list[Bad] = [
    *table("save: path ", "save", "path", [
        ("None", None, TypeError, f"{NOT_A_PATH} NoneType"),
        ("a number", 3, TypeError, f"{NOT_A_PATH} int"),
        ("with a zero byte", "a\0b", ValueError, "embedded null"),
        ("a folder", From(lambda w: w.folder), IsADirectoryError, "input' is a directory, which save does not replace",
         "pass the path of a regular file"),
        ("in no folder", From(lambda w: w.folder / "no" / "x"), FileNotFoundError, "No such file", "/no/"),
    ]),
    bad("save: swapped", "save_swapped", {}, TypeError, f"the optimizer is a State; {CORE_ACPROP}"),
    bad("save: the stepper as the optimizer", "save", {"saved": From(lambda w: w.stepper)}, TypeError,
        f"the optimizer is a Stepper; {CORE_ACPROP}"),
    bad("save: the stepper as the state", "save", {"state": From(lambda w: w.stepper)}, TypeError,
        f"the state is a Stepper; {A_STATE}, or the one that export_state returned"),
    bad("save: second moments None", "save_replaced", {"nu": None}, ValueError,
        "the container of second moments is one value (NoneType)"),
    bad("save: a missing moment", "save_replaced", {"nu": From(lambda w: {"w": w.grads["w"]})}, ValueError,
        "the container of second moments lacks 'b'"),
    *table("save: ", "save_replaced", "count", [
        ("a negative count", -1, ValueError, MINUS_ONE),
        ("a count beyond the file", 2**63, ValueError, "which no int64 can hold; pass a count below 2**63"),
        ("a count of 1.5", 1.5, TypeError, INTEGER),
    ], COUNT),
    *table("save: ", "save_leaf", "leaf", [
        ("objects", np.ones(2, object), TypeError, f"{FIRST} has dtype object", KINDS),
        ("strings", "x", TypeError, f"{FIRST} has dtype str", KINDS),
        ("longdouble", np.ones(2, np.longdouble), TypeError, f"{FIRST} has dtype float"),
        ("a masked array", np.ma.masked_array(np.ones(2), True), TypeError, f"{FIRST} is a MaskedArray", "np.asarray"),
    ]),
    *table("save: ", "save_moments", "moments", [
        ("one name twice", {"a.b": np.ones(1), "a": {"b": np.ones(1)}}, ValueError,
         "two arrays are called 'a.b'", "rename a key"),
        ("1 and '1'", {1: np.ones(1), "1": np.ones(1)}, ValueError, "two arrays are called '1'", "rename a key"),
        ("a name that cannot be written", {"a\ud800": np.ones(1)}, UnicodeEncodeError, "surrogates not allowed"),
    ]),
    bad("save: a traced array", "save_traced", {}, TypeError, f"{FIRST} cannot be made a NumPy array"),
    bad("save: a mask of other names", "save", {"saved": ACProp(mask={"z": True})}, ValueError,
        "the mask lacks 'w', 'b'"),
    bad("save: a mask of strings", "save", {"saved": ACProp(mask={"w": "no", "b": True})}, TypeError,
        f"mask of 'w' is 'no'; {DECAY}"),
    *table("load: ", "load_from", "path", [
        ("path None", None, TypeError, f"{NOT_A_PATH} NoneType"),
        ("no file", From(lambda w: w.folder / "no"), FileNotFoundError, "No such file", "/no"),
        ("a folder", From(lambda w: w.folder), IsADirectoryError, "Is a directory"),
    ]),
    *table("load: learning_rate ", "load_file", "learning_rate", [
        ("NaN", math.nan, ValueError, "learning_rate is nan", RANGE),
        ("a string", "0.1", TypeError, "learning_rate is '0.1'", NUMBER),
    ]),
    bad("load: a schedule not given again", "load_file", {}, ValueError,
        "learning_rate was a callable", "pass it again: load(path, learning_rate=...)"),
    *(bad(f"load: {name}", "load_file", {"learning_rate": 0.1, **options}, error, *words)
      for name, options, error, *words in OPTIONS),
]
