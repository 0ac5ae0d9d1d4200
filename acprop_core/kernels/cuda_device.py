"""CUDA devices for `cuda`: memory by address, compiling, linking and launching.

Numba compiles a kernel, and NVIDIA's linker makes machine code of it. Numba alone would let it contract a product and a
sum into one operation, which rounds once instead of twice; the linker is told not to. So results have the bits of the
CPU kernel, except where float64 functions such as the logarithm, in the numbers of a step, differ.
"""

import ctypes
import functools
import math
from types import FunctionType
from typing import Any

from cuda.bindings import driver, nvjitlink
from llvmlite import ir
from numba import cuda, from_dtype
from numba import types as nb
from numba.cuda import libdevice
from numba.cuda.extending import intrinsic, register_jitable

from acprop_core.kernels import scalars
from acprop_core.kernels.cuda import Memory
from acprop_core.kernels.element import OF_ELEMENTS, OF_NUMBERS
from acprop_core.kernels.sixteen_bits import ACCESS

_inlined = register_jitable(forceinline=True)


@_inlined
def _round(x: Any) -> Any:
    # of float32 alone, because float64 has no carries
    return libdevice.rintf(x)


# Numba has these under other names for a device than for a CPU.
_FUNCTIONS = {**scalars.NAMESPACE, "sqrt": math.sqrt, "abs": abs, "round": _round}
for _function in (
    *(*OF_ELEMENTS, *OF_NUMBERS),
    *(_FUNCTIONS[name] for name in ("clip", "maximum", "where")),
    *(vars(scalars.MAKERS)[name] for name in ("astype", "full_like", "ones_like", "result_type")),
    *(x for access in ACCESS.values() for x in access[1:] if isinstance(x, FunctionType)),  # the rest is compiled
):
    _inlined(_function)

_LANES = [ir.Constant(ir.IntType(32), i) for i in range(16)]


def _pointer(context: Any, builder: Any, kind: Any, n: int, address: Any) -> Any:
    """Return a pointer into global memory to n numbers, and their alignment."""
    value = context.get_value_type(kind)
    target = value if n == 1 else ir.VectorType(value, n)
    width = kind.bitwidth // 8
    return builder.inttoptr(address, ir.PointerType(target, addrspace=1)), min(n * width, 16)


@functools.cache
def _reader(dtype: Any, n: int) -> Any:
    kind = from_dtype(dtype)

    @intrinsic
    def read(typing_context: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            pointer, align = _pointer(context, builder, kind, n, arguments[0])
            x = builder.load(pointer, align=align)
            if n == 1:
                return x
            parts = [builder.extract_element(x, _LANES[i]) for i in range(n)]
            return context.make_tuple(builder, signature.return_type, parts)

        return (kind if n == 1 else nb.UniTuple(kind, n))(nb.int64), generate

    return read


@functools.cache
def _writer(dtype: Any, n: int) -> Any:
    kind = from_dtype(dtype)

    @intrinsic
    def write(typing_context: Any, address: Any, values: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            pointer, align = _pointer(context, builder, kind, n, arguments[0])
            x = arguments[1]
            if n > 1:
                x = ir.Constant(ir.VectorType(context.get_value_type(kind), n), ir.Undefined)
                for i in range(n):
                    x = builder.insert_element(x, builder.extract_value(arguments[1], i), _LANES[i])
            builder.store(x, pointer, align=align)
            return context.get_dummy_value()

        return nb.void(nb.int64, kind if n == 1 else nb.UniTuple(kind, n)), generate

    return write


MEMORY = Memory(ACCESS, _FUNCTIONS, scalars.MAKERS, _reader, _writer, _inlined)


def compile_kernel(function: Any, capability: tuple[int, int]) -> bytes:
    """Return a kernel as NVIDIA's code for the linker.

    Parameters
    ----------
    function : callable
        A Python function of five int64.
    capability : (int, int)
        The compute capability of the device, such as (9, 0).

    Returns
    -------
    bytes
        LTO-IR, for `assemble`.
    """
    code, _ = cuda.compile(function, nb.void(*[nb.int64] * 5), device=False, abi="numba", output="ltoir", cc=capability)
    return bytes(code)


def assemble(code: bytes, capability: tuple[int, int], as_text: bool = False) -> bytes:
    """Return the machine code of a kernel, or PTX.

    Parameters
    ----------
    code : bytes
        From `compile_kernel`.
    capability : (int, int)
        The same as there.
    as_text : bool
        Whether to return PTX.

    Returns
    -------
    bytes
        A cubin, for `load`; or text.
    """
    major, minor = capability
    # no contraction; roots and quotients correctly rounded; denormals kept
    options = [f"-arch=sm_{major}{minor}", "-lto", "-O3", "-fma=0", "-prec-sqrt=1", "-prec-div=1", "-ftz=0"]
    handle = nvjitlink.create(len(options) + as_text, options + ["-ptx"] * as_text)
    try:
        nvjitlink.add_data(handle, nvjitlink.InputType.LTOIR, code, len(code), "acprop")
        nvjitlink.complete(handle)
        if as_text:
            result = bytearray(nvjitlink.get_linked_ptx_size(handle))
            nvjitlink.get_linked_ptx(handle, result)
        else:
            result = bytearray(nvjitlink.get_linked_cubin_size(handle))
            nvjitlink.get_linked_cubin(handle, result)
    finally:
        nvjitlink.destroy(handle)
    return bytes(result)


def load(machine_code: bytes) -> int:
    """Load machine code; the driver brings it to each device at its first use there.

    Parameters
    ----------
    machine_code : bytes
        From `assemble`, with one kernel.

    Returns
    -------
    int
        The handle of the kernel, for `launch`.

    Raises
    ------
    RuntimeError
        If the driver refuses it.
    """
    _called(driver.cuInit(0))
    library = _called(driver.cuLibraryLoadData(machine_code, [], [], 0, [], [], 0))
    (kernel,) = _called(driver.cuLibraryEnumerateKernels(1, library))
    return int(kernel)


def launch(device: int, stream: int, kernel: int, blocks: int, threads: int, arguments: tuple[int, ...]) -> None:
    """Launch a kernel. Nothing is waited for.

    Parameters
    ----------
    device, stream : int
        Number of the device, whose context is made current if this thread has none, and the handle of its stream.
    kernel : int
        From `load`.
    blocks, threads : int
        Number of blocks, and of the threads of each.
    arguments : tuple of int
        The arguments of the kernel, as int64.

    Raises
    ------
    RuntimeError
        If the driver refuses the launch.
    """
    if not int(_called(driver.cuCtxGetCurrent())):
        _called(driver.cuCtxSetCurrent(_context_of(device)))
    values = arguments, (ctypes.c_int64,) * len(arguments)
    _called(driver.cuLaunchKernel(driver.CUfunction(kernel), blocks, 1, 1, threads, 1, 1, 0, stream, values, 0))


@functools.cache
def _context_of(device: int) -> Any:
    return _called(driver.cuDevicePrimaryCtxRetain(_called(driver.cuDeviceGet(device))))


def _called(result: tuple[Any, ...]) -> Any:
    """Return what a function of the driver has returned, without the error code; raise if that is an error."""
    error, *values = result
    if error != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(
            f"the CUDA driver refuses the compiled step: {error.name}; look for an earlier error, with "
            "CUDA_LAUNCH_BLOCKING=1, or go without numba-cuda: uninstall it"
        )
    return values[0] if values else None
