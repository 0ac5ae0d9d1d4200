"""For authors of adapters: rows of leaves, their checks, and the step with its casts.

An adapter walks its framework's containers, makes a `Row` of the leaves of each parameter, checks it with `check_row`,
and calls the `Step` that `step_at` returns. docs/howto-backend.md shows one.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from acprop_core._checks import (
    called,
    check_arithmetic,
    check_carry,
    check_compensation,
    check_count,
    check_leaf,
    check_library,
    check_mask,
    check_number,
    common_namespace,
)
from acprop_core._containers import align, flatten, names_and_leaves, unflatten
from acprop_core._dtypes import Step, as_dtype, dtype_name, is_compensated, moment_dtypes
from acprop_core._quirks import Array, library
from acprop_core.rule import Hyperparameters, flags_of, numbers_of

__all__ = [
    "Array",
    "Row",
    "Step",
    "align",
    "as_dtype",
    "called",
    "check_arithmetic",
    "check_carry",
    "check_compensation",
    "check_count",
    "check_leaf",
    "check_library",
    "check_mask",
    "check_number",
    "check_row",
    "common_namespace",
    "decays_of",
    "dtype_name",
    "flatten",
    "is_compensated",
    "leaves_of",
    "library",
    "moment_dtypes",
    "names_and_leaves",
    "step_at",
    "unflatten",
]


class Row(NamedTuple):
    """One parameter with all arrays that its step needs; None where there is no array.

    Attributes
    ----------
    param, grad, mu, nu, carry : array or None
        Parameter, gradient, first moment, second moment and carry, of one shape.
    """

    param: Any
    grad: Any
    mu: Any
    nu: Any
    carry: Any = None


_WHAT = Row("parameter", "gradient", "first moment", "second moment", "carry")


def leaves_of(names: Sequence[str], rows: Sequence[Row]) -> Iterator[tuple[str, str, Any]]:
    """Yield each leaf of the rows as an argument of `common_namespace`: (what, name, array)."""
    for i, what in enumerate(_WHAT):
        for name, row in zip(names, rows, strict=True):
            yield what, name, row[i]


def check_row(name: str, row: Row, compensate: bool = False, owner: str = "parameter") -> None:
    """Refuse leaves that are not floating-point arrays, or do not match their owner.

    Parameters
    ----------
    name : str
        Dotted name of the parameter, for the error.
    row : Row
        A gradient of None is accepted everywhere.
    compensate : bool
        Whether a 16-bit parameter must have a carry.
    owner : {"parameter", "first moment"}
        The leaf with which the others are compared. With "first moment" the parameter is not read.

    Raises
    ------
    TypeError
        If a dtype, layout or device does not match.
    ValueError
        If a shape does not match, or a leaf is missing or surplus.
    """
    own = row.param if owner == "parameter" else row.mu
    check_leaf(owner, name, own)
    for what, x in zip(_WHAT[:4], row[:4], strict=True):
        if what not in (owner, "parameter"):
            check_leaf(what, name, x, owner, own)
    if compensate:
        check_carry(name, row.carry, row.param)


def decays_of(optimizer: Any, params: Any) -> list[bool]:
    """Return for each leaf whether it decays, from `weight_decay` and `mask` of the optimizer.

    Parameters
    ----------
    optimizer : acprop_core.ACProp
        A callable mask is called.
    params : container of arrays
        The parameters.

    Returns
    -------
    list of bool
        In the order of `flatten`.

    Raises
    ------
    TypeError
        If a leaf of the mask is not a bool.
    ValueError
        If the mask has another structure than the parameters.
    """
    names, leaves = names_and_leaves(params)
    weight_decay, mask = optimizer.weight_decay, optimizer.mask
    if isinstance(weight_decay, float) and weight_decay == 0.0:
        return [False] * len(names)
    if mask is None:
        return [True] * len(names)
    marks = align(mask(params) if callable(mask) else mask, params, "the mask", prefix=True)
    return check_mask(list(marks), names, leaves)


def step_at(optimizer: Any, count: Any, xp: Any) -> Step:
    """Return step ``count + 1`` of an optimizer.

    Parameters
    ----------
    optimizer : acprop_core.ACProp
        Its schedule is called.
    count : int or 0-d integer array
        Number of updates done.
    xp : namespace
        The array library of the parameters.

    Returns
    -------
    Step
        Called with a `Row`, and whether its parameter decays.

    Raises
    ------
    TypeError
        If the schedule does not return a number, or a hyperparameter is an array of another library.
    ValueError
        If the schedule returns a number out of range.

    Examples
    --------
    >>> import numpy as np
    >>> from acprop_core import ACProp
    >>> step = step_at(ACProp(0.5), 0, np)
    >>> update, mu, nu, carry = step(Row(np.ones(1), np.ones(1), np.zeros(1), np.zeros(1)))
    >>> update
    array([-0.5])
    """
    learning_rate = optimizer.learning_rate
    if callable(learning_rate):
        learning_rate = check_number(f"learning_rate({count})", learning_rate(count))
    hyper = Hyperparameters(
        learning_rate,
        optimizer.b1,
        optimizer.b2,
        optimizer.eps,
        optimizer.eps_root,
        optimizer.weight_decay,
        optimizer.clip_exponent,
        optimizer.centering,
        optimizer.compensate,
    )
    for name, value in zip(("learning_rate", "b1", "b2", "eps", "eps_root", "weight_decay"), hyper, strict=False):
        check_library(name, value, xp)
    check_library("the step count (state.count)", count, xp)
    return Step(numbers_of(hyper, count, xp), flags_of(hyper), xp)
