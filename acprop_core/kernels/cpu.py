"""`rule.step` compiled by Numba for CPU memory: one pass over all arrays, which moves each number once.

The kernel makes the numbers of a step by `rule.numbers_of`, and can be called by several threads at once.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numba
import numpy as np
from llvmlite import ir
from numba import types as nb
from numba.extending import intrinsic, register_jitable

from acprop_core import rule
from acprop_core.kernels.disk import compiled
from acprop_core.kernels.element import (
    CARRY,
    COUNT,
    DECAY,
    GRAD,
    GROUP,
    MU,
    NU,
    OF_ELEMENTS,
    OPTIONS,
    PARAM,
    ROWS,
    SIZE,
    WIDE,
    element_of,
    maker_of,
)
from acprop_core.kernels.scalars import MAKERS, NAMESPACE
from acprop_core.kernels.sixteen_bits import access_to

# Inlined, because a call stops vectorisation of the loop around it: 13 ms, not 0.8, for a million float32 numbers.
_inlined = register_jitable(forceinline=True)
# Numba compiles the functions of the rule themselves, called on scalars; only their namespace is Numba's.
for _function in OF_ELEMENTS:
    _inlined(_function)

# Places in the record that threads share: the first two in cache lines of their own, because each chunk changes them;
# the last seven for OpenMP.
_NEXT, _DONE, _CHUNKS, _LENGTH, _STEP = 0, 8, 16, 17, 18
_REGION, _MEMBER, _THREADS, _TABLE, _COLUMNS, _OPTIONS, _GROUPS = range(24, 31)
_PLACES = 32


def shared(size: int, length: int) -> Any:
    """Return the record that the threads of a step share, for `size` elements in chunks of `length`."""
    record = np.zeros(_PLACES, np.int64)
    record[_CHUNKS] = record[_NEXT] = record[_DONE] = -(-size // length)  # nothing is left to do before the first step
    record[_LENGTH] = length
    return record


def share_by_openmp(record: Any, table: Any, options: Any, region: int, member: int, threads: int) -> None:
    """Have the leader of a step call so many threads of OpenMP.

    Parameters
    ----------
    record, table, options : array
        The arguments of the kernel. The last two must live as long as the record is used.
    region : int
        From `openmp.region`.
    member : int
        From `member_of`.
    threads : int
        Number of threads, with the leader.
    """
    record[[_MEMBER, _THREADS, _TABLE, _COLUMNS]] = member, threads, table.ctypes.data, table.shape[1]
    record[[_REGION, _OPTIONS, _GROUPS]] = region, options.ctypes.data, options.shape[0]


def kernel_of(flags: rule.Flags, param_dtype: str, moment_dtype: str) -> Callable[..., None]:
    """Return `rule.step` for contiguous real memory of these dtypes, compiled, or loaded from a file.

    Parameters
    ----------
    flags : rule.Flags
        `decay` does not matter: it is in the table, so that one program serves parameters with and without decay.
        `scaled` does not matter either: a product with 1 costs less than a second program.
    param_dtype, moment_dtype : str
        Dtypes that `is_readable` accepts; carries have the parameters' dtype.

    Returns
    -------
    callable
        ``kernel(table, options, record, leads)`` updates parameters, moments, carries and counts in place.

        - table : (`element.ROWS`, n) int64 array.
        - options : (groups, len(`element.OPTIONS`)) float64 array. Hyperparameters of each parameter group.
        - record : int64 array. From `shared`.
        - leads : bool. One thread leads a step: it returns when everything is written and counted, and no Python code
          runs in between. Other threads may call the kernel meanwhile, with False. Whenever they come, even after the
          step or in the middle of the next, they take chunks as long as there are any.
    """
    return _kernel_of(flags._replace(decay=rule.Decay.NONE, scaled=True), param_dtype, moment_dtype)


class _Parts(NamedTuple):
    """What `_kernel_of` is made of."""

    step: Any
    numbers_at: Any
    own: int
    moments: int


@functools.cache
def _kernel_of(flags: rule.Flags, param_dtype: str, moment_dtype: str) -> Callable[..., None]:
    widths = [access.dtype.itemsize for access in access_to(param_dtype, moment_dtype)]
    real = "float64" if moment_dtype == "float64" else "float32"
    numbers_at = _maker_of(flags.asynchronous, flags.format is not None, real)

    def make(names: Any) -> Callable[..., None]:
        def kernel(table: Any, options: Any, record: Any, leads: bool) -> None:
            following = record.ctypes.data + 8 * _NEXT
            done = record.ctypes.data + 8 * _DONE
            n = table.shape[1]
            if leads:
                record[_STEP] += 1
                atomic_swap(done, 0)
                atomic_swap(following, 0)
                if record[_REGION] != 0:
                    _call_region(record[_REGION], record[_MEMBER], record.ctypes.data, record[_THREADS])
            i, start, seen = 0, 0, -1  # a parameter, the number of elements before it, and for what `numbers` are
            group, count = 0, 0
            numbers = names.numbers_at(options, group, count)
            while True:
                chunk = atomic_add(following, 1)
                if chunk >= record[_CHUNKS]:
                    break
                first = chunk * record[_LENGTH]
                last = first + record[_LENGTH]
                if first < start:  # the leader has begun another step
                    i, start = 0, 0
                while start + table[SIZE, i] <= first:
                    start += table[SIZE, i]
                    i += 1
                k, begin = i, start
                while k < n and begin < last:
                    size = table[SIZE, k]
                    low = max(first - begin, 0)
                    high = min(last - begin, size)
                    if high > low:
                        c = _count_at(table, k)
                        if c != count or table[GROUP, k] != group or seen != record[_STEP]:
                            group, count, seen = table[GROUP, k], c, record[_STEP]
                            numbers = names.numbers_at(options, group, count)
                        names.step(
                            table[PARAM, k] + low * names.own,
                            table[GRAD, k] + low * names.own,
                            table[MU, k] + low * names.moments,
                            table[NU, k] + low * names.moments,
                            table[CARRY, k] + low * names.own,
                            high - low,
                            table[DECAY, k],
                            numbers,
                        )
                    begin += size
                    k += 1
                atomic_add(done, 1)
            if leads:
                while atomic_add(done, 0) < record[_CHUNKS]:  # another thread is at its last chunk
                    pass
                for k in range(n):
                    _increment(table, k)

        return kernel

    parts = _Parts(_loop_of(flags, param_dtype, moment_dtype), numbers_at, *widths)
    signature = nb.void(nb.int64[:, ::1], nb.float64[:, ::1], nb.int64[::1], nb.boolean)
    return compiled(make, signature, parts._asdict(), f"kernel {flags} {param_dtype} {moment_dtype}")


@functools.cache
def member_of(flags: rule.Flags, param_dtype: str, moment_dtype: str) -> Any:
    """Return the function that each thread of OpenMP calls, for `kernel_of` with these arguments: its `address`."""
    kernel = kernel_of(flags, param_dtype, moment_dtype)

    def make(names: Any) -> Callable[..., None]:
        def member(address: Any) -> None:
            record = numba.carray(_int64_at(address), _PLACES)
            table = numba.carray(_int64_at(record[_TABLE]), (ROWS, record[_COLUMNS]))
            options = numba.carray(_float64_at(record[_OPTIONS]), (record[_GROUPS], len(OPTIONS)))
            names.kernel(table, options, record, False)

        return member

    kind = f"member {flags} {param_dtype} {moment_dtype}"
    return compiled(make, nb.void(nb.int64), {"kernel": kernel}, kind, "cfunc")


@functools.cache
def check_kernel() -> Callable[..., bool]:
    """Return a function that finds out whether a step of a table of `kernel_of` can be taken.

    Returns
    -------
    callable
        ``check(table)`` is False if a step count is not a whole number of at least 0.
    """

    def make(names: Any) -> Callable[..., bool]:
        def check(table: Any) -> bool:
            for i in range(table.shape[1]):
                count = _read_count(table, i)
                if not (count >= 0.0 and np.floor(count) == count and count != np.inf):
                    return False
            return True

        return check

    return compiled(make, nb.boolean(nb.int64[:, ::1]), {}, "check")


def _loop_of(flags: rule.Flags, param_dtype: str, moment_dtype: str) -> Any:
    """Return the compiled loop over one parameter, or a part of one."""
    own, moments = access_to(param_dtype, moment_dtype)
    own_at, moments_at = _pointer_to(own.dtype), _pointer_to(moments.dtype)
    compensates = flags.format is not None
    element = _inlined(element_of(flags, own, moments, NAMESPACE))

    @numba.njit(nogil=True, error_model="numpy")
    def loop(
        param_at: Any, grad_at: Any, mu_at: Any, nu_at: Any, carry_at: Any, size: Any, decay: Any, numbers: Any
    ) -> None:
        param, grad = numba.carray(own_at(param_at), size), numba.carray(own_at(grad_at), size)
        mu, nu = numba.carray(moments_at(mu_at), size), numba.carray(moments_at(nu_at), size)
        carry = numba.carray(own_at(carry_at), size)
        for j in range(size):
            param[j], mu[j], nu[j], new = element(param[j], grad[j], mu[j], nu[j], carry[j], decay, numbers)
            if compensates:
                carry[j] = new

    return loop


@functools.cache
def _maker_of(asynchronous: bool, compensates: bool, dtype: str) -> Any:
    """Return the compiled function of `maker_of`."""
    return numba.njit(nogil=True, error_model="numpy")(maker_of(asynchronous, compensates, dtype, MAKERS))


def _pointer_to(dtype: Any) -> Any:
    """Return a compiled function from an address to a pointer to numbers of this dtype."""
    pointer = nb.CPointer(numba.from_dtype(dtype))

    @intrinsic
    def at(typing_context: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

        return pointer(address), generate

    return at


def _atomic(operation: str) -> Any:
    """Return a compiled function that changes the int64 at an address in one go, and returns its old value."""

    @intrinsic
    def change(typing_context: Any, address: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            pointer = builder.inttoptr(arguments[0], context.get_value_type(nb.int64).as_pointer())
            return builder.atomic_rmw(operation, pointer, arguments[1], "seq_cst")

        return nb.int64(nb.int64, nb.int64), generate

    return change


@intrinsic
def _call_region(typing_context: Any, region: Any, member: Any, data: Any, threads: Any) -> Any:
    """Call ``region(member, data, threads, 0)``, whose types are those of GOMP_parallel."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer, word = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer, pointer, word, word])
        function, *pointers = map(builder.inttoptr, arguments[:3], [kind.as_pointer(), pointer, pointer])
        builder.call(function, [*pointers, builder.trunc(arguments[3], word), word(0)])
        return context.get_dummy_value()

    return nb.void(nb.int64, nb.int64, nb.int64, nb.int64), generate


atomic_add, atomic_swap = _atomic("add"), _atomic("xchg")
_float32_at, _float64_at = _pointer_to(np.dtype(np.float32)), _pointer_to(np.dtype(np.float64))
_int64_at = _pointer_to(np.dtype(np.int64))


@register_jitable
def _read_count(table: Any, i: Any) -> Any:
    address = table[COUNT, i]
    if table[WIDE, i]:
        return numba.carray(_float64_at(address), 1)[0]
    return np.float64(numba.carray(_float32_at(address), 1)[0])


@register_jitable
def _count_at(table: Any, i: Any) -> Any:
    return np.int64(min(_read_count(table, i), 2.0**62))


@register_jitable
def _increment(table: Any, i: Any) -> None:
    if table[WIDE, i]:
        numba.carray(_float64_at(table[COUNT, i]), 1)[0] += 1.0
    else:
        numba.carray(_float32_at(table[COUNT, i]), 1)[0] += np.float32(1.0)
