"""The rule compiled by Numba for CPU memory: one pass that moves each number once. Imported only where it is wanted."""

import types
from typing import Any

import numba
import numpy as np
from numba import types as nb
from numba.extending import intrinsic, register_jitable

from acprop_core import _rule
from acprop_core._numba16 import load, narrowed, rounded

# Numba compiles the very functions of _rule, called on scalars; only the namespace that they are given is its own.
for _function in (
    *(_rule.direction, _rule.moments, _rule.rule, _rule._average),
    *(_rule.displacement, _rule.regularized, _rule.compensated),
):
    register_jitable(forceinline=True)(_function)  # a call would keep the loop around it from being vectorised


@register_jitable
def _clip(x: Any, low: Any, high: Any) -> Any:
    # np.minimum and np.maximum treat NaN in a way that stops vectorisation; here too NaN stays NaN
    return low if x < low else (high if x > high else x)


@register_jitable
def _where(condition: Any, x: Any, y: Any) -> Any:
    return x if condition else y


@register_jitable
def _maximum(x: Any, y: Any) -> Any:
    return x if x > y or x != x else y


_scalars = types.ModuleType("scalars")
_scalars.__dict__.update(sqrt=np.sqrt, abs=np.abs, real=np.real, conj=np.conj, clip=_clip, where=_where)
_scalars.__dict__.update(maximum=_maximum, round=np.rint)


NO_DECAY, DECOUPLED, L2 = range(3)


@register_jitable
def _run(param: Any, grad: Any, mu: Any, nu: Any, carry: Any, k: Any, low: Any, decay: int, grad_scale: Any) -> None:
    for i in range(param.size):
        x, g = load(param, i), load(grad, i) * grad_scale
        if decay == L2:
            g = _rule.regularized(g, x, k)
        d, new_mu, new_nu = _rule.rule(g, load(mu, i), load(nu, i), k, _scalars)
        update = _rule.displacement(d, x, k) if decay == DECOUPLED else _rule.displacement(d, None, k)
        if low is None:
            update = rounded(update, param)  # before it is added, as in every framework
        else:
            update, lost = _rule.compensated(update, x, load(carry, i), k, low, _scalars)
            carry[i] = narrowed(lost, carry)
        param[i] = narrowed(x + update, param)
        mu[i] = narrowed(new_mu, mu)
        nu[i] = narrowed(new_nu, nu)


@numba.njit(nogil=True, error_model="numpy")
def step_each(
    addresses: Any, sizes: Any, own: Any, moments: Any, k: Any, low: Any, decay: int, grad_scale: Any
) -> None:
    """Step contiguous parameters in place, whose moments lie anywhere.

    Parameters
    ----------
    addresses : (4, n) int64 array, (5, n) with `low`
        Where the parameters, their gradients, their two moments and their carries begin.
    sizes : (n,) int64 array
        How many elements each has.
    own, moments : arrays
        For the dtypes of parameters, gradients and carries, and of moments, as `seen_as` has them.
    k : Coefficients
        From `scalars_of`.
    low : Format or None
        From `format_of`, if there are carries.
    decay : int
        NO_DECAY, DECOUPLED or L2.
    grad_scale : float
        What the gradients are multiplied by first.
    """
    for i in range(sizes.size):
        _run(
            numba.carray(_pointer(addresses[0, i], own), sizes[i]),
            numba.carray(_pointer(addresses[1, i], own), sizes[i]),
            numba.carray(_pointer(addresses[2, i], moments), sizes[i]),
            numba.carray(_pointer(addresses[3, i], moments), sizes[i]),
            numba.carray(_pointer(addresses[-1, i], own), sizes[i]),  # the carry, or with no `low` what is not touched
            k,
            low,
            decay,
            grad_scale,
        )


