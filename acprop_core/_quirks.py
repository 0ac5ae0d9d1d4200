"""Every branch on a library, each with its reason.

- Dask: `clip` is not elementwise; `zeros_like` of a complex array as a real one warns; shapes may be unknown.
- The standard 2022.12 (array-api-strict can be set to it): no `clip`.
- NumPy: `clip` is written in Python; operators turn 0-d arrays into scalars; masked arrays and matrices are arrays
  whose arithmetic differs; scalars have not always had a device; arrays are never traced.
- JAX: tracers have no device, and uncommitted arrays move to the device where they are needed.
- PyTorch: NumPy cannot read its bfloat16, or tensors that require gradients, are conjugated lazily or on a device; on
  a CPU its square root may be one unit in the last place off.
- MLX: NumPy cannot read its bfloat16.
- CuPy: NumPy cannot read its arrays.
- PyTorch and sparse libraries: arrays that are not dense.
"""

import functools
import numbers
import operator
from collections.abc import Callable, Iterable
from typing import Any

from array_api_compat import array_namespace, is_cupy_array, is_jax_array, is_numpy_array, is_torch_array

Array = Any  # an array of any library: the standard defines no common base class


def library(xp: Any) -> str:
    """Return the name by which people know a namespace: torch for array_api_compat.torch."""
    return str(xp.__name__).removeprefix("array_api_compat.")


def standard_namespace(xp: Any) -> Any:
    """Return the namespace with a `clip` that is elementwise."""
    # Dask's clip, as array_api_compat has it, makes an array of each limit, as large as the parameter and in chunks of
    # its own, which the workers then exchange.
    name = getattr(xp, "__name__", "")  # written so that torch's compiler can trace it
    is_dask = name.endswith("dask.array")
    lacks_clip = getattr(xp, "__array_api_version__", "2025") < "2023.12"
    if name == "array_api_compat.numpy":
        return _NumpyClip(xp)
    if name == "array_api_compat.torch" and not xp.compiler.is_compiling():  # its compiler has a square root of its own
        return _TorchRoot(xp)
    return _OwnClip(xp) if is_dask or lacks_clip else xp


class _Extended:
    """A namespace with one function of its own."""

    def __init__(self, xp: Any) -> None:
        self._xp = xp

    def __getattr__(self, name: str) -> Any:
        return getattr(self._xp, name)


class _OwnClip(_Extended):
    def clip(self, x: Array, low: Any, high: Any) -> Array:
        x = self._xp.where(x < low, self._xp.asarray(low, dtype=x.dtype), x)
        return self._xp.where(x > high, self._xp.asarray(high, dtype=x.dtype), x)


class _NumpyClip(_Extended):
    """NumPy with a clip of two ufuncs: `clip` of array_api_compat takes 8 microseconds more, half a step of 1,000."""

    def __init__(self, xp: Any) -> None:
        super().__init__(xp)
        self.sqrt = xp.sqrt  # found without `__getattr__`

    def clip(self, x: Array, low: Any, high: Any) -> Array:
        return self._xp.minimum(self._xp.maximum(x, low), high)


class _TorchRoot(_Extended):
    """PyTorch with a correctly rounded square root."""

    def sqrt(self, x: Array) -> Array:
        return rounded_root(x, self._xp.sqrt(x))


def rounded_root(x: Array, root: Array) -> Array:
    """Return the square root of a tensor, correctly rounded, for the root that torch has computed.

    Parameters
    ----------
    x : tensor
        Float32 or float64, of any device.
    root : tensor
        The root by torch, which autograd may follow. On a CPU its memory is overwritten, and need not be set before.

    Returns
    -------
    tensor
        `root`, or a new tensor where NumPy cannot see the memory: under vmap, in most subclasses, without NumPy. In
        float64 the new one is as torch rounds it.
    """
    # The vector library of torch's builds for x86 rounds one root of 160 to the wrong neighbour. Other libraries and
    # compilers take the processor's instruction, which IEEE 754 requires to be correctly rounded. Overwritten behind
    # autograd's back, because the derivative is the same, and anything that traces sees an ordinary root.
    if not x.is_cpu:
        return root
    try:
        _numpy_sqrt()(x.detach().numpy(), out=root.detach().numpy())
    except (ImportError, RuntimeError, TypeError):
        return x.double().sqrt().to(x.dtype)  # of float32 numbers, twice rounded is correctly rounded here
    return root


