"""The mathematics of ACProp, for one array and one step.

Written once: NumPy, CuPy, PyTorch, JAX and every other array library run these very functions, eagerly or through
their own compilers. Hence the style: operators and a few standard functions of the namespace ``xp``, nothing written in
place, and no arithmetic between two numbers, because everything that is a number of the step stands ready in
``Coefficients``.

Read from the top: the two halves of the rule, the rule, what is added to the parameter, the other form of weight decay,
what 16-bit parameters lose, and the numbers of a step.
Equations are those of Zhuang et al. 2021, arXiv:2110.05454, algorithm 2, with g the gradient, m = mu and s = nu.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

Array = Any  # an array of any library: the standard defines no common base class


class Coefficients(NamedTuple):
    """The numbers of one step: Python floats, or 0-d arrays where they are traced; made by `coefficients`.

    Attributes
    ----------
    scale, offset : float or 0-d array
        shat = nu * scale + offset: bias correction, and shat_0 = 1 without a branch.
    eps : float or 0-d array
        Added to the root.
    limit : float, 0-d array or None
        Largest ``|d|``.
    weight1, weight2 : float or 0-d array
        The lighter weight of the average that makes mu, and of that which makes nu.
    old_is_lighter1, old_is_lighter2 : bool or 0-d array
        Whether that is the weight of the older value (b < 1/2).
    eps_root : float or 0-d array
        Added to the second moment.
    from_previous : bool
        Whether residuals are those from the mean before the step, ``centering="previous"``.
    is_complex : bool
        Whether the arrays are complex.
    rate : float or 0-d array
        Minus the learning rate.
    weight_decay : float or 0-d array
        Decoupled decay.
    dither : float, 0-d array or None
        Within +-1/2; None without compensation.
    """

    scale: Any
    offset: Any
    eps: Any
    limit: Any
    weight1: Any
    old_is_lighter1: Any
    weight2: Any
    old_is_lighter2: Any
    eps_root: Any
    from_previous: bool
    is_complex: bool
    rate: Any
    weight_decay: Any
    dither: Any


NUMBERS = ("scale", "offset", "eps", "limit", "weight1", "weight2", "eps_root", "rate", "weight_decay", "dither")


class Format(NamedTuple):
    """A 16-bit format of numbers; all but `rounded` in the dtype in which the rule runs."""

    rounded: Callable[[Array], Array]  # to this format, and back
    unit: float  # 2**-p for p significant bits
    above: float  # times this, rounded, any number becomes the next larger one
    floor: float  # so that the last place of a carry is never less than the format has, or is flushed to zero
    half: float  # 1/2: beside a float32 scalar a Python number would be a float64 to some compilers


def direction(grad: Array, nu: Array, k: Coefficients, xp: Any) -> Array:
    """Return d_t = g_t / (sqrt(shat_{t-1}) + eps), clipped to ``|d_t| <= k.limit``.

    Parameters
    ----------
    grad : array
        g_t, of any shape, real or complex.
    nu : real array
        s_{t-1}, in the shape of `grad` and its real dtype.
    k : Coefficients
        The numbers of the step.
    xp : namespace
        The array library of both.

    Returns
    -------
    array
        d_t, in the shape and dtype of `grad`.
    """
    d = grad / (xp.sqrt(nu * k.scale + k.offset) + k.eps)
    if k.limit is None:
        return d
    if k.is_complex:
        modulus = xp.abs(d)
        return d * (k.limit / xp.clip(modulus, k.limit, modulus + k.limit))  # 1 where |d| is below the limit
    return xp.clip(d, -k.limit, k.limit)


def moments(grad: Array, mu: Array, nu: Array, k: Coefficients, xp: Any) -> tuple[Array, Array]:
    """Return m_t = b1 m_{t-1} + (1 - b1) g_t and ``s_t = b2 s_{t-1} + (1 - b2) |g_t - m_t|^2 + eps_root``.

    Parameters
    ----------
    grad, mu : array
        g_t and m_{t-1}, of one shape and dtype.
    nu : real array
        s_{t-1}, in their shape and real dtype.
    k : Coefficients
        The numbers of the step.
    xp : namespace
        The array library of all three.

    Returns
    -------
    mu : array
        m_t, in the shape and dtype of the one before.
    nu : real array
        s_t, likewise.
    """
    new_mu = _average(mu, grad, k.weight1, k.old_is_lighter1, xp)
    residual = grad - (mu if k.from_previous else new_mu)
    square = xp.real(xp.conj(residual) * residual) if k.is_complex else residual * residual
    return new_mu, _average(nu, square, k.weight2, k.old_is_lighter2, xp) + k.eps_root


def rule(grad: Array, mu: Array, nu: Array, k: Coefficients, xp: Any) -> tuple[Array, Array, Array]:
    """Return d_t, m_t and s_t from g_t, m_{t-1} and s_{t-1}: one step of ACProp for one array.

    Parameters
    ----------
    grad, mu : array
        g_t and m_{t-1}, of one shape and dtype: float32, float64, complex64 or complex128.
    nu : real array
        s_{t-1}, in their shape and real dtype.
    k : Coefficients
        The numbers of the step, `cast` to this dtype.
    xp : namespace
        The array library of all three.

    Returns
    -------
    d : array
        d_t, in the shape and dtype of `grad`; no argument is written to.
    mu : array
        m_t, in the shape and dtype of the one before.
    nu : real array
        s_t, likewise.

    Notes
    -----
    Zhuang et al. 2021, arXiv:2110.05454, algorithm 2; the clip is ours.

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> import numpy as np
    >>> hyper = SimpleNamespace(
    ...     b1=0.9, b2=0.999, eps=1e-16, eps_root=1e-16, weight_decay=0.0, clip_exponent=0.25, centering="current",
    ...     compensate=False,
    ... )
    >>> k = cast(coefficients(hyper, 0, 1e-3, np), np.float64, False, 2.0**-1022, np)
    >>> d, mu, nu = rule(np.array([0.5, -2.0]), np.zeros(2), np.zeros(2), k, np)
    >>> d, displacement(d, None, k)
    (array([ 0.5, -1. ]), array([-0.0005,  0.001 ]))
    """
    new_mu, new_nu = moments(grad, mu, nu, k, xp)
    return direction(grad, nu, k, xp), new_mu, new_nu


def displacement(d: Array, param: Array | None, k: Coefficients) -> Array:
    """Return u_t = -lr_t (d_t + weight_decay x_{t-1}), what is added to the parameter.

    Parameters
    ----------
    d : array
        d_t, from `rule` or `direction`.
    param : array or None
        x_{t-1}, in the shape and dtype of `d`; None for no decay.
    k : Coefficients
        The numbers of the step.

    Returns
    -------
    array
        u_t, in the shape and dtype of `d`.
    """
    return k.rate * (d if param is None else d + k.weight_decay * param)


def regularized(grad: Array, param: Array, k: Coefficients) -> Array:
    """Return g_t + weight_decay x_{t-1}: decay as L2 regularization, the form that the authors' training script has.

    Parameters
    ----------
    grad, param : array
        g_t and x_{t-1}, of one shape and dtype.
    k : Coefficients
        The numbers of the step.

    Returns
    -------
    array
        What takes the place of the gradient.
    """
    return grad + k.weight_decay * param


def compensated(
    update: Array, param: Array, carry: Array, k: Coefficients, low: Format, xp: Any
) -> tuple[Array, Array]:
    """Return (v_t, c_t): what to add to a 16-bit parameter x_{t-1} for an update u_t, and what is then missing.

    x_t, what adding v_t in 16 bits gives, is next to x_{t-1} + c_{t-1} + u_t; the carry c_t is the difference. This is
    the compensated summation of Kahan 1965 (doi:10.1145/363707.363723), with one thing added: an update below half the
    last place of the *carry* would be lost in its turn, and alike at every step. So the carry is rounded up as often as
    down: to whole multiples of the last place that it has where it is largest, after `k.dither` of such a place.
    """
    wanted = carry + update
    v = low.rounded(low.rounded(param + wanted) - param)
    new = low.rounded(param + v)
    lost = wanted - (new - param)
    # half the parameter, lest the next larger number overflows; where almost nothing is left of it, the carry itself
    half = low.rounded(xp.maximum(low.half * xp.abs(new), xp.abs(lost)) + low.floor)
    place = (low.rounded(low.above * half) - half) * low.unit
    return v, place * xp.round(lost / place + k.dither)


def _average(old: Array, new: Array, weight: Any, old_is_lighter: Any, xp: Any) -> Array:
    # Start at the heavier end and go the lighter weight's way: the two weights then add to one exactly, whatever the
    # rounding of `weight`. In b old + (1 - b) new with b2 = 0.999 rounded to float32 they miss one by 1.3e-8 a step,
    # which the average collects for 1/(1 - b2) steps.
    if isinstance(old_is_lighter, bool):
        heavy, light = (new, old) if old_is_lighter else (old, new)
    else:
        heavy, light = xp.where(old_is_lighter, new, old), xp.where(old_is_lighter, old, new)
    return heavy + weight * (light - heavy)


def coefficients(optimizer: Any, count: Any, learning_rate: Any, xp: Any) -> Coefficients:
    """Return the numbers of step ``count + 1`` of `optimizer`.

    A Python `count` and Python hyperparameters give Python floats, computed in float64. An array `count` or array
    hyperparameters give 0-d arrays in the widest float that `xp` has; `cast` fits them to an array's dtype.

    Parameters
    ----------
    optimizer : object
        Has the attributes `b1`, `b2`, `eps`, `eps_root`, `weight_decay`, `clip_exponent`, `centering` and `compensate`,
        as an `acprop_core.ACProp` does. They are not checked.
    count : int or 0-d integer array
        Number of steps done before this one.
    learning_rate : float or 0-d array
        That of this step.
    xp : namespace
        The array library; of use for arrays only.

    Returns
    -------
    Coefficients
        For real arrays; `cast` says so if they are complex.
    """
    scale, offset = _bias_correction(optimizer.b2, count, xp)
    weight1, old_is_lighter1 = _lighter_weight(optimizer.b1, xp)
    weight2, old_is_lighter2 = _lighter_weight(optimizer.b2, xp)
    return Coefficients(
        scale=scale,
        offset=offset,
        eps=optimizer.eps,
        limit=_limit(optimizer.clip_exponent, count, xp),
        weight1=weight1,
        old_is_lighter1=old_is_lighter1,
        weight2=weight2,
        old_is_lighter2=old_is_lighter2,
        eps_root=optimizer.eps_root,
        from_previous=optimizer.centering == "previous",
        is_complex=False,
        rate=-learning_rate,
        weight_decay=optimizer.weight_decay,
        dither=_dither(count, xp) if optimizer.compensate else None,
    )


def cast(k: Coefficients, real_dtype: Any, is_complex: bool, tiny: float, xp: Any) -> Coefficients:
    """Return `k` for arrays of one dtype: its 0-d arrays become `real_dtype`, so that they never widen an array.

    Parameters
    ----------
    k : Coefficients
        From `coefficients`.
    real_dtype : dtype
        Dtype of the second moment, float32 or float64, as `xp` has it.
    is_complex : bool
        Whether gradient and first moment are complex.
    tiny : float
        The smallest normal number of `real_dtype`, which takes the place of a smaller eps. It is invisible beside the
        square root of any nonzero number, and makes 0 / (sqrt(0) + eps) be 0.
    xp : namespace
        The array library; of use for 0-d arrays only.

    Returns
    -------
    Coefficients
        With Python floats as they were.
    """
    # by exclusion: inside torch.compile a float may be a symbol, which cannot be asked whether it has a dtype
    numbers = {name: x for name in NUMBERS if type(x := getattr(k, name)) not in (float, int, type(None))}
    numbers = {name: as_dtype(x, real_dtype, xp) for name, x in numbers.items()}
    if "eps" in numbers:
        numbers["eps"] = xp.where(numbers["eps"] < tiny, xp.full_like(numbers["eps"], tiny), numbers["eps"])
    else:
        numbers["eps"] = max(k.eps, tiny)
    return k._replace(is_complex=is_complex, **numbers)


def as_dtype(x: Array, dtype: Any, xp: Any) -> Array:
    """Return `x` with this dtype; `x` itself where it has it already."""
    return x if x.dtype == dtype else xp.astype(x, dtype)


def _lighter_weight(b: Any, xp: Any) -> tuple[Any, Any]:
    old_is_lighter = b < 0.5
    if isinstance(b, float):
        return (b if old_is_lighter else 1.0 - b), old_is_lighter
    return xp.where(old_is_lighter, b, 1.0 - b), old_is_lighter


def _bias_correction(b2: Any, count: Any, xp: Any) -> tuple[Any, Any]:
    # 1 - b2^count as -expm1(count log b2): the plain form cancels, by 1.4e-3 in float32 at b2 = 0.99999.
    # Count 0 takes n = 1 and a numerator of 0, so that neither value nor derivative sees 1/0.
    if isinstance(count, int):
        first = float(count == 0)
        n = count + first
        if isinstance(b2, float):
            return (first - 1.0) / math.expm1(n * _log(b2, xp)), first
    else:
        first = xp.astype(count == 0, _widest_float(xp))
        n = xp.astype(count, _widest_float(xp)) + first
    return (first - 1.0) / xp.expm1(n * _log(b2, xp)), first


def _log(b2: Any, xp: Any) -> Any:
    if isinstance(b2, float):
        return math.log(b2) if b2 > 0.0 else -math.inf
    b2 = xp.astype(b2, _widest_float(xp))
    zero = b2 == 0  # log must not see it, nor its derivative
    return xp.where(zero, xp.full_like(b2, -math.inf), xp.log(xp.where(zero, xp.ones_like(b2), b2)))


def _limit(exponent: float | None, count: Any, xp: Any) -> Any:
    if exponent is None:
        return None
    if isinstance(count, int):
        # more than float32 can hold is no limit any more
        return float(count + 1) ** exponent if exponent * math.log2(count + 1) < 127.0 else 2.0**127
    return (xp.astype(count, _widest_float(xp)) + 1.0) ** exponent


def _dither(count: Any, xp: Any) -> Any:
    # Multiples of the golden ratio, of which any few that follow each other are spread evenly: 4096 of them, and
    # between these 256, a new one each time round; both from the middle on, so that a count that stops at 2**24, as one
    # in float32 does, stops at nearly 0. In integers, and in no more bits than float32 has: the same on any device.
    if not isinstance(count, int):
        count = xp.astype(count, xp.int32)
    coarse = (count % 4096 * 2531 + 2048) % 4096
    fine = (count // 4096 % 256 * 159 + 128) % 256
    if not isinstance(count, int):
        coarse, fine = (xp.astype(n, _widest_float(xp)) for n in (coarse, fine))
    return (coarse + (fine + 0.5) / 256.0) / 4096.0 - 0.5


def _widest_float(xp: Any) -> Any:
    """Return float64, or what the library makes of it (float32 in JAX without 64-bit mode)."""
    return xp.result_type(xp.float64)
