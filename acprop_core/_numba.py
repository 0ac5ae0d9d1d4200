"""The rule compiled by Numba for CPU memory: one pass that moves each number once. Imported only where it is wanted."""

import types
from typing import Any

import numba
import numpy as np
from numba import types as nb
from numba.extending import intrinsic, register_jitable

from acprop_core import _rule

# Numba compiles the very functions of _rule, called on scalars; only the namespace that they are given is its own.
for _function in (_rule.direction, _rule.moments, _rule.rule, _rule.displacement, _rule._average):
    register_jitable(_function)


@register_jitable
def _clip(x: Any, low: Any, high: Any) -> Any:
    # np.minimum and np.maximum treat NaN in a way that stops vectorisation; here too NaN stays NaN
    return low if x < low else (high if x > high else x)


@register_jitable
def _where(condition: Any, x: Any, y: Any) -> Any:
    return x if condition else y


_scalars = types.ModuleType("scalars")
_scalars.__dict__.update(sqrt=np.sqrt, abs=np.abs, real=np.real, conj=np.conj, clip=_clip, where=_where)


@numba.njit(nogil=True, error_model="numpy")
def step(params: Any, grads: Any, ends: Any, mu: Any, nu: Any, k: Any, decay: bool, grad_scale: Any, done: Any) -> None:
    """Step contiguous parameters in place.

    Parameters
    ----------
    params, grads : (n,) int64 arrays
        The addresses of the parameters and their gradients, of the dtype of `mu`.
    ends : (n,) int64 array
        Where each parameter ends in the moments, in which they lie one behind the other.
    mu, nu : float arrays
        The moments, updated.
    k : Coefficients
        From `scalars_of`.
    decay : bool
        Whether the parameters decay.
    grad_scale : float
        What the gradients are multiplied by first.
    done : bool array
        If its first element is set, nothing happens; it is set at the end. No Python code runs in between, so that it
        says whether all is written, whatever interrupts the caller.
    """
    if done[0]:
        return
    start = 0
    for i in range(params.size):
        size = ends[i] - start
        param = numba.carray(_pointer(params[i], mu), size)
        grad = numba.carray(_pointer(grads[i], mu), size)
        m, v = mu[start : ends[i]], nu[start : ends[i]]
        for j in range(size):
            d, new_m, new_v = _rule.rule(grad[j] * grad_scale, m[j], v[j], k, _scalars)
            if decay:
                param[j] += _rule.displacement(d, param[j], k)
            else:
                param[j] += _rule.displacement(d, None, k)
            m[j] = new_m
            v[j] = new_v
        start = ends[i]
    done[0] = True


def scalars_of(k: _rule.Coefficients, dtype: Any) -> _rule.Coefficients:
    """Return `k` for `step`: scalars of `dtype`, so that nothing is computed wider, and an infinite limit for none."""
    k = k._replace(limit=np.inf if k.limit is None else k.limit)
    return _rule.Coefficients(*(dtype.type(x) if isinstance(x, float) else x for x in k))


def addresses(arrays: Any) -> Any:
    """Return where the data of NumPy arrays begin, as an int64 array.

    The pointer is the first field of NumPy's array object (its C interface fixes that: PyArray_DATA), which CPython
    places behind its own header. ``array.ctypes.data`` says the same in 1.4 microseconds; a thousand of them would cost
    more than stepping a thousand arrays of a thousand.
    """
    return _first_fields(np.fromiter(map(id, arrays), np.int64, len(arrays)), object.__basicsize__)


@intrinsic
def _pointer(typing_context: Any, address: Any, like: Any) -> Any:
    """Return an address as a pointer to elements of the array `like`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return nb.CPointer(like.dtype)(address, like), generate


@numba.njit
def _first_fields(objects: Any, header: int) -> Any:
    fields = np.empty_like(objects)
    for i in range(objects.size):
        fields[i] = numba.carray(_pointer(objects[i] + header, objects), 1)[0]
    return fields
