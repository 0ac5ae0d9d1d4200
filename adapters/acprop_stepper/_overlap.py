"""Where arrays are in memory, and which of them share it, because writing into one would change the other."""

import ctypes
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from acprop_core.adapt import Array


def first_overlap(named: Iterable[tuple[str, Array, bool]], xp: Any) -> tuple[str, str] | None:
    """Return the names of the first two arrays that share memory and of which one is written to, or None.

    `named` yields (name, array, whether it is written to).
    """
    bounds = np.lib.array_utils.byte_bounds if xp is np else xp.byte_bounds
    extents = [(*bounds(x), name, x, written) for name, x, written in named if x.size]
    extents.sort(key=operator.itemgetter(0, 1))
    open_: list[Any] = []  # arrays whose extent reaches beyond the start of the next
    for low, high, name, x, written in extents:
        open_ = [other for other in open_ if other[0] > low]
        for _, other_name, other, other_written in open_:
            if (written or other_written) and _share(other, x, xp):
                return other_name, name
        if written and _overlaps_itself(x, xp):
            return name, name
        open_.append((high, name, x, written))
    return None


def _overlaps_itself(x: Array, xp: Any) -> bool:
    extent = x.itemsize
    for stride, n in sorted((abs(s), n) for s, n in zip(x.strides, x.shape, strict=True) if n > 1):
        if stride < extent:
            break
        extent += stride * (n - 1)
    else:
        return False  # the usual case: along each axis, a step leads beyond the reach of the shorter steps
    # Of two elements in one place, one has index 0 along the first axis where they differ; otherwise shift both.
    first = (slice(1),)
    return any(_share(x[first * (i + 1)], x[(*first * i, slice(1, None))], xp) for i in range(x.ndim) if x.shape[i] > 1)


def _share(a: Array, b: Array, xp: Any) -> bool:
    try:
        return bool(xp.shares_memory(a, b, max_work=10_000) if xp is np else xp.shares_memory(a, b))
    except np.exceptions.TooHardError:
        return True


# All memory as one array: element ``id(x) // 8`` is the word after the header of the object x.
_MEMORY = np.ctypeslib.as_array((ctypes.c_int64 * 2**59).from_address(object.__basicsize__))


def addresses(arrays: Sequence[Any]) -> Any:
    """Return where the data of NumPy arrays begin, as an int64 array."""
    # NumPy's C interface fixes that the address is the first field after the object's header. To read it takes 0.06
    # microseconds an array, ``array.ctypes.data`` 2, and to step a thousand numbers 1.
    return _MEMORY[np.fromiter(map(id, arrays), np.int64, len(arrays)) >> 3]
