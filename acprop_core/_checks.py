"""What may come in: numbers, counts and arrays, with errors that name the culprit, the reason and the remedy."""

import math
import numbers
from collections.abc import Sequence
from typing import Any

from array_api_compat import array_namespace, is_jax_array, is_numpy_array

SIXTEEN_BITS = ("float16", "bfloat16")
FLOATS = (*SIXTEEN_BITS, "float32", "float64")
REAL_OF = {"complex64": "float32", "complex128": "float64"}
COMPLEX_OF = {real: name for name, real in REAL_OF.items()}


def dtype_name(dtype: Any) -> str:
    """Return the standard's name of a dtype of any library, ``"float32"``; of a name, the name itself."""
    name = getattr(dtype, "name", None) or getattr(dtype, "__name__", None) or str(dtype)
    return str(name).rpartition(".")[2].lower()


def check_number(name: str, value: Any, below: float = math.inf) -> Any:
    """Return a number as a float and a 0-d array as it is; refuse what is neither, and numbers outside [0, below)."""
    if is_numpy_array(value) and value.ndim == 0 and value.dtype.kind in "fiu":
        value = value.item()  # NumPy's arrays are never traced, and a float64 one would widen float32 state
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not 0.0 <= number < below:
            upper = "finite" if below == math.inf else f"below {below:g}"
            raise ValueError(f"{name} is {value!r}; give a number that is at least 0 and {upper}")
        return number
    if getattr(value, "shape", None) == () and hasattr(value, "dtype") and dtype_name(value.dtype) in FLOATS:
        return value
    raise TypeError(f"{name} is {value!r}; give a number, or a 0-d floating-point array")


def check_count(count: Any) -> Any:
    """Return a step count as an int where its value is at hand, and as the array that it is elsewhere."""
    if isinstance(count, numbers.Integral) and not isinstance(count, bool):
        value = int(count)
    elif getattr(count, "shape", None) == () and hasattr(count, "dtype") and "int" in dtype_name(count.dtype):
        if not is_numpy_array(count):
            return count
        value = int(count)
    else:
        raise TypeError(f"the step count (state.count) is {count!r}; give an integer or a 0-d integer array")
    if value < 0:
        raise ValueError(f"the step count (state.count) is {value}; it cannot be negative")
    return value


def check_library(name: str, value: Any, xp: Any) -> None:
    """Refuse an array that is of another library than the parameters; numbers are of none."""
    if hasattr(value, "dtype") and library(own := array_namespace(value)) != library(xp):
        raise TypeError(
            f"{name} is an array of {library(own)}, the parameters are arrays of {library(xp)}; "
            "convert it, with float() or int() if it is not traced"
        )


def common_namespace(groups: dict[str, list[Any]], names: Sequence[str]) -> Any:
    """Return the array namespace of all leaves (None where all are None); refuse two libraries, and what is no array.

    `groups` maps "parameter", "gradient", … to as many leaves as there are names.
    """
    first, xp, seen = "", None, set()
    for what, leaves in groups.items():
        for name, x in zip(names, leaves, strict=True):
            if x is None or type(x) in seen:
                continue
            seen.add(type(x))
            try:
                found = array_namespace(x)
            except TypeError:
                raise TypeError(
                    f"{called(what, name)} is a {type(x).__name__} ({x!r:.40}), not an array; "
                    "make it one with the asarray of your array library"
                ) from None
            check_arithmetic(what, name, x)
            if xp is None:
                first, xp = called(what, name), found
            elif found is not xp:
                raise TypeError(
                    f"{called(what, name)} is an array of {library(found)}, {first} one of {library(xp)}; "
                    "convert one of them"
                )
    return xp


def check_arithmetic(what: str, name: str, x: Any) -> None:
    """Refuse NumPy's matrices and masked arrays, which are more, or less, than their values."""
    if is_numpy_array(x) and x.__array_priority__ > 0.0:
        raise TypeError(
            f"{called(what, name)} is a {type(x).__name__}, whose arithmetic is not that of arrays; "
            "convert it with np.asarray"
        )


def check_mask(marks: list[Any], names: Sequence[str], owners: Sequence[Any]) -> list[bool]:
    """Return the leaves of a mask as bools; refuse what is none, but None where there is no parameter."""
    for name, mark, owner in zip(names, marks, owners, strict=True):
        if type(mark).__name__ not in ("bool", "bool_") and not (mark is None and owner is None):
            raise TypeError(f"{called('mask', name)} is {mark!r}; give True (decay) or False")
    return [bool(mark) for mark in marks]


