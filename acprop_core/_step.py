"""One step, for one array at a time: the casts around the rule."""

from collections.abc import Callable
from typing import Any

from acprop_core import _rule
from acprop_core._checks import COMPLEX_OF, REAL_OF, dtype_name
from acprop_core._rule import Array, as_dtype


class Step:
    """One step of an optimizer, for one array at a time: the casts around the rule.

    The rule runs in float32, or in float64 where parameter or moments have it; each result goes back to the dtype
    that it came from.
    """

    def __init__(self, k: _rule.Coefficients, xp: Any, decoupled: bool = True) -> None:
        self._k = k
        self._decoupled = decoupled  # or else weight decay is a part of the gradient
        # Dask's clip, as array_api_compat has it, makes an array of each limit, as large as the parameter and in chunks
        # of its own, which then travel between the workers.
        is_dask = getattr(xp, "__name__", "").endswith("dask.array")  # in the way that torch's compiler can follow
        lacks_clip = getattr(xp, "__array_api_version__", "2025") < "2023.12" or is_dask
        self._xp = _OwnClip(xp) if lacks_clip else xp
        self._cast: dict[tuple[str, bool], tuple[_rule.Coefficients, Any, Any]] = {}

    @property
    def learning_rate(self) -> Any:
        """The learning rate of this step: a number or a 0-d array."""
        return -self._k.rate

    def __call__(
        self, grad: Array, mu: Array, nu: Array, param: Array, decay: bool, carry: Array | None = None
    ) -> tuple[Array, Array, Array, Array | None]:
        """Return (u_t, m_t, s_t, c_t), the last None without a `carry`.

        The update has the dtype of `param`, whose values matter only with `decay` or a carry.
        """
        k, dtype, _ = self.numbers_for(mu.dtype, param.dtype)
        x = as_dtype(param, dtype, self._xp) if decay else None
        if decay and not self._decoupled:
            grad, x = _rule.regularized(as_dtype(grad, dtype, self._xp), x, k), None
        d, new_mu, new_nu = self._run(grad, mu, nu, param)
        update = _rule.displacement(d, x, k)
        if carry is not None:
            update, carry = compensated(update, param, carry, k, self._xp)
        return restore(update, param, self._xp), new_mu, new_nu, carry

    def without_rate(self, grad: Array, mu: Array, nu: Array, param: Array) -> tuple[Array, Array, Array]:
        """Return (d_t, m_t, s_t), the step before learning rate and decay, for hosts that bring their own."""
        d, new_mu, new_nu = self._run(grad, mu, nu, param)
        return restore(d, param, self._xp), new_mu, new_nu

    def numbers_for(self, *dtypes: Any) -> tuple[_rule.Coefficients, Any, Any]:
        """Return the numbers, and the dtype and its real dtype, with which to run the rule on these dtypes."""
        kinds = [dtype_name(dtype) for dtype in dtypes]
        real = "float64" if any(kind in ("float64", "complex128") for kind in kinds) else "float32"
        is_complex = any(kind in REAL_OF for kind in kinds)
        if (real, is_complex) not in self._cast:
            real_dtype = getattr(self._xp, real)
            dtype = getattr(self._xp, COMPLEX_OF[real]) if is_complex else real_dtype
            k = _rule.cast(self._k, real_dtype, is_complex, _SMALLEST_NORMAL[real], self._xp)
            self._cast[real, is_complex] = k, dtype, real_dtype
        return self._cast[real, is_complex]

    def _run(self, grad: Array, mu: Array, nu: Array, param: Array) -> tuple[Array, Array, Array]:
        xp = self._xp
        k, dtype, real_dtype = self.numbers_for(mu.dtype, param.dtype)
        d, new_mu, new_nu = _rule.rule(
            as_dtype(grad, dtype, xp), as_dtype(mu, dtype, xp), as_dtype(nu, real_dtype, xp), k, xp
        )
        return d, restore(new_mu, mu, xp), restore(new_nu, nu, xp)


def compensated(update: Array, param: Array, carry: Array, k: _rule.Coefficients, xp: Any) -> tuple[Array, Array]:
    """Return what to add to a 16-bit parameter, and its next carry, both in its dtype, for an update in a wider one."""
    wide, own = update.dtype, param.dtype
    low = format_of(dtype_name(own), lambda x: as_dtype(as_dtype(x, own, xp), wide, xp))
    results = _rule.compensated(update, as_dtype(param, wide, xp), as_dtype(carry, wide, xp), k, low, xp)
    added, carry = (restore(x, param, xp) for x in results)
    return added, carry


def format_of(dtype: str, rounded: Callable[[Array], Array]) -> _rule.Format:
    """Return what the rule needs to know of a 16-bit dtype, `rounded` being how to round to it, and back."""
    bits, floor = _SIGNIFICANT_BITS_AND_FLOOR[dtype]
    unit = 2.0**-bits
    return _rule.Format(
        rounded=rounded,
        unit=unit,
        above=1.0 + 1.01 * unit,  # a little more than half a last place for the smallest significand
        floor=floor,
        half=0.5,
    )


# Half the smallest parameters whose carry has a last place of its own: below, it is 2**-24, the smallest number, in
# float16; and in bfloat16 2**-125, since XLA flushes what is less than 2**-126 to zero.
_SIGNIFICANT_BITS_AND_FLOOR = {"float16": (11, 2.0**-3), "bfloat16": (8, 2.0**-110)}
_SMALLEST_NORMAL = {"float32": 2.0**-126, "float64": 2.0**-1022}


def restore(x: Array, other: Array, xp: Any) -> Array:
    """Return `x` as an array of the dtype of `other`: NumPy's operators make scalars of 0-d arrays."""
    x = as_dtype(x, other.dtype, xp)
    return x if x.shape else xp.asarray(x)


class _OwnClip:
    """A namespace with a `clip` made of comparisons: the standard 2022.12 has none, and Dask's is not elementwise."""

    def __init__(self, xp: Any) -> None:
        self._xp = xp

    def __getattr__(self, name: str) -> Any:
        return getattr(self._xp, name)

    def clip(self, x: Array, low: Any, high: Any) -> Array:
        if low is not None:
            x = self._xp.where(x < low, self._xp.asarray(low, dtype=x.dtype), x)
        if high is not None:
            x = self._xp.where(x > high, self._xp.asarray(high, dtype=x.dtype), x)
        return x