@functools.cache
def _numpy_sqrt() -> Any:
    import array_api_compat.numpy as compat

    numpy: Any = compat  # the checker of types does not see what it imports by a star
    return numpy.errstate(invalid="ignore")(numpy.sqrt)  # torch does not warn of negative numbers


class Rounding(_Extended):
    """A namespace with `rounded`, which rounds to the dtype of a 16-bit parameter and back."""

    def __init__(self, xp: Any, rounded: Callable[[Array], Array]) -> None:
        super().__init__(xp)
        self.rounded = rounded


def as_array(x: Array, xp: Any) -> Array:
    """Return `x` as an array, because operators of NumPy turn 0-d arrays into scalars."""
    return x if x.shape else xp.asarray(x)


def device_of(x: Any) -> Any:
    """Return the device of an array; None where devices are not compared."""
    return None if is_numpy_array(x) or is_jax_array(x) else getattr(x, "device", None)


def untraced(x: Any, kinds: str) -> Any:
    """Return the Python number in a 0-d NumPy array of one of these kinds of dtype; anything else as it is."""
    # a NumPy array is never traced, and one of float64 would widen float32 state
    if not (is_numpy_array(x) and x.ndim == 0):
        return x
    is_ml_dtype = x.dtype.isbuiltin == 2 and "f" in kinds  # most of ml_dtypes, such as bfloat16, are of kind "V"
    return x.item() if x.dtype.kind in kinds or is_ml_dtype else x


def numpy_of(leaves: Iterable[Any]) -> Any:
    """Return the namespace of NumPy if all leaves are its own arrays, none of a subclass; None otherwise."""
    kinds = set(map(type, leaves))
    return _numpy_of(kinds.pop()) if len(kinds) == 1 else None


@functools.cache
def _numpy_of(kind: type) -> Any:
    is_numpy = (kind.__module__, kind.__name__) == ("numpy", "ndarray")
    return array_namespace(kind(0)) if is_numpy else None


def differs_from_arrays(x: Array) -> bool:
    """Return whether `x` is a masked array or a matrix of NumPy."""
    return is_numpy_array(x) and x.__array_priority__ > 0.0


def sparse_layout(x: Array) -> str:
    """Return the layout of a sparse array of any library, an empty string for anything else."""
    layout = getattr(x, "layout", None)
    if layout is not None and "sparse" in str(layout):
        return str(layout)
    # SciPy, CuPy, JAX and pydata/sparse have modules and classes for them
    return type(x).__name__ if ".sparse" in f".{type(x).__module__}" and hasattr(x, "shape") else ""


def dense_method(x: Array) -> str:
    """Return the name of the method that makes a sparse array dense."""
    return next((name for name in ("to_dense", "toarray", "todense") if hasattr(x, name)), "to_dense")


def has_unknown_shape(x: Array) -> bool:
    """Return whether an axis has an unknown length, which Dask writes as NaN."""
    shape = getattr(x, "shape", ())
    return any(map(operator.ne, shape, shape))


def add_one(count: Any) -> Any:
    """Return the next count: of an int, or of a 0-d array, which stops at the largest value of its dtype."""
    if isinstance(count, numbers.Integral):
        return int(count) + 1
    xp = array_namespace(count)
    largest = xp.iinfo(count.dtype).max
    if is_numpy_array(count):
        return xp.asarray(min(int(count) + 1, largest), dtype=count.dtype)
    return xp.where(count < largest, count + 1, count)


def readable_by_numpy(x: Array, is_bfloat16: bool) -> Any:
    """Return an array that `numpy.asarray` can read; of PyTorch's and MLX's bfloat16 the bits, as int16."""
    if is_torch_array(x):
        x = x.detach().cpu().resolve_conj()
        return x.contiguous().view(array_namespace(x).int16).numpy() if is_bfloat16 else x
    if is_bfloat16 and type(x).__module__ == "mlx.core":
        return x.view(array_namespace(x).int16)
    return x.get() if is_cupy_array(x) else x


def has_no_content(x: Array) -> bool:
    """Return whether `x` is a tensor of torch's "meta" device."""
    return is_torch_array(x) and x.is_meta