def check_leaves(groups: dict[str, list[Any]], names: Sequence[str]) -> None:
    """Refuse leaves that are no floats, or that do not fit the leaves of the first group.

    Gradients and updates may be None. A complex parameter has a complex first moment and may have complex gradients; no
    other may.
    """
    owner, owners = next(iter(groups.items()))
    for what, leaves in groups.items():
        for name, x, own in zip(names, leaves, owners, strict=True):
            if x is None and (own is None or what in ("gradient", "update")):
                continue
            if x is None or own is None:
                have, want = ("None" if leaf is None else "an array" for leaf in (x, own))
                raise ValueError(f"{called(what, name)} is {have}, its {owner} {want}; give both or neither")
            if tuple(x.shape) != tuple(own.shape):
                raise ValueError(
                    f"{called(what, name)} has shape {tuple(x.shape)}, its {owner} {tuple(own.shape)}; make them equal"
                )
            if "sparse" in str(getattr(x, "layout", "")):
                raise TypeError(f"{called(what, name)} is sparse ({x.layout}); make it dense: to_dense()")
            if (device := _device(x)) != (own_device := _device(own)):
                raise TypeError(f"{called(what, name)} is on {device}, its {owner} on {own_device}; move one of them")
            kind, own_kind = dtype_name(x.dtype), dtype_name(own.dtype)
            real_only = what == "second moment" or (own_kind in FLOATS and what != owner)
            if kind not in FLOATS and (real_only or kind not in REAL_OF):
                remedy = f"give {'a real one: ' if kind in REAL_OF else ''}one of {', '.join(FLOATS)}"
                raise TypeError(
                    f"{called(what, name)} has dtype {kind}, which ACProp cannot use"
                    f"{f' for a {owner} of dtype {own_kind}' if kind in REAL_OF else ''}; {remedy}"
                )
            if what == "first moment" and kind in FLOATS and own_kind in REAL_OF:
                raise TypeError(f"{called(what, name)} has dtype {kind}, its {owner} {own_kind}; give a complex one")


def is_compensated(param: Any) -> bool:
    """Return whether `compensate` keeps a carry for this parameter: one of 16 bits."""
    return param is not None and dtype_name(param.dtype) in SIXTEEN_BITS


def check_compensation(compensate: bool, carry: Any) -> None:
    """Refuse a state without carry for an optimizer with `compensate`, and the reverse."""
    if compensate and carry is None:
        raise ValueError(
            "compensate is True, but the state was made without it and has no carry; begin with "
            "state._replace(carry=optimizer.init(params).carry)"
        )
    if not compensate and carry is not None:
        raise ValueError(
            "compensate is False, but the state has a carry; set compensate=True, or give up what rounding took with "
            "state._replace(carry=None)"
        )


def check_carries(carries: Sequence[Any], params: Sequence[Any], names: Sequence[str]) -> None:
    """Refuse carries that are not those of the parameters: in their shape and dtype, one for each of 16 bits."""
    for name, x, param in zip(names, carries, params, strict=True):
        wanted = is_compensated(param)
        if wanted == (x is None):
            have, kind = ("None" if leaf is None else "an array" for leaf in (x, param))
            kind = kind if param is None else dtype_name(param.dtype)
            raise ValueError(
                f"{called('carry', name)} is {have}, its parameter {kind}; give "
                f"{'zeros_like(parameter)' if wanted else 'None'}, as init does"
            )
        if x is None:
            continue
        for what, error in (("shape", ValueError), ("dtype", TypeError)):
            if getattr(x, what, None) != getattr(param, what):
                raise error(
                    f"{called('carry', name)} has {what} {getattr(x, what, None)}, its parameter "
                    f"{getattr(param, what)}; make them equal"
                )


def _device(x: Any) -> Any:
    # JAX is not asked: its tracers have no device, and arrays not committed to theirs go where they are needed. Nor is
    # NumPy, which knows one device, and whose scalars have not always said so.
    return None if is_jax_array(x) or is_numpy_array(x) else getattr(x, "device", None)


def library(xp: Any) -> str:
    """Return the name by which people know a namespace: torch for array_api_compat.torch."""
    return str(xp.__name__).removeprefix("array_api_compat.")


def called(what: str, name: str) -> str:
    """Return "parameter 'w'", "gradient of 'w'"; a bare array has no name."""
    if not name:
        return what
    return f"{what} {name!r}" if what == "parameter" else f"{what} of {name!r}"
