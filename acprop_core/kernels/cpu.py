"""`rule.step` compiled by Numba for CPU memory: one pass over all arrays, which moves each number once."""

import functools
import types
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numba import types as nb
from numba.extending import intrinsic, register_jitable

from acprop_core import rule
from acprop_core.kernels.sixteen_bits import access_to

# Inlined, because a call stops vectorisation of the loop around it: 13 ms, not 0.8, for a million float32 numbers.
_inlined = register_jitable(forceinline=True)
# Numba compiles the functions of the rule themselves, called on scalars; only their namespace is Numba's.
for _function in (rule._direction, rule._moments, rule._residual, rule._square, rule._average, rule._compensated):
    _inlined(_function)
_inlined(rule.step)


@_inlined
def _clip(x: Any, low: Any, high: Any) -> Any:
    # np.minimum and np.maximum treat NaN in a way that stops vectorisation; here too NaN stays NaN
    return low if x < low else (high if x > high else x)


@_inlined
def _maximum(x: Any, y: Any) -> Any:
    return x if x > y or x != x else y


@_inlined
def _where(condition: Any, x: Any, y: Any) -> Any:
    return x if condition else y


_FUNCTIONS = {
    **{"sqrt": np.sqrt, "abs": np.abs, "real": np.real, "conj": np.conj, "round": np.rint},
    **{"clip": _clip, "maximum": _maximum, "where": _where},
}


def numbers_for(numbers: rule.Numbers, moment_dtype: str) -> Any:
    """Return numbers, already `cast`, as the array that a kernel takes, in its dtype so that no operation is wider."""
    return np.array(numbers, np.float64 if moment_dtype == "float64" else np.float32)


def kernel_of(flags: rule.Flags, param_dtype: str, moment_dtype: str) -> Callable[..., None]:
    """Return `rule.step` for contiguous real memory of these dtypes, to be compiled at its first call.

    Parameters
    ----------
    flags : rule.Flags
        `decay` does not matter: it is an argument of the kernel, so that one program serves parameters with and without
        decay. `scaled` does not matter either: a product with 1 costs less than a second program.
    param_dtype, moment_dtype : str
        Dtypes that `is_readable` accepts; carries have the parameters' dtype.

    Returns
    -------
    callable
        ``kernel(table, sizes, decays, numbers, done)`` updates parameters, moments and carries in place.

        - table : (5, n) int64 array. Addresses of n parameters, gradients, first moments, second moments, carries;
          without compensation the last row is not read.
        - sizes : (n,) int64 array. Numbers of elements.
        - decays : (n,) int64 array. A `rule.Decay` for each parameter.
        - numbers : array. From `numbers_for`.
        - done : int64 array. Its first element is incremented at the end. No Python code runs in between, so it tells
          whether everything is written, even if the caller is interrupted.
    """
    return _kernel_of(flags._replace(decay=rule.Decay.NONE, scaled=True), param_dtype, moment_dtype)


@functools.cache
def _kernel_of(flags: rule.Flags, param_dtype: str, moment_dtype: str) -> Callable[..., None]:
    own, moments = access_to(param_dtype, moment_dtype)
    own_at, moments_at = _pointer_to(own.dtype), _pointer_to(moments.dtype)
    load, store, rounded = own[1:]
    load_moment, store_moment = moments[1:3]
    namespace = types.ModuleType("scalars")
    vars(namespace).update(_FUNCTIONS, rounded=rounded)
    centering, asynchronous, _, clipped, old_is_lighter1, old_is_lighter2, *_ = flags
    low: Any = None if flags.format is None else rule.Format._make(map(np.float32, flags.format))
    compensates = low is not None

    @numba.njit(nogil=True, error_model="numpy")
    def kernel(table: Any, sizes: Any, decays: Any, k: Any, done: Any) -> None:
        numbers = rule.Numbers(k[0], k[1], k[2], k[3], k[4], k[5], k[6], k[7], k[8], k[9], k[10], k[11], k[12], k[13])
        for i in range(sizes.size):
            flags = rule.Flags(
                centering, asynchronous, decays[i], clipped, old_is_lighter1, old_is_lighter2, False, True, low, True
            )
            size = sizes[i]
            param, grad = numba.carray(own_at(table[0, i]), size), numba.carray(own_at(table[1, i]), size)
            mu, nu = numba.carray(moments_at(table[2, i]), size), numba.carray(moments_at(table[3, i]), size)
            carry = numba.carray(own_at(table[4, i]), size)
            for j in range(size):
                x = load(param[j])
                old = load(carry[j]) if compensates else None
                update, new_mu, new_nu, new = rule.step(
                    x, load(grad[j]), load_moment(mu[j]), load_moment(nu[j]), old, numbers, flags, namespace
                )
                param[j] = store(x + rounded(update))  # rounded before it is added, as in every framework
                mu[j] = store_moment(new_mu)
                nu[j] = store_moment(new_nu)
                if compensates:
                    carry[j] = store(new)
        done[0] += 1

    return kernel


def part_of(table: Any, sizes: Any, widths: tuple[int, int], first: int, last: int) -> tuple[Any, Any]:
    """Return table and sizes of the elements [first, last), counted as if all arrays were back to back.

    `widths` are the bytes of an element: of parameters, and of moments.
    """
    own, moments = widths
    ends = np.cumsum(sizes)
    start, stop = (np.clip(cut - (ends - sizes), 0, sizes) for cut in (first, last))
    return table + np.array([[own], [own], [moments], [moments], [own]]) * start, stop - start


def _pointer_to(dtype: Any) -> Any:
    """Return a compiled function from an address to a pointer to numbers of this dtype."""
    pointer = nb.CPointer(numba.from_dtype(dtype))

    @intrinsic
    def at(typing_context: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

        return pointer(address), generate

    return at