@numba.njit(nogil=True, error_model="numpy")
def step(
    params: Any,
    grads: Any,
    ends: Any,
    mu: Any,
    nu: Any,
    carry: Any,
    k: Any,
    low: Any,
    decay: bool,
    grad_scale: Any,
    done: Any,
) -> None:
    """Step contiguous parameters in place.

    Parameters
    ----------
    params, grads : (n,) int64 arrays
        The addresses of the parameters and their gradients, which have the dtype of `carry`.
    ends : (n,) int64 array
        Where each parameter ends in the moments, in which they lie one behind the other.
    mu, nu, carry : arrays
        The moments and the carries, updated, of dtypes as `seen_as` has them; without `low` the carry is empty.
    k : Coefficients
        From `scalars_of`.
    low : Format or None
        From `format_of`, if there are carries.
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
        part = slice(start, ends[i])
        param = numba.carray(_pointer(params[i], carry), size)
        grad = numba.carray(_pointer(grads[i], carry), size)
        _run(param, grad, mu[part], nu[part], carry[part], k, low, decay, grad_scale)
        start = ends[i]
    done[0] = True


def scalars_of(k: _rule.Coefficients, dtype: Any) -> _rule.Coefficients:
    """Return `k` for `step`: scalars of `dtype`, so that nothing is computed wider; an infinite limit for none.

    A flag that is off becomes None. That is a type of its own, so that the usual step is compiled without branches; a
    loop with all of them takes up to a third longer in the processor's cache.
    """
    k = k._replace(limit=np.inf if k.limit is None else k.limit, dither=0.0 if k.dither is None else k.dither)
    scalars: Any = (dtype.type(x) if isinstance(x, float) else None if x is False else x for x in k)
    return _rule.Coefficients(*scalars)


def addresses(arrays: Any) -> Any:
    """Return where the data of NumPy arrays begin, as an int64 array.

    ``array.ctypes.data`` says the same in 1.4 microseconds; a thousand of them would cost more than stepping a thousand
    arrays of a thousand.
    """
    return _first_fields(_objects(arrays))


class Plain:
    """The fast way to see that gradients fit: have shape and dtype of the parameters, are contiguous, lie elsewhere.

    Parameters
    ----------
    params : sequence of numpy.ndarray
        Contiguous arrays that do not overlap.
    """

    def __init__(self, params: Any) -> None:
        self._params = params  # which keeps the objects where they are
        self._objects = _objects(params)
        self._sizes = np.array([x.nbytes for x in params], np.int64)
        starts = addresses(params)
        order = [i for i in np.argsort(starts) if self._sizes[i]]
        self._starts, self._ends = starts[order], (starts + self._sizes)[order]

    def addresses(self, grads: Any) -> Any:
        """Return the `addresses` of gradients that all fit while the parameters are writeable, otherwise None."""
        found = _objects(grads)  # each to be replaced by its address
        fit = _all_plain(found, self._objects, self._sizes, self._starts, self._ends, id(np.ndarray))
        return found if fit else None


@intrinsic
def _pointer(typing_context: Any, address: Any, like: Any) -> Any:
    """Return an address as a pointer to elements of the array `like`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return nb.CPointer(like.dtype)(address, like), generate


# NumPy's C interface fixes what stands in an array object behind the header that CPython gives it (PyArrayObject):
# data, nd, dimensions, strides, base, descr and flags, in words of 8 bytes; nd and flags fill half of theirs.
_HEADER = object.__basicsize__  # its last word is the type
_DATA, _ND, _DIMENSIONS, _DESCR, _FLAGS = 0, 1, 2, 5, 6
_HALF = 2**32 - 1  # as little-endian machines have it, and Numba runs on no other
_PLAIN = 0x1 | 0x100  # NPY_ARRAY_C_CONTIGUOUS, NPY_ARRAY_ALIGNED
_WRITEABLE = 0x400


def _objects(arrays: Any) -> Any:
    return np.fromiter(map(id, arrays), np.int64, len(arrays))


@numba.njit
def _words(address: int, number: int, like: Any) -> Any:
    return numba.carray(_pointer(address, like), number)


@numba.njit
def _first_fields(objects: Any) -> Any:
    fields = np.empty_like(objects)
    for i in range(objects.size):
        fields[i] = _words(objects[i] + _HEADER, 1, objects)[_DATA]
    return fields


@numba.njit
def _all_plain(grads: Any, params: Any, sizes: Any, starts: Any, ends: Any, ndarray: int) -> bool:
    if grads.size != params.size:
        return False
    for i in range(grads.size):
        if _words(grads[i] + _HEADER - 8, 1, grads)[0] != ndarray:
            return False  # None, say, of which no more may be read
        grad, param = _words(grads[i] + _HEADER, 7, grads), _words(params[i] + _HEADER, 7, grads)
        nd = grad[_ND] & _HALF
        if grad[_DESCR] != param[_DESCR] or nd != param[_ND] & _HALF:
            return False
        if grad[_FLAGS] & _PLAIN != _PLAIN or param[_FLAGS] & _WRITEABLE == 0:
            return False
        shape, wanted = _words(grad[_DIMENSIONS], nd, grads), _words(param[_DIMENSIONS], nd, grads)
        for j in range(nd):
            if shape[j] != wanted[j]:
                return False
        # Of the parameters that begin before the gradient ends, the last ends last.
        low, high = 0, starts.size
        while low < high:
            middle = (low + high) // 2
            if starts[middle] < grad[_DATA] + sizes[i]:
                low = middle + 1
            else:
                high = middle
        if low > 0 and ends[low - 1] > grad[_DATA]:
            return False
        grads[i] = grad[_DATA]
    return True
