"""The rule compiled by Numba for CPU memory: one pass that moves each number once. Imported only where it is wanted."""

import types
from typing import Any

import numba
import numpy as np
from numba import types as nb
from numba.extending import intrinsic, register_jitable

from acprop_core import _rule

# Numba compiles the very functions of _rule, called on scalars; only the namespace that they are given is its own.
for _function in (_rule.direction, _rule.moments, _rule.rule, _rule.displacement, _rule.regularized, _rule._average):
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


NO_DECAY, DECOUPLED, L2 = range(3)


@register_jitable
def _run(param: Any, grad: Any, mu: Any, nu: Any, k: Any, decay: int, grad_scale: Any) -> None:
    for i in range(param.size):
        x, g = param[i], grad[i] * grad_scale
        if decay == L2:
            g = _rule.regularized(g, x, k)
        d, new_mu, new_nu = _rule.rule(g, mu[i], nu[i], k, _scalars)
        param[i] = x + (_rule.displacement(d, x, k) if decay == DECOUPLED else _rule.displacement(d, None, k))
        mu[i] = new_mu
        nu[i] = new_nu


@numba.njit(nogil=True, error_model="numpy")
def step_each(addresses: Any, sizes: Any, like: Any, k: Any, decay: int, grad_scale: Any) -> None:
    """Step contiguous parameters in place, whose moments lie anywhere.

    Parameters
    ----------
    addresses : (4, n) int64 array
        Where the parameters, their gradients and their two moments begin, all of the dtype of `like`.
    sizes : (n,) int64 array
        How many elements each has.
    like : float array
        For its dtype.
    k : Coefficients
        From `scalars_of`.
    decay : int
        NO_DECAY, DECOUPLED or L2.
    grad_scale : float
        What the gradients are multiplied by first.
    """
    for i in range(sizes.size):
        _run(
            numba.carray(_pointer(addresses[0, i], like), sizes[i]),
            numba.carray(_pointer(addresses[1, i], like), sizes[i]),
            numba.carray(_pointer(addresses[2, i], like), sizes[i]),
            numba.carray(_pointer(addresses[3, i], like), sizes[i]),
            k,
            decay,
            grad_scale,
        )


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
        _run(param, grad, mu[start : ends[i]], nu[start : ends[i]], k, decay, grad_scale)
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
