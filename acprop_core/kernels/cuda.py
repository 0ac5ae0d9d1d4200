"""`rule.step` compiled by Numba for CUDA memory: one launch for all arrays, which moves each number once.

There are two kernels, launched one after the other. The first makes the numbers of the step of each array, in float64,
from hyperparameters and step counts that it reads on the device. The second steps all elements and increments the
counts; each block of threads takes one chunk of one array. The first changes nothing but its result.

Both get addresses alone, so that they serve the memory of any library, and no value is read on the host.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numba import cuda

from acprop_core import rule
from acprop_core.kernels.element import (
    CARRY,
    COUNT,
    DECAY,
    GRAD,
    GROUP,
    MU,
    NU,
    OPTIONS,
    PARAM,
    SIZE,
    WIDE,
    Access,
    element_of,
    maker_of,
)

CHUNK = 2**14
"""Elements that a block of threads takes: 100 million are 6,000 blocks, many more than a device runs at once."""
THREADS = 256
"""Threads of a block."""
FIELDS = len(rule.Numbers._fields)
"""Numbers of the step of one array."""
NUMBERS = 16
"""Their places in memory, a power of two, because whole vectors are read."""

_VECTOR = 4  # elements that a thread loads at once: 128 bits of float32


class Memory(NamedTuple):
    """How kernels read and write memory, and what they compute with; Numba's simulator needs another than a device.

    Attributes
    ----------
    access : mapping
        An `Access` for each name of a dtype.
    functions, makers
        The namespaces of `rule.step` and `rule.numbers_of`.
    reader, writer : callable
        ``reader(dtype, n)`` returns a function from an address to n numbers: a tuple, or a number for n = 1.
        ``writer(dtype, n)`` returns a function of an address and n numbers.
    compiled : callable
        Makes a Python function one that a kernel may call.
    """

    access: Mapping[str, Access]
    functions: Mapping[str, Any]
    makers: Any
    reader: Callable[[Any, int], Any]
    writer: Callable[[Any, int], Any]
    compiled: Callable[[Any], Any]


def chunks_of(sizes: Any) -> Any:
    """Return the chunks of arrays of these sizes: rows of an array's number, and the first element of the chunk.

    Parameters
    ----------
    sizes : (n,) int64 array
        Numbers of elements.

    Returns
    -------
    (m, 2) int64 array
        An empty array has one chunk, because its first chunk counts the step.
    """
    pieces = np.maximum(-(-sizes // CHUNK), 1)
    owners = np.repeat(np.arange(sizes.size), pieces)
    firsts = CHUNK * (np.arange(owners.size) - np.repeat(np.cumsum(pieces) - pieces, pieces))
    return np.stack([owners, firsts], axis=1).astype(np.int64)


def numbers_kernel_of(
    flags: rule.Flags, param_dtype: str, moment_dtype: str, memory: Memory, threads: int
) -> Callable[..., None]:
    """Return the kernel that makes the numbers of a step, one thread an array; see `Launcher.run` for its arguments."""
    real = np.dtype("float64" if moment_dtype == "float64" else "float32")
    numbers_at = memory.compiled(maker_of(flags.asynchronous, flags.format is not None, real.name, memory.makers))
    read_int, read_wide, read_narrow, write = (
        memory.reader(np.dtype("int64"), 1),
        memory.reader(np.dtype("float64"), 1),
        memory.reader(np.dtype("float32"), 1),
        memory.writer(real, 1),
    )
    width, columns = real.itemsize, len(OPTIONS)

    def make_numbers(table: Any, n: Any, options: Any, numbers: Any, scale_at: Any) -> None:
        i = np.int64(cuda.blockIdx.x) * threads + cuda.threadIdx.x
        if i < n:
            count_at = read_int(table + 8 * (COUNT * n + i))
            wide = read_int(table + 8 * (WIDE * n + i)) != 0
            count = read_wide(count_at) if wide else np.float64(read_narrow(count_at))
            o = options + 8 * columns * read_int(table + 8 * (GROUP * n + i))
            lr, b1, b2, eps = read_wide(o), read_wide(o + 8), read_wide(o + 16), read_wide(o + 24)
            eps_root, decay, exponent, climbs = (
                read_wide(o + 32),
                read_wide(o + 40),
                read_wide(o + 48),
                read_wide(o + 56),
            )
            factor = np.float64(1.0) / np.float64(read_narrow(scale_at)) if scale_at != 0 else read_wide(o + 64)
            row = (lr, b1, b2, eps, eps_root, decay, exponent, climbs, factor)
            k = numbers_at((row,), 0, int(min(count, 2.0**62)))
            for field in range(FIELDS):
                write(numbers + (i * NUMBERS + field) * width, k[field])

    return make_numbers


def step_kernel_of(
    flags: rule.Flags, param_dtype: str, moment_dtype: str, memory: Memory, threads: int
) -> Callable[..., None]:
    """Return the kernel that steps all elements, one block a chunk; see `Launcher.run` for its arguments."""
    own, moments = memory.access[param_dtype], memory.access[moment_dtype]
    real = np.dtype("float64" if moment_dtype == "float64" else "float32")
    element = memory.compiled(element_of(flags, own, moments, memory.functions))
    read_int, read_wide, read_narrow = (memory.reader(np.dtype(x), 1) for x in ("int64", "float64", "float32"))
    write_wide, write_narrow = (memory.writer(np.dtype(x), 1) for x in ("float64", "float32"))
    read_numbers = memory.reader(real, NUMBERS)
    read, read_moment = memory.reader(own.dtype, 1), memory.reader(moments.dtype, 1)
    write, write_moment = memory.writer(own.dtype, 1), memory.writer(moments.dtype, 1)
    read_4, read_moments_4 = memory.reader(own.dtype, _VECTOR), memory.reader(moments.dtype, _VECTOR)
    write_4, write_moments_4 = memory.writer(own.dtype, _VECTOR), memory.writer(moments.dtype, _VECTOR)
    a, b, width = own.dtype.itemsize, moments.dtype.itemsize, real.itemsize
    own_align, moments_align = min(_VECTOR * a, 16), min(_VECTOR * b, 16)
    compensates = flags.format is not None

    def step(table: Any, n: Any, chunks: Any, numbers: Any, found_at: Any) -> None:
        if found_at != 0 and read_narrow(found_at) != 0.0:
            return
        block, thread = np.int64(cuda.blockIdx.x), np.int64(cuda.threadIdx.x)
        i, first = read_int(chunks + 16 * block), read_int(chunks + 16 * block + 8)
        column = table + 8 * i
        if first == 0 and thread == 0:  # the step is counted where its numbers have been made: nothing reads it here
            count_at = read_int(column + 8 * COUNT * n)
            if count_at == 0:
                pass
            elif read_int(column + 8 * WIDE * n) != 0:
                write_wide(count_at, read_wide(count_at) + 1.0)
            else:
                write_narrow(count_at, read_narrow(count_at) + np.float32(1.0))
        param_at, grad_at = read_int(column + 8 * PARAM * n), read_int(column + 8 * GRAD * n)
        mu_at, nu_at = read_int(column + 8 * MU * n), read_int(column + 8 * NU * n)
        carry_at = read_int(column + 8 * CARRY * n)
        decay = read_int(column + 8 * DECAY * n)
        last = min(first + CHUNK, read_int(column + 8 * SIZE * n))
        k = rule.Numbers(*read_numbers(numbers + i * NUMBERS * width)[:FIELDS])
        single = first  # the first element that is not part of a vector
        if (param_at | grad_at | carry_at) % own_align == 0 and (mu_at | nu_at) % moments_align == 0:
            single = last - (last - first) % _VECTOR
            j = first + _VECTOR * thread
            while j < single:
                x, g = read_4(param_at + a * j), read_4(grad_at + a * j)
                m, s = read_moments_4(mu_at + b * j), read_moments_4(nu_at + b * j)
                c = read_4(carry_at + a * j) if compensates else x
                x0, m0, s0, c0 = element(x[0], g[0], m[0], s[0], c[0], decay, k)
                x1, m1, s1, c1 = element(x[1], g[1], m[1], s[1], c[1], decay, k)
                x2, m2, s2, c2 = element(x[2], g[2], m[2], s[2], c[2], decay, k)
                x3, m3, s3, c3 = element(x[3], g[3], m[3], s[3], c[3], decay, k)
                write_4(param_at + a * j, (x0, x1, x2, x3))
                write_moments_4(mu_at + b * j, (m0, m1, m2, m3))
                write_moments_4(nu_at + b * j, (s0, s1, s2, s3))
                if compensates:
                    write_4(carry_at + a * j, (c0, c1, c2, c3))
                j += _VECTOR * threads
        j = single + thread
        while j < last:
            x, g = read(param_at + a * j), read(grad_at + a * j)
            c = read(carry_at + a * j) if compensates else x
            x0, m0, s0, c0 = element(x, g, read_moment(mu_at + b * j), read_moment(nu_at + b * j), c, decay, k)
            write(param_at + a * j, x0)
            write_moment(mu_at + b * j, m0)
            write_moment(nu_at + b * j, s0)
            if compensates:
                write(carry_at + a * j, c0)
            j += threads

    return step


class Launcher:
    """The two kernels of one combination of flags and dtypes, in the machine code of one kind of device.

    Parameters
    ----------
    flags : rule.Flags
        As for `cpu.kernel_of`.
    param_dtype, moment_dtype : str
        Dtypes that `sixteen_bits.is_compiled` accepts; carries have the parameters' dtype.
    capability : (int, int)
        The compute capability of the device, such as (9, 0).
    """

    def __init__(self, flags: rule.Flags, param_dtype: str, moment_dtype: str, capability: tuple[int, int]) -> None:
        from acprop_core.kernels import cuda_device

        flags = flags._replace(decay=rule.Decay.NONE, scaled=True)
        kernels = [
            cuda_device.load(cuda_device.assemble(cuda_device.compile_kernel(function, capability), capability))
            for function in (
                numbers_kernel_of(flags, param_dtype, moment_dtype, cuda_device.MEMORY, THREADS),
                step_kernel_of(flags, param_dtype, moment_dtype, cuda_device.MEMORY, THREADS),
            )
        ]
        self._make_numbers, self._step = kernels
        self._launch = cuda_device.launch

    def run(
        self,
        device: int,
        stream: int,
        table: int,
        columns: int,
        chunks: int,
        blocks: int,
        options: int,
        numbers: int,
        grad_scale: int = 0,
        found_inf: int = 0,
    ) -> None:
        """Step all arrays of a table, and count the step of each, in this order on a stream. Nothing is waited for.

        Parameters
        ----------
        device, stream : int
            Number of the device, and the handle of one of its streams (``cudaStream_t``).
        table : int
            Address on the device, as those below, of a (`element.ROWS`, columns) int64 array: a column for each array,
            with addresses on the device. No two arrays may share memory, not even their counts. If `options` is 0, a
            count may be 0 too, and is then left to the caller.
        columns : int
            Number of arrays, at least 1.
        chunks, blocks : int
            Address of what `chunks_of` returns, and its length.
        options : int
            Address of a (groups, len(`element.OPTIONS`)) float64 array; 0 if `numbers` holds those of this step.
        numbers : int
            Address, a multiple of 16, of columns * `NUMBERS` numbers of the moments' dtype, or float32 if that has 16
            bits, the first `FIELDS` of each column in the order of `rule.Numbers`; overwritten unless `options` is 0.
        grad_scale : int
            Address of a float32: gradients are divided by it; 0 for the factor in the options.
        found_inf : int
            Address of a float32: if it is not 0, nothing is changed, and no step is counted; 0 for none.

        Raises
        ------
        RuntimeError
            If the driver refuses a launch.
        """
        if options != 0:
            first = table, columns, options, numbers, grad_scale
            self._launch(device, stream, self._make_numbers, -(-columns // THREADS), THREADS, first)
        self._launch(device, stream, self._step, blocks, THREADS, (table, columns, chunks, numbers, found_inf))


launcher_of = functools.cache(Launcher)
"""`Launcher`, kept."""
