"""Checks of arguments. Every error names the leaf or option, the value, the reason and the remedy."""

import math
import numbers
import operator
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, repeat
from typing import Any

from array_api_compat import array_namespace

from acprop_core._dtypes import FLOATS, KINDS, REAL_OF, dtype_name, is_compensated
from acprop_core._quirks import (
    dense_method,
    device_of,
    differs_from_arrays,
    has_unknown_shape,
    library,
    numpy_of,
    sparse_layout,
    untraced,
)


def called(what: str, name: str) -> str:
    """Return "parameter 'w'" or "gradient of 'w'"; a bare array has no name."""
    if not name:
        return what
    return f"{what} {name!r}" if what == "parameter" else f"{what} of {name!r}"


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn of the line that called the library, however many of its functions are in between."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).partition(".")[0] in _PACKAGES:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


# torch's own functions are between a caller and its optimizers
_PACKAGES = ("acprop_core", "acprop_optax", "acprop_stepper", "acprop_torch", "torch")


def check_version(package: str, framework: Any, oldest: tuple[int, ...]) -> tuple[int, ...]:
    """Return the version of a framework as three numbers; refuse one that is too old for a package of ours."""
    version = tuple(map(int, re.findall(r"\d+", framework.__version__)[:3]))
    if version < oldest:
        name, needed = framework.__name__, ".".join(map(str, oldest))
        raise ImportError(
            f"{package} needs {name} {needed} or newer, and {name} {framework.__version__} is installed: "
            f"python -m pip install '{name}>={needed}'"
        )
    return version


def check_number(name: str, value: Any, below: float = math.inf, lowest: float = 0.0) -> Any:
    """Return a number as a float, and a 0-d array in float32 or float64; refuse anything else.

    Refuse also numbers that are not finite or outside [lowest, below), with `lowest` 0 or minus infinity. Arrays are
    not read.
    """
    value = untraced(value, "fiu")
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not (math.isfinite(number) and lowest <= number < below):
            upper = "finite" if below == math.inf else f"below {below:g}"
            raise ValueError(
                f"{name} is {value!r}; use a finite number"
                if lowest == -math.inf
                else f"{name} is {value!r}; use a number that is at least 0 and {upper}"
            )
        return number
    if getattr(value, "shape", None) == () and hasattr(value, "dtype"):
        dtype = dtype_name(value.dtype)
        if dtype in ("float32", "float64"):
            return value
        if dtype.startswith(("bfloat", "float", "int", "uint")):
            # the numbers of a step are computed from it, for which 16 bits are too few
            xp = array_namespace(value)
            return xp.astype(value, xp.result_type(xp.float64))
    raise TypeError(f"{name} is {value!r}; use a number, or a 0-d floating-point array")


def check_count(count: Any) -> Any:
    """Return a step count as an int where its value is known on the host, and as the array that it is elsewhere."""
    count = untraced(count, "iu")
    if isinstance(count, numbers.Integral) and not isinstance(count, bool):
        value = int(count)
        if value < 0:
            raise ValueError(
                f"the step count (state.count) is {value}, which is negative; pass an integer that is at least 0"
            )
        return value
    if getattr(count, "shape", None) == () and hasattr(count, "dtype") and "int" in dtype_name(count.dtype):
        return count
    raise TypeError(f"the step count (state.count) is {count!r}; pass an integer or a 0-d integer array")


def check_library(name: str, value: Any, xp: Any) -> None:
    """Refuse an array of another library than the parameters'; numbers are accepted."""
    if hasattr(value, "dtype") and library(own := array_namespace(value)) != library(xp):
        raise TypeError(
            f"{name} is an array of {library(own)}, the parameters are arrays of {library(xp)}; "
            "convert it, with float() or int() if it is not traced"
        )


def common_namespace(leaves: Iterable[tuple[str, str, Any]]) -> Any:
    """Return the array namespace of all leaves (None where all are None); refuse two libraries, and other objects.

    Each leaf is ("parameter" or "gradient" or …, its dotted name, the array or None).
    """
    first, xp, seen = "", None, set()
    for what, name, x in leaves:
        if x is None or type(x) in seen:
            continue
        seen.add(type(x))
        _check_dense(what, name, x)
        try:
            found = array_namespace(x)
        except TypeError:
            raise TypeError(
                f"{called(what, name)} is a {type(x).__name__} ({x!r:.40}), not an array; "
                "convert it with asarray of your array library"
            ) from None
        check_arithmetic(what, name, x)
        if xp is None:
            first, xp = called(what, name), found
        elif found is not xp:
            raise TypeError(
                f"{called(what, name)} is an array of {library(found)}, {first} is an array of {library(xp)}; "
                "convert one of them"
            )
    return xp


def named(
    whats: Sequence[str], names: Sequence[str], columns: Sequence[Sequence[Any]]
) -> Iterator[tuple[str, str, Any]]:
    """Yield what each leaf of some columns of rows is, its name, and the leaf."""
    for what, column in zip(whats, columns, strict=True):
        yield from zip(repeat(what), names, column, strict=False)


def namespace_of_alike(columns: Sequence[Sequence[Any]]) -> Any:
    """Return the namespace of NumPy if all leaves are plain real arrays of it that are alike in each row.

    Nothing that this module checks refuses such leaves. It is None otherwise, which says nothing. Checked leaf by leaf,
    a step of arrays of 1,000 takes 1.4 times as long.
    """
    xp = numpy_of(chain.from_iterable(columns))
    if xp is None:
        return None
    first, *others = columns
    looks = list(map(_look, first))
    if [list(map(_look, column)) for column in others] != [looks] * len(others):
        return None
    if not set(map(dtype_name, {dtype for _, dtype in looks})).issubset(FLOATS):
        return None
    return xp


