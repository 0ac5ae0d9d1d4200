"""16-bit numbers for Numba, which has none: memory is read as integers, which are converted to float32 and back.

Results equal ml_dtypes' and NumPy's (except the payload of a NaN): to nearest even, with denormals. Everything is
inlined and without branches, so that loops over it are vectorised.
"""

from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import types as nb
from numba.core import config
from numba.extending import intrinsic, register_jitable

from acprop_core.kernels.element import Access


def _operation(takes: Any, gives: Any, build: Any) -> Any:
    """Return a compiled function with the LLVM instructions that `build` appends."""

    @intrinsic
    def operation(typing_context: Any, x: Any) -> Any:
        return gives(takes), lambda context, builder, signature, arguments: build(builder, *arguments)

    return operation


_half, _float, _int16, _int32 = ir.HalfType(), ir.FloatType(), ir.IntType(16), ir.IntType(32)
_bits_of = _operation(nb.float32, nb.uint32, lambda builder, x: builder.bitcast(x, _int32))
_float_of = _operation(nb.uint32, nb.float32, lambda builder, bits: builder.bitcast(bits, _float))
_from_float16 = _operation(
    nb.uint16, nb.float32, lambda builder, bits: builder.fpext(builder.bitcast(bits, _half), _float)
)
_to_float16 = _operation(nb.float32, nb.uint16, lambda builder, x: builder.bitcast(builder.fptrunc(x, _half), _int16))


@register_jitable(forceinline=True)
def _from_bfloat16(bits: Any) -> Any:
    # a bfloat16 is the upper half of a float32
    return _float_of(np.uint32(bits) << np.uint32(16))


@register_jitable(forceinline=True)
def _to_bfloat16(x: Any) -> Any:
    # In integers: the processors that have an instruction for it flush denormals to zero. Each sum is cut to 32 bits,
    # because Numba makes it one of 64, which takes twice the registers.
    bits = _bits_of(x)
    upper = np.uint32(bits >> np.uint32(16))
    nearest = np.uint32(bits + np.uint32(0x7FFF) + (upper & np.uint32(1))) >> np.uint32(16)
    return np.uint16(nearest if x == x else upper | np.uint32(0x40))  # a NaN must not be carried over to infinity


@register_jitable(forceinline=True)
def _same(x: Any) -> Any:
    return x


@register_jitable(forceinline=True)
def _round_to_bfloat16(x: Any) -> Any:
    return _from_bfloat16(_to_bfloat16(x))


@register_jitable(forceinline=True)
def _round_to_float16(x: Any) -> Any:
    return _from_float16(_to_float16(x))


def _converts_float16() -> bool:
    # otherwise LLVM calls a function of a library that may be missing
    chosen = config.CPU_NAME or config.CPU_FEATURES  # from the environment
    arm = binding.get_default_triple().startswith(("aarch64", "arm64"))
    return arm or (not chosen and binding.get_host_cpu_features().get("f16c", False))


ACCESS = {
    "float32": Access(np.dtype(np.float32), _same, _same, _same),
    "float64": Access(np.dtype(np.float64), _same, _same, _same),
    "bfloat16": Access(np.dtype(np.uint16), _from_bfloat16, _to_bfloat16, _round_to_bfloat16),
    "float16": Access(np.dtype(np.uint16), _from_float16, _to_float16, _round_to_float16),
}
"""By the name of a dtype. Not every CPU can read float16."""
_READABLE = ACCESS.keys() if _converts_float16() else ACCESS.keys() - {"float16"}


def is_readable(param_dtype: str, moment_dtype: str) -> bool:
    """Return whether a CPU can step parameters and moments of these dtypes: both float64, or neither."""
    return is_compiled(param_dtype, moment_dtype) and {param_dtype, moment_dtype} <= _READABLE


def is_compiled(param_dtype: str, moment_dtype: str) -> bool:
    """Return whether a CUDA device can."""
    return {param_dtype, moment_dtype} <= ACCESS.keys() and (param_dtype == "float64") == (moment_dtype == "float64")


def access_to(param_dtype: str, moment_dtype: str) -> tuple[Access, Access]:
    """Return how compiled code reads and writes parameters and moments of these dtypes."""
    return ACCESS[param_dtype], ACCESS[moment_dtype]
