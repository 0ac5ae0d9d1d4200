"""Dtypes: their names, the dtypes of the moments, and the casts around `rule.step`."""

from collections.abc import Callable
from typing import Any

from acprop_core import rule
from acprop_core._quirks import Array, Rounding, as_array, library, standard_namespace

SIXTEEN_BITS = tuple(rule.FORMATS)
FLOATS = (*SIXTEEN_BITS, "float32", "float64")
REAL_OF = {"complex64": "float32", "complex128": "float64"}
COMPLEX_OF = {real: name for name, real in REAL_OF.items()}
KINDS = (*FLOATS, *REAL_OF)


def dtype_name(dtype: Any) -> str:
    """Return the standard's name of a dtype of any library, ``"float32"``; a name is returned as it is."""
    # NumPy computes `name` in Python, in 2 microseconds; the name of the type of its scalars is there
    if (name := getattr(getattr(dtype, "type", None), "__name__", None)) in KINDS:
        return str(name)
    name = getattr(dtype, "name", None) or getattr(dtype, "__name__", None) or str(dtype)
    return str(name).rpartition(".")[2].lower()


def moment_dtypes(param: str, moment_dtype: str | None = None) -> tuple[str | None, str]:
    """Return the names of the dtypes of mu and nu for a parameter dtype; None if there is no such complex dtype."""
    real = moment_dtype or ("float32" if param in SIXTEEN_BITS else REAL_OF.get(param, param))
    return (COMPLEX_OF.get(real) if param in REAL_OF else real), real


def moment_dtypes_of(param: Array, moment_dtype: str | None, xp: Any) -> tuple[Any, Any]:
    """Return the dtypes of mu and nu for a parameter; refuse a `moment_dtype` that the library does not have."""
    kind = dtype_name(param.dtype)
    mu, nu = moment_dtypes(kind, moment_dtype)
    if mu is None or not hasattr(xp, mu):
        raise TypeError(
            f"moment_dtype is {nu!r}, in which {library(xp)} cannot keep the moments of {kind} parameters; "
            "use a wider one"
        )
    return getattr(xp, mu), getattr(xp, nu)


def step_dtypes(mu: str, param: str) -> tuple[str, bool]:
    """Return the name of the real dtype in which a step is computed, and whether it is complex."""
    kinds = (mu, param)
    real = "float64" if any(kind in ("float64", "complex128") for kind in kinds) else "float32"
    return real, any(kind in REAL_OF for kind in kinds)


def is_compensated(param: Any) -> bool:
    """Return whether this parameter has 16 bits, so that `compensate` keeps a carry for it."""
    return param is not None and dtype_name(param.dtype) in SIXTEEN_BITS


def as_dtype(x: Array, dtype: Any, xp: Any) -> Array:
    """Return `x` with this dtype; `x` itself where it has it already."""
    return x if x.dtype == dtype else xp.astype(x, dtype)


def restore(x: Array, other: Array, xp: Any) -> Array:
    """Return `x` as an array of the dtype of `other`."""
    return as_array(as_dtype(x, other.dtype, xp), xp)


