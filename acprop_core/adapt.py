"""For authors of adapters: rows of leaves, their checks, and the step with its casts.

An adapter walks its framework's containers, makes a `Row` of the leaves of each parameter, checks it with `check_row`,
and calls the `Step` that `step_at` returns. CONTRIBUTING.md has an example.
"""

import copy
import math
import operator
from typing import Any, NamedTuple

from acprop_core._checks import (
    called,
    check_array,
    check_carry,
    check_compensation,
    check_count,
    check_library,
    check_mask,
    check_match,
    check_number,
    check_version,
    common_namespace,
    named,
    namespace_of_alike,
    warn,
)
from acprop_core._containers import align, flatten, names_and_leaves, unflatten
from acprop_core._dtypes import Step, dtype_name, is_compensated, moment_dtypes, moment_dtypes_of
from acprop_core._quirks import Array, library, rounded_root
from acprop_core.rule import Hyperparameters, flags_of, has_decay, numbers_of

__all__ = [
    "WHAT",
    "Array",
    "Row",
    "Step",
    "align",
    "called",
    "check_array",
    "check_count",
    "check_match",
    "check_number",
    "check_params",
    "check_row",
    "check_version",
    "common_namespace",
    "decays_of",
    "dtype_name",
    "flatten",
    "hyperparameters_at",
    "is_compensated",
    "library",
    "moment_dtypes",
    "moment_dtypes_of",
    "names_and_leaves",
    "rounded_root",
    "rows_of",
    "step_at",
    "unflatten",
    "warn",
    "with_values",
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


WHAT = Row("parameter", "gradient", "first moment", "second moment", "carry")
_CONTAINERS = Row._make(
    f"the container of {plural}" for plural in ("parameters", "gradients", "first moments", "second moments", "carries")
)


def rows_of(trees: Row, compensate: bool) -> tuple[list[Row], Any]:
    """Return the leaves of five containers as rows, checked.

    Parameters
    ----------
    trees : Row
        Containers of arrays. Without parameters (None) the others are compared with the first moments.
    compensate : bool
        Whether 16-bit parameters must have a carry.

    Returns
    -------
    rows : list of Row
        In the order of `flatten`.
    xp : namespace or None
        The array library of all arrays; None if there are none.

    Raises
    ------
    TypeError, ValueError
        If containers or leaves do not match.
    """
    like = trees.mu if trees.param is None else trees.param
    check_compensation(compensate, trees.carry, like)
    present = [align(tree, like, what) for tree, what in zip(trees[1:4], _CONTAINERS[1:4], strict=True)]
    nothing = [None] * len(present[0])
    param = nothing if trees.param is None else align(trees.param, like, _CONTAINERS.param)
    carry = nothing if trees.carry is None else align(trees.carry, like, _CONTAINERS.carry)
    rows = list(map(Row, param, *present, carry))
    xp = namespace_of_alike(present if trees.param is None else [param, *present])
    if xp is None or compensate:
        names = [name for name, _ in flatten(like)]
        xp = common_namespace(named(WHAT, names, [param, *present, carry]))
        for name, row in zip(names, rows, strict=True):
            check_row(name, row, compensate, has_params=trees.param is not None)
    return rows, xp


def check_row(name: str, row: Row, compensate: bool = False, has_params: bool = True) -> None:
    """Refuse leaves that are not floating-point arrays, or do not match the parameter.

    Parameters
    ----------
    name : str
        Dotted name of the parameter, for the error.
    row : Row
        A gradient of None is accepted everywhere.
    compensate : bool
        Whether a 16-bit parameter must have a carry.
    has_params : bool
        Otherwise the leaves are compared with the first moment, and the parameter is not read.

    Raises
    ------
    TypeError
        If a dtype, layout or device does not match.
    ValueError
        If a shape does not match, or a leaf is missing or surplus.
    """
    owner, own = (WHAT.param, row.param) if has_params else (WHAT.mu, row.mu)
    check_array(owner, name, own)
    check_match(WHAT.grad, name, row.grad, owner, own, optional=True)
    check_match(WHAT.mu, name, row.mu, owner, own, is_complex=True)
    check_match(WHAT.nu, name, row.nu, owner, own, is_complex=False)
    if compensate:
        check_carry(name, row.carry, row.param)


def check_params(optimizer: Any, params: Any, decays: bool) -> None:
    """Refuse an update without the parameters that weight decay or compensation need."""
    for name, needed in (("weight_decay", decays), ("compensate", optimizer.compensate)):
        if needed and params is None:
            raise ValueError(
                f"{name} is {getattr(optimizer, name)!r}, which needs the parameters: call update(grads, state, params)"
            )


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
    mask = optimizer.mask
    if mask is None or not has_decay(optimizer.weight_decay):
        return [has_decay(optimizer.weight_decay) for _ in flatten(params)]
    names, leaves = names_and_leaves(params)
    marks = align(mask(params) if callable(mask) else mask, params, "the mask", prefix=True)
    return check_mask(list(marks), names, leaves)


def step_at(optimizer: Any, count: Any, xp: Any) -> Step:
    """Return step ``count + 1`` of an optimizer.

    Parameters
    ----------
    optimizer : acprop_core.ACProp
        Its schedules are called.
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
        If a schedule does not return a number, or a hyperparameter is an array of another library.
    ValueError
        If a schedule returns a number that is not finite.

    Examples
    --------
    >>> import numpy as np
    >>> from acprop_core import ACProp
    >>> step, one, zero = step_at(ACProp(0.5), 0, np), np.ones(1), np.zeros(1)
    >>> update, mu, nu, carry = step(Row(one, one, zero, zero))
    >>> update
    array([-0.5])
    """
    hyper = hyperparameters_at(optimizer, count, xp)
    return Step(numbers_of(hyper, count, xp), flags_of(hyper), xp)


def hyperparameters_at(optimizer: Any, count: Any, xp: Any) -> Hyperparameters:
    """Return the options of step ``count + 1`` of an optimizer, whose schedules are called as `step_at` says."""
    hyper = Hyperparameters(*_options_of(optimizer))
    for name in ("learning_rate", "weight_decay"):
        if callable(schedule := getattr(hyper, name)):
            value = check_number(f"{name}({count})", schedule(count), lowest=-math.inf)
            hyper = hyper._replace(**{name: value})
    for name, value in zip(_OPTIONS[:7], hyper, strict=False):
        if type(value) is not float:
            check_library(name, value, xp)
    check_library("the step count (state.count)", count, xp)
    return hyper


# all but the last two, which the core does not have: l2 and maximize
_OPTIONS = Hyperparameters._fields[:-2]
_options_of = operator.attrgetter(*_OPTIONS)


def with_values(optimizer: Any, **values: Any) -> Any:
    """Return an optimizer with other options, of which some may be values of a schedule in the middle of a run.

    Parameters
    ----------
    optimizer : acprop_core.ACProp
        The optimizer. It is not changed.
    **values : object
        The options to replace. Here `learning_rate` and `weight_decay` may be any finite numbers, because a schedule
        that ends at 0 can end slightly below it. The others are checked as the constructor checks them.

    Returns
    -------
    acprop_core.ACProp
        A copy. It does not warn again of what the constructor warned of.

    Raises
    ------
    TypeError, ValueError
        If an option does not exist, or its value is refused.

    Examples
    --------
    >>> from acprop_core import ACProp
    >>> with_values(ACProp(1e-3), learning_rate=-1.5e-20).learning_rate
    -1.5e-20
    """
    if unknown := sorted(values.keys() - vars(optimizer).keys()):
        raise TypeError(f"an ACProp has no option {unknown[0]!r}; use one of {', '.join(vars(optimizer))}")
    new = copy.copy(optimizer)
    for name, value in values.items():
        object.__setattr__(new, name, value)
    new._check(lowest=-math.inf)
    return new
