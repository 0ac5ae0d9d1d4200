"""What a row of bad input is, and the phrases with which errors end."""

import math
from collections.abc import Callable, Iterable
from decimal import Decimal
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

HYPER = {"learning_rate": 0.1, "weight_decay": 0.1, "clip_exponent": 0.25}

# The remedies
ONE_KIND = "one of float16, bfloat16, float32, float64"
KINDS = f"use {ONE_KIND}"
SOME_KIND = "use one of float16"
REAL = "use a real one"
BOTH = "pass both or neither"
STRUCTURE = "use the structure of the parameters"
DECAY = "use True (decay) or False"
NUMBER = "use a number, or a 0-d floating-point array"
SOME_NUMBER = "use a number"
NUMBER_OR_NONE = "use a number or None"
RANGE = "use a number that is at least 0 and "
FINITE = "use a finite number"
INTEGER = "pass an integer"
INTEGER_OR_ARRAY = "pass an integer or a 0-d integer array"
AN_INT = "pass an int"
CENTERING = "use 'current', 'previous' or 'none'"
OWN_OR_SAVED = "use 'own' or 'saved'"
TRUE_OR_FALSE = "use True or False"
AN_ARRAY = "pass an array"
ARRAY_OR_NUMBER = "pass an array or a number"
THE_STATE = "pass the State"
A_STATE = "pass a State"
CORE_ACPROP = "pass an acprop_core.ACProp"
NAME_OR_NONE = "return a name, or None to leave it out"
MAPPING_OR_CALLABLE = "pass a mapping by name, or a callable"

COUNT = "the step count (state.count)"
MINUS_ONE = "is -1, which is negative; pass an integer that is at least 0"
OWN_ERROR = "the caller's own"


class From(NamedTuple):
    """A value that is made when the row is tried, because it depends on the world or is used up."""

    make: Callable[[Any], Any]


class Bad(NamedTuple):
    """One bad input: a method of the world, what is passed to it, and the error by its exact type and words."""

    name: str
    action: str
    arguments: dict[str, Any]
    error: type[BaseException]
    words: tuple[str, ...]

    def act(self, world: Any) -> None:
        arguments = {name: x.make(world) if isinstance(x, From) else x for name, x in self.arguments.items()}
        getattr(world, self.action)(**arguments)


def bad(name: str, action: str, arguments: dict[str, Any], error: type[BaseException], *words: str) -> Bad:
    return Bad(name, action, arguments, error, words)


def table(
    prefix: str, action: str, argument: str, lines: Iterable[tuple[Any, ...]], /, *common: str, **fixed: Any
) -> list[Bad]:
    """Return a row for each line (name, value, error, *words): the value is passed as `argument`.

    `common` are words of every error, `fixed` are further arguments of every call.
    """
    return [
        Bad(f"{prefix}{name}", action, {**fixed, argument: value}, error, (*common, *words))
        for name, value, error, *words in lines
    ]


def boom(*_: Any) -> Any:
    raise KeyError(OWN_ERROR)


def bits(x: Any) -> Any:
    """Return all that an array is, and other things as their repr."""
    if type(x).__module__.partition(".")[0] == "torch" and hasattr(x, "detach"):
        x = x.detach().numpy()
    if not hasattr(x, "dtype"):
        return repr(x)
    x = np.asarray(x)
    return str(x.dtype), x.shape, x.tobytes()


def leaves(tree: Any) -> list[Any]:
    return [bits(x) for x in jax.tree.leaves(tree)]


def readonly(x: Any) -> Any:
    x.flags.writeable = False
    return x


# What is wrong for every number
# fmt: off
WRONG_NUMBERS: list[tuple[str, Any, type[BaseException], str]] = [
    ("negative", -0.5, ValueError, RANGE),
    ("NaN", math.nan, ValueError, RANGE),
    ("infinite", math.inf, ValueError, RANGE),
    ("minus infinite", -math.inf, ValueError, RANGE),
    ("beyond floats", 10**400, ValueError, RANGE),
    ("a negative scalar", np.float32(-1.0), ValueError, RANGE),
    ("a 0-d array of NaN", np.asarray(math.nan), ValueError, RANGE),
    ("a string", "0.1", TypeError, NUMBER),
    ("a bool", True, TypeError, NUMBER),
    ("a list", [0.1], TypeError, NUMBER),
    ("a dict", {}, TypeError, NUMBER),
    ("complex", 1j, TypeError, NUMBER),
    ("a decimal", Decimal("0.1"), TypeError, NUMBER),
    ("an array with an axis", np.asarray([0.1]), TypeError, NUMBER),
    ("a bool array", jnp.asarray(True), TypeError, NUMBER),
    ("a complex array", jnp.asarray(0.1j), TypeError, NUMBER),
]
# A schedule may return negative numbers
WRONG_VALUES = [
    (name, value, error, FINITE if words == RANGE else words)
    for name, value, error, words in WRONG_NUMBERS
    if "negative" not in name
]