class Step:
    """One step of an optimizer, for one row at a time: `rule.step` with the casts around it.

    It is computed in float32, or in float64 where parameter or moments have that. Each result has the dtype of the
    array that it replaces, and the update the dtype of the parameter.

    Parameters
    ----------
    numbers : rule.Numbers
        From `rule.numbers_of`.
    flags : rule.Flags
        From `rule.flags_of`.
    xp : namespace
        The array library of the rows.

    Examples
    --------
    >>> import numpy as np
    >>> from acprop_core.adapt import Row
    >>> hyper = rule.Hyperparameters(learning_rate=0.5)
    >>> step = Step(rule.numbers_of(hyper, 0, np), rule.flags_of(hyper), np)
    >>> one, zero = np.ones(2, np.float16), np.zeros(2, np.float32)
    >>> step(Row(one, one, zero, zero))[0]
    array([-0.5, -0.5], dtype=float16)
    """

    def __init__(self, numbers: rule.Numbers, flags: rule.Flags, xp: Any) -> None:
        self.numbers = numbers
        self.flags = flags
        self._xp = standard_namespace(xp)
        self._cast: dict[Any, tuple[rule.Numbers, rule.Flags, Any, Any]] = {}

    @property
    def learning_rate(self) -> Any:
        """The learning rate of this step: a number or a 0-d array."""
        return -self.numbers.rate

    def map_numbers(self, f: Callable[[Any], Any]) -> "Step":
        """Return this step with `f` applied to each of its numbers."""
        return Step(rule.Numbers(*map(f, self.numbers)), self.flags, self._xp)

    def without_rate(self) -> "Step":
        """Return this step without its learning rate: the update is d_t, for hosts that apply their own rate."""
        return Step(self.numbers, rule.replace(self.flags, "rated", False), self._xp)

    def with_grad_scale(self, scale: Any) -> "Step":
        """Return this step for gradients that are multiplied by a number first."""
        return Step(rule.replace(self.numbers, "grad_scale", scale), rule.replace(self.flags, "scaled", True), self._xp)

    def __call__(self, row: Any, decays: bool = True) -> tuple[Array, Array, Array, Array | None]:
        """Return u_t, m_t, s_t and c_t, the last None without a carry.

        Parameters
        ----------
        row : Row
            Arrays. The values of `param` matter only with decay or a carry.
        decays : bool
            Whether this parameter has weight decay, if there is any.
        """
        param, grad, mu, nu, carry = row
        if grad is None:
            return None, mu, nu, carry
        param = grad if param is None else param  # only its dtype matters then
        xp: Any = self._xp
        numbers, flags, dtype, real_dtype = self.cast_for(mu.dtype, param.dtype, decays, carry is not None)
        wide_param, wide_carry = param, None
        if flags.decay != rule.Decay.NONE or carry is not None:
            wide_param = as_dtype(param, dtype, xp)
        if carry is not None:
            wide_carry = as_dtype(carry, dtype, xp)
            xp = Rounding(xp, lambda x: as_dtype(as_dtype(x, carry.dtype, self._xp), dtype, self._xp))
        update, new_mu, new_nu, new_carry = rule.step(
            wide_param,
            as_dtype(grad, dtype, xp),
            as_dtype(mu, dtype, xp),
            as_dtype(nu, real_dtype, xp),
            wide_carry,
            numbers,
            flags,
            xp,
        )
        return (
            restore(update, param, xp),
            restore(new_mu, mu, xp),
            restore(new_nu, nu, xp),
            None if carry is None else restore(new_carry, carry, xp),
        )

    def cast_for(
        self, mu_dtype: Any, param_dtype: Any, decays: bool = True, has_carry: bool = False
    ) -> tuple[rule.Numbers, rule.Flags, Any, Any]:
        """Return numbers and flags for arrays of these dtypes, and the dtype and real dtype in which to compute."""
        key = mu_dtype, param_dtype  # not their names, because to find these takes as long as an operation
        if key not in self._cast:
            real, is_complex = step_dtypes(dtype_name(mu_dtype), dtype_name(param_dtype))
            real_dtype = getattr(self._xp, real)
            dtype = getattr(self._xp, COMPLEX_OF[real]) if is_complex else real_dtype
            numbers = rule.cast(self.numbers, real_dtype, rule.SMALLEST_NORMAL[real], self._xp)
            flags = rule.replace(self.flags, "is_complex", True) if is_complex else self.flags
            self._cast[key] = numbers, flags, dtype, real_dtype
        numbers, flags, dtype, real_dtype = self._cast[key]
        if flags.decay and not decays:
            flags = rule.replace(flags, "decay", rule.Decay.NONE)
        if has_carry:
            flags = rule.replace(flags, "format", rule.FORMATS[dtype_name(param_dtype)])
        return numbers, flags, dtype, real_dtype