_look = operator.attrgetter("shape", "dtype")


def check_arithmetic(what: str, name: str, x: Any) -> None:
    """Refuse sparse arrays, and NumPy's matrices and masked arrays, whose arithmetic differs from an array's."""
    _check_dense(what, name, x)
    if differs_from_arrays(x):
        raise TypeError(
            f"{called(what, name)} is a {type(x).__name__}, whose arithmetic differs from an array's; "
            "convert it with np.asarray"
        )


def check_mask(marks: Sequence[Any], names: Sequence[str], owners: Sequence[Any]) -> list[bool]:
    """Return the leaves of a mask as bools; refuse all but bools, 0 and 1, and None where there is no parameter."""
    for name, mark, owner in zip(names, marks, owners, strict=True):
        is_bool = type(mark).__name__ in ("bool", "bool_") or (isinstance(mark, numbers.Integral) and mark in (0, 1))
        if not is_bool and not (mark is None and owner is None):
            raise TypeError(f"{called('mask', name)} is {mark!r}; use True (decay) or False")
    return [bool(mark) for mark in marks]


def check_array(what: str, name: str, x: Any) -> None:
    """Refuse a leaf that is not a dense floating-point array; None is accepted."""
    if x is not None:
        _check_shape(what, name, x)
        _check_dense(what, name, x)
        if (kind := dtype_name(x.dtype)) not in KINDS:
            raise TypeError(
                f"{called(what, name)} has dtype {kind}, which ACProp cannot use; use one of {', '.join(FLOATS)}"
            )


def check_match(
    what: str, name: str, x: Any, owner: str, own: Any, *, optional: bool = False, is_complex: bool | None = None
) -> None:
    """Refuse a leaf that does not match its owner: in shape, device, and kind of dtype.

    With `optional` it may be None. Where the owner is complex, the leaf must be so too if `is_complex`, must not if
    that is False, and may be either if it is None. Where the owner is real, so is the leaf.
    """
    if x is None or own is None:
        if x is None and (optional or own is None):
            return
        have, want = ("None" if leaf is None else "an array" for leaf in (x, own))
        raise ValueError(f"{called(what, name)} is {have}, its {owner} {want}; pass both or neither")
    if tuple(x.shape) != tuple(own.shape):  # NaN, an unknown length, differs from itself
        _check_shape(what, name, x)
        _check_shape(owner, name, own)
        raise ValueError(
            f"{called(what, name)} has shape {tuple(x.shape)}, its {owner} {tuple(own.shape)}; make them equal"
        )
    _check_dense(what, name, x)
    if (device := device_of(x)) != (own_device := device_of(own)):
        raise TypeError(f"{called(what, name)} is on {device}, its {owner} on {own_device}; move one of them")
    kind, own_kind = dtype_name(x.dtype), dtype_name(own.dtype)
    if kind not in FLOATS and (kind not in REAL_OF or own_kind in FLOATS or is_complex is False):
        remedy = f"use {'a real one: ' if kind in REAL_OF else ''}one of {', '.join(FLOATS)}"
        reason = f" for a {owner} of dtype {own_kind}" if kind in REAL_OF else ""
        raise TypeError(f"{called(what, name)} has dtype {kind}, which ACProp cannot use{reason}; {remedy}")
    if is_complex and kind in FLOATS and own_kind in REAL_OF:
        raise TypeError(f"{called(what, name)} has dtype {kind}, its {owner} {own_kind}; use a complex dtype")


def _check_shape(what: str, name: str, x: Any) -> None:
    if has_unknown_shape(x):
        raise ValueError(
            f"{called(what, name)} has unknown chunk sizes, so that its shape cannot be compared; call "
            "compute_chunk_sizes() on it"
        )


def _check_dense(what: str, name: str, x: Any) -> None:
    if layout := sparse_layout(x):
        raise TypeError(f"{called(what, name)} is sparse ({layout}); make it dense: {dense_method(x)}()")


def check_carry(name: str, carry: Any, param: Any) -> None:
    """Refuse a carry that does not match: each 16-bit parameter has one, in its shape and dtype; others have None."""
    wanted = is_compensated(param)
    if wanted == (carry is None):
        have = "None" if carry is None else "an array"
        kind = "None" if param is None else dtype_name(param.dtype)
        raise ValueError(
            f"{called('carry', name)} is {have}, its parameter {kind}; pass "
            f"{'zeros_like(parameter)' if wanted else 'None'}, as init does"
        )
    if carry is None:
        return
    _check_shape("carry", name, carry)
    for what, error in (("shape", ValueError), ("dtype", TypeError)):
        if getattr(carry, what, None) != getattr(param, what):
            raise error(
                f"{called('carry', name)} has {what} {getattr(carry, what, None)}, its parameter "
                f"{getattr(param, what)}; make them equal"
            )


def check_compensation(compensate: bool, carry: Any, like: Any) -> None:
    """Refuse a state without carry for an optimizer with `compensate`, and the reverse.

    `like` is what the carry belongs to. One array that has not 16 bits has no carry: its container of carries is None.
    """
    is_container = isinstance(like, dict | list | tuple)
    if compensate and carry is None and (is_container or (hasattr(like, "dtype") and is_compensated(like))):
        raise ValueError(
            "compensate is True, but the state was made without it and has no carry; begin with "
            "state._replace(carry=optimizer.init(params).carry)"
        )
    if not compensate and carry is not None:
        raise ValueError(
            "compensate is False, but the state has a carry; set compensate=True, or drop the carry with "
            "state._replace(carry=None)"
        )
