"""16-bit numbers for Numba, which has none: their memory is seen as integers, which are made float32 and back.

bfloat16 is seen as int16 and float16 as uint16, so that the type of an array says which it is. The results are those
of ml_dtypes and NumPy (but for the payload of a NaN): to nearest even, with denormals. All is inlined and without
branches, so that loops over it are vectorised.
"""

import functools
from typing import Any

import numba
import numpy as np
from llvmlite import binding, ir
from numba import types as nb
from numba.core import config
from numba.extending import intrinsic, overload, register_jitable

from acprop_core import _rule, _step

_INLINE: Any = {"forceinline": True}


def _operation(takes: Any, gives: Any, build: Any) -> Any:
    """Return a compiled function that is what `build` appends to a program in LLVM's language."""

    @intrinsic
    def operation(typing_context: Any, x: Any) -> Any:
        return gives(takes), lambda context, builder, signature, arguments: build(builder, *arguments)

    return operation


_half, _float, _int16, _int32 = ir.HalfType(), ir.FloatType(), ir.IntType(16), ir.IntType(32)
_bits_of = _operation(nb.float32, nb.uint32, lambda builder, x: builder.bitcast(x, _int32))
_float_of = _operation(nb.uint32, nb.float32, lambda builder, bits: builder.bitcast(bits, _float))
from_float16 = _operation(
    nb.uint16, nb.float32, lambda builder, bits: builder.fpext(builder.bitcast(bits, _half), _float)
)
to_float16 = _operation(nb.float32, nb.uint16, lambda builder, x: builder.bitcast(builder.fptrunc(x, _half), _int16))


@register_jitable(forceinline=True)
def from_bfloat16(bits: Any) -> Any:
    """Return a bfloat16 as float32, of which it is the upper half."""
    return _float_of(np.uint32(np.uint16(bits)) << np.uint32(16))


@register_jitable(forceinline=True)
def to_bfloat16(x: Any) -> Any:
    """Return the nearest bfloat16."""
    # In integers: the processors that have an instruction for it flush denormals to zero. Each sum is cut to 32 bits,
    # since Numba makes it one of 64, which takes twice the registers.
    bits = _bits_of(x)
    upper = np.uint32(bits >> np.uint32(16))
    nearest = np.uint32(bits + np.uint32(0x7FFF) + (upper & np.uint32(1))) >> np.uint32(16)
    return np.int16(nearest if x == x else upper | np.uint32(0x40))  # a NaN must not be carried over to infinity


@numba.njit(forceinline=True)
def round_to_bfloat16(x: Any) -> Any:
    """Return the nearest bfloat16 as float32."""
    return from_bfloat16(to_bfloat16(x))


@numba.njit(forceinline=True)
def round_to_float16(x: Any) -> Any:
    """Return the nearest float16 as float32."""
    return from_float16(to_float16(x))


def _converts_float16() -> bool:
    # else LLVM calls a function of a library that need not be there
    chosen = config.CPU_NAME or config.CPU_FEATURES  # from the environment
    arm = binding.get_default_triple().startswith(("aarch64", "arm64"))
    return arm or (not chosen and binding.get_host_cpu_features().get("f16c", False))


_SEEN_AS: dict[str, Any] = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(np.int16)}
if _converts_float16():
    _SEEN_AS["float16"] = np.dtype(np.uint16)


def seen_as(own: str, moments: str) -> tuple[Any, Any] | None:
    """Return the dtypes that compiled code takes for parameters and moments of these; None if it can take none."""
    if own == moments == "float64":
        return np.dtype(own), np.dtype(own)
    return (_SEEN_AS[own], _SEEN_AS[moments]) if own in _SEEN_AS and moments in _SEEN_AS else None


def load(array: Any, i: int) -> Any:
    """Return what stands in memory as a number to compute with."""
    raise NotImplementedError  # but in compiled code


def narrowed(x: Any, array: Any) -> Any:
    """Return the nearest to a number of those that such memory holds, as it is seen there."""
    raise NotImplementedError  # but in compiled code


def rounded(x: Any, array: Any) -> Any:
    """Return the nearest to a number of those that such memory holds, to compute with."""
    raise NotImplementedError  # but in compiled code


def _chosen(array: Any, for_bfloat16: Any, for_float16: Any, otherwise: Any) -> Any:
    return {nb.int16: for_bfloat16, nb.uint16: for_float16}.get(array.dtype, otherwise)


overload(load, jit_options=_INLINE)(
    lambda array, i: _chosen(
        array,
        lambda array, i: from_bfloat16(array[i]),
        lambda array, i: from_float16(array[i]),
        lambda array, i: array[i],
    )
)
overload(narrowed, jit_options=_INLINE)(
    lambda x, array: _chosen(array, lambda x, array: to_bfloat16(x), lambda x, array: to_float16(x), lambda x, array: x)
)
overload(rounded, jit_options=_INLINE)(
    lambda x, array: _chosen(
        array, lambda x, array: round_to_bfloat16(x), lambda x, array: round_to_float16(x), lambda x, array: x
    )
)


@functools.cache
def format_of(dtype: str) -> _rule.Format:
    """Return a 16-bit dtype as `compensated` needs it, compiled."""
    low = _step.format_of(dtype, {"bfloat16": round_to_bfloat16, "float16": round_to_float16}[dtype])
    return _rule.Format._make(np.float32(x) if isinstance(x, float) else x for x in low)
