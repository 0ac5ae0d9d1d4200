"""The arithmetic of ACProp: one step for one array, and the numbers that the step needs.

With two switches the same rule is AdaShift, AdaBelief or Adam: see `Hyperparameters`.

Written once. Every host runs these very functions: eagerly on the arrays of any library, traced by JAX and by torch,
or compiled by Numba. So they use operators and a few functions of a namespace ``xp``, write to no argument, and do no
arithmetic between two numbers inside `step`: `numbers_of` has computed all of them before.

A namespace must have, in addition to the operators of its arrays:

- for real arrays: ``sqrt``, and ``clip`` with a clip;
- for complex arrays: ``abs``, ``real``, ``conj``;
- with compensation: ``abs``, ``maximum``, ``round``, and ``rounded``, which rounds to the parameter's dtype and back;
- where decay rates are arrays: ``where``;
- for `numbers_of`, where the count or a hyperparameter is an array: ``astype``, ``expm1``, ``log``, ``where``,
  ``full_like``, ``ones_like``, ``result_type``, ``float64``, ``int32``.

This file depends on the standard library alone, so that it can be copied into other projects.

Read from the top: the arguments of a step (`Numbers`, `Flags`), `step` and its parts, then the numbers of a step.
The equations are from Zhuang et al. 2021, arXiv:2110.05454, algorithm 2, with g the gradient, m = mu and s = nu.
"""

import math
from enum import IntEnum
from typing import Any, NamedTuple

Array = Any  # an array of any library: the standard defines no common base class


class Centering(IntEnum):
    """Which first moment the second moment is centred on."""

    CURRENT = 0  # m_t: the paper, and its authors' code
    PREVIOUS = 1  # m_{t-1}: the code of optax.contrib.acprop
    NONE = 2  # none: the raw second moment, as in Adam and AdaShift


class Decay(IntEnum):
    """Where weight decay is added."""

    NONE = 0
    DECOUPLED = 1  # to the direction, next to the gradient's share
    L2 = 2  # to the gradient: the authors' training script


class Format(NamedTuple):
    """A 16-bit format, as compensation needs it.

    Attributes
    ----------
    unit : float
        2**-p for p significant bits.
    above : float
        Any number times this, rounded, is the next larger number.
    floor : float
        Keeps the last place of a carry so large that the format can hold it and it is not flushed to zero.
    half : float
        1/2. Next to a float32 scalar some compilers take a Python number for a float64.
    """

    unit: float
    above: float
    floor: float
    half: float


def _format(significant_bits: int, floor: float) -> Format:
    unit = 2.0**-significant_bits
    return Format(unit, 1.0 + 1.01 * unit, floor, 0.5)  # a bit more than half a last place of the smallest significand


# The floor is half the smallest parameter whose carry has a last place of its own. Below it, that place is 2**-24, the
# smallest number, in float16; and 2**-125 in bfloat16, because XLA flushes anything below 2**-126 to zero.
FORMATS = {"float16": _format(11, floor=2.0**-3), "bfloat16": _format(8, floor=2.0**-110)}

SMALLEST_NORMAL = {"float32": 2.0**-126, "float64": 2.0**-1022}
"""The smallest normal number of each dtype in which a step is computed, for `cast`."""


class Numbers(NamedTuple):
    """Numbers that change from step to step, made by `numbers_of`: Python floats, or 0-d arrays where they are traced.

    Attributes
    ----------
    scale, offset : float or 0-d array
        shat = nu * scale + offset: bias correction, and shat_0 = 1 without a branch.
    mean_scale : float or 0-d array
        mhat = mu * mean_scale: bias correction; used with a synchronous update.
    eps : float or 0-d array
        Added to the root.
    limit : float or 0-d array
        Largest ``|d|``; used with a clip.
    old_weight1, new_weight1 : float or 0-d array
        b1 and 1 - b1: the weights of the average that makes mu.
    old_weight2, new_weight2 : float or 0-d array
        b2 and 1 - b2: the weights of the average that makes nu.
    eps_root : float or 0-d array
        Added to the second moment.
    rate : float or 0-d array
        Minus the learning rate.
    weight_decay : float or 0-d array
        Multiplies the parameter.
    dither : float or 0-d array
        Within +-1/2; used with compensation.
    grad_scale : float or 0-d array
        Multiplies the gradient first; used where gradients are scaled.
    """

    scale: Any
    offset: Any
    mean_scale: Any
    eps: Any
    limit: Any
    old_weight1: Any
    new_weight1: Any
    old_weight2: Any
    new_weight2: Any
    eps_root: Any
    rate: Any
    weight_decay: Any
    dither: Any = 0.0
    grad_scale: Any = 1.0


class Flags(NamedTuple):
    """The options that stay from step to step: a program is specialised for them. Made by `flags_of`; hashable.

    Attributes
    ----------
    centering : Centering
        What the second moment is centred on.
    asynchronous : bool
        Whether the direction is made from ``g_t`` and ``s_{t-1}``, or else from ``m_t`` and ``s_t``.
    decay : Decay
        Whether this parameter decays, and in which form.
    clipped : bool
        Whether ``|d|`` is limited.
    old_is_lighter1, old_is_lighter2 : bool or None
        Whether b1, or b2, is below 1/2; None if only the arrays know.
    is_complex : bool
        Whether the arrays are complex.
    scaled : bool
        Whether gradients are multiplied by `grad_scale`.
    format : Format or None
        The format of a parameter that has a carry.
    rated : bool
        Whether the update is multiplied by the rate. A product with 1 would change infinite complex numbers.
    """

    centering: Any = Centering.CURRENT
    asynchronous: bool = True
    decay: Any = Decay.NONE
    clipped: bool = False
    old_is_lighter1: bool | None = False
    old_is_lighter2: bool | None = False
    is_complex: bool = False
    scaled: bool = False
    format: Format | None = None
    rated: bool = True


def step(
    param: Array, grad: Array, mu: Array, nu: Array, carry: Array | None, numbers: Numbers, flags: Flags, xp: Any
) -> tuple[Array, Array, Array, Array | None]:
    """Return u_t, m_t, s_t and c_t: one step for one array. No argument is written to.

    Parameters
    ----------
    param, grad, mu : array
        ``x_{t-1}``, ``g_t`` and ``m_{t-1}``, of one shape and dtype: float32, float64, complex64 or complex128. The
        values of `param` matter only with decay or compensation.
    nu : real array
        ``s_{t-1}``, in their shape and real dtype.
    carry : array or None
        ``c_{t-1}``, the amount that a 16-bit parameter has lost to rounding so far, in the dtype of `param`; None
        without compensation.
    numbers : Numbers
        The numbers of the step, `cast` to this dtype.
    flags : Flags
        The options of the step.
    xp : namespace
        The array library; see the top of this file.

    Returns
    -------
    update : array
        u_t, to be added to `param`, in the dtype of `grad`.
    mu : array
        ``m_t``, in the shape and dtype of ``m_{t-1}``.
    nu : real array
        s_t, likewise.
    carry : array or None
        c_t, likewise.

    Notes
    -----
    .. code-block:: text

        m_t = b1 m_{t-1} + (1 - b1) g_t
        r_t = g_t - m_t, g_t - m_{t-1} or g_t                     by centering
        s_t = b2 s_{t-1} + (1 - b2) |r_t|^2 + eps_root
        d_t = g_t / (sqrt(shat_{t-1}) + eps)                      asynchronous
        d_t = mhat_t / (sqrt(shat_t) + eps)                       synchronous
        u_t = -learning_rate (clip(d_t) + weight_decay x_{t-1})

    Zhuang et al. 2021, arXiv:2110.05454, algorithm 2; the clip and the compensation are ours. `Hyperparameters` names
    the optimizers that the other combinations are.

    Examples
    --------
    >>> import numpy as np
    >>> hyper = Hyperparameters(learning_rate=1e-3, clip_exponent=0.25)
    >>> numbers = cast(numbers_of(hyper, 0, np), np.float64, 2.0**-1022, np)
    >>> param, grad, zero = np.array([1.0, 1.0]), np.array([0.5, -2.0]), np.zeros(2)
    >>> update, *_ = step(param, grad, zero, zero, None, numbers, flags_of(hyper), np)
    >>> update
    array([-0.0005,  0.001 ])
    """
    if flags.scaled:
        grad = grad * numbers.grad_scale
    if flags.decay == Decay.L2:
        grad = grad + numbers.weight_decay * param
    if flags.asynchronous:  # from g_t and s_{t-1}, which do not depend on each other
        d = _direction(grad, nu, numbers, flags, xp)
        new_mu, new_nu = _moments(grad, mu, nu, numbers, flags, xp)
    else:  # from mhat_t and s_t
        new_mu, new_nu = _moments(grad, mu, nu, numbers, flags, xp)
        d = _direction(new_mu * numbers.mean_scale, new_nu, numbers, flags, xp)
    if flags.decay == Decay.DECOUPLED:
        d = d + numbers.weight_decay * param
    update = numbers.rate * d if flags.rated else d
    if carry is not None:
        update, carry = _compensated(update, param, carry, numbers, flags.format, xp)
    return update, new_mu, new_nu, carry


def _direction(numerator: Array, nu: Array, numbers: Numbers, flags: Flags, xp: Any) -> Array:
    """Return d_t, clipped: the numerator g_t or mhat_t over sqrt(shat) + eps, with shat from s_{t-1} or s_t."""
    d = numerator / (xp.sqrt(nu * numbers.scale + numbers.offset) + numbers.eps)
    if not flags.clipped:
        return d
    limit = numbers.limit
    if flags.is_complex:
        modulus = xp.abs(d)
        return d * (limit / xp.clip(modulus, limit, modulus + limit))  # 1 where |d| is below the limit
    return xp.clip(d, -limit, limit)


def _moments(grad: Array, mu: Array, nu: Array, numbers: Numbers, flags: Flags, xp: Any) -> tuple[Array, Array]:
    """Return m_t = b1 m_{t-1} + (1 - b1) g_t and s_t = b2 s_{t-1} + (1 - b2) |r_t|^2 + eps_root."""
    new_mu = _average(mu, grad, numbers.old_weight1, numbers.new_weight1, flags.old_is_lighter1, xp)
    square = _square(_residual(grad, mu, new_mu, flags), flags, xp)
    new_nu = _average(nu, square, numbers.old_weight2, numbers.new_weight2, flags.old_is_lighter2, xp)
    return new_mu, new_nu + numbers.eps_root


def _residual(grad: Array, mu: Array, new_mu: Array, flags: Flags) -> Array:
    """Return r_t: g_t - m_t, g_t - m_{t-1} or g_t."""
    if flags.centering == Centering.NONE:
        return grad
    return grad - (mu if flags.centering == Centering.PREVIOUS else new_mu)


def _square(residual: Array, flags: Flags, xp: Any) -> Array:
    # a function of its own, so that the residual is freed before the second average: 4 bytes a float32 parameter
    return xp.real(xp.conj(residual) * residual) if flags.is_complex else residual * residual


def _average(old: Array, new: Array, old_weight: Any, new_weight: Any, old_is_lighter: bool | None, xp: Any) -> Array:
    """Return old_weight * old + new_weight * new, for weights that add to one."""
    # Start at the heavier end and move towards the other by the lighter weight: the weights then add to one exactly,
    # however they are rounded. In b old + (1 - b) new with b2 = 0.999 rounded to float32 they miss one by 1.3e-8 a
    # step, and the average collects that error over 1/(1 - b2) steps.
    if old_is_lighter is None:  # ask the arrays
        lighter = old_weight < new_weight
        heavy, light = xp.where(lighter, new, old), xp.where(lighter, old, new)
        weight = xp.where(lighter, old_weight, new_weight)
        return heavy + weight * (light - heavy)
    if old_is_lighter:
        return new + old_weight * (old - new)
    return old + new_weight * (new - old)


def _compensated(update: Array, param: Array, carry: Array, numbers: Numbers, low: Any, xp: Any) -> tuple[Array, Array]:
    """Return v_t and c_t: the number to add to a 16-bit parameter x_{t-1} for an update u_t, and its rounding error.

    x_t, the sum of x_{t-1} and v_t in 16 bits, is next to x_{t-1} + c_{t-1} + u_t; the carry c_t is the difference.
    This is the compensated summation of Kahan 1965 (doi:10.1145/363707.363723), with one addition. An update below
    half the last place of the *carry* would be lost too, at every step. So the carry is rounded up as often as down:
    `dither` of a last place is added, then the sum is rounded to a whole multiple of it. This last place is the one
    that the carry has where it is largest.
    """
    wanted = carry + update
    v = xp.rounded(xp.rounded(param + wanted) - param)
    new = xp.rounded(param + v)
    lost = wanted - (new - param)
    # Half the parameter, so that the next larger number does not overflow. Where almost nothing is left of the
    # parameter, the carry itself is larger.
    half = xp.rounded(xp.maximum(low.half * xp.abs(new), xp.abs(lost)) + low.floor)
    place = (xp.rounded(low.above * half) - half) * low.unit
    return v, place * xp.round(lost / place + numbers.dither)


class Hyperparameters(NamedTuple):
    """The options from which the numbers and flags of a step are made. They are not checked.

    Two of them make the four optimizers that the paper compares:

    ============ ================ ==================================================
    asynchronous centering        optimizer
    ============ ================ ==================================================
    True         "current"        ACProp (the default)
    True         "none"           AdaShift with n = 1
    False        "current"        AdaBelief (also of optax)
    False        "none"           Adam; AdamW with decoupled weight decay
    ============ ================ ==================================================

    Attributes
    ----------
    learning_rate : float or 0-d array
        Of this step: a schedule has been called.
    b1, b2 : float or 0-d array
        Decay rates of the two moments, in [0, 1).
    eps, eps_root : float or 0-d array
        Added to the root of the second moment, and to the second moment at every step.
    weight_decay : float or 0-d array
        Factor of weight decay.
    clip_exponent : float, 0-d array or None
        p: at step t no element of the direction exceeds t**p; None for no clip.
    centering : {"current", "previous", "none"}
        What the second moment is centred on: ``m_t``, ``m_{t-1}`` or 0.
    asynchronous : bool
        Whether the direction is made from ``g_t`` and ``s_{t-1}``, or else from ``mhat_t`` and ``shat_t``.
    compensate : bool
        Whether 16-bit parameters keep a carry.
    l2 : bool
        Whether weight decay is added to the gradient, not to the direction.
    maximize : bool
        Whether to climb instead of descending.
    """

    learning_rate: Any = 1e-3
    b1: Any = 0.9
    b2: Any = 0.999
    eps: Any = 1e-16
    eps_root: Any = 1e-16
    weight_decay: Any = 0.0
    clip_exponent: Any = None
    centering: str = "current"
    asynchronous: bool = True
    compensate: bool = False
    l2: bool = False
    maximize: bool = False


def flags_of(hyper: Hyperparameters) -> Flags:
    """Return the flags of real float32 or float64 arrays.

    Parameters
    ----------
    hyper : Hyperparameters
        The options.

    Returns
    -------
    Flags
        For other arrays replace `is_complex` or `format`, for a parameter without decay `decay`.
    """
    decay = (Decay.L2 if hyper.l2 else Decay.DECOUPLED) if has_decay(hyper.weight_decay) else Decay.NONE
    return Flags(
        centering=Centering[hyper.centering.upper()],
        asynchronous=hyper.asynchronous,
        decay=decay,
        clipped=hyper.clip_exponent is not None,
        old_is_lighter1=hyper.b1 < 0.5 if isinstance(hyper.b1, float) else None,
        old_is_lighter2=hyper.b2 < 0.5 if isinstance(hyper.b2, float) else None,
    )


def has_decay(weight_decay: Any) -> bool:
    """Return whether there may be weight decay.

    Parameters
    ----------
    weight_decay : float, 0-d array or callable
        The option. An array is not read, and a schedule is not called.

    Returns
    -------
    bool
        False only if it is the number 0.
    """
    return not (isinstance(weight_decay, float) and weight_decay == 0.0)


def numbers_of(hyper: Hyperparameters, count: Any, xp: Any) -> Numbers:
    """Return the numbers of step ``count + 1``.

    A Python `count` and Python hyperparameters give Python floats, computed in float64. An array `count` or array
    hyperparameters give 0-d arrays in the widest float that `xp` has; `cast` makes them fit an array's dtype.

    Parameters
    ----------
    hyper : Hyperparameters
        The options.
    count : int or 0-d integer array
        Number of steps done before this one.
    xp : namespace
        The array library; used for arrays only.

    Returns
    -------
    Numbers
        Python floats and 0-d arrays.
    """
    before = count if isinstance(count, int) else xp.astype(count, _widest_float(xp))  # a float: its sum cannot wrap
    scale, offset = _bias_correction(hyper.b2, before if hyper.asynchronous else before + 1, xp)
    rate, weight_decay = -hyper.learning_rate, hyper.weight_decay
    if hyper.maximize:
        # The moments of -g are the moments of g with mu negated. So only the direction differs, and g is not copied.
        rate, weight_decay = -rate, -weight_decay
    return Numbers(
        scale=scale,
        offset=offset,
        mean_scale=1.0 if hyper.asynchronous else _bias_correction(hyper.b1, before + 1, xp)[0],
        eps=hyper.eps,
        limit=math.inf if hyper.clip_exponent is None else _limit(hyper.clip_exponent, before + 1),
        old_weight1=hyper.b1,
        new_weight1=1.0 - hyper.b1,
        old_weight2=hyper.b2,
        new_weight2=1.0 - hyper.b2,
        eps_root=hyper.eps_root,
        rate=rate,
        weight_decay=weight_decay,
        dither=_dither(count, xp) if hyper.compensate else 0.0,
        grad_scale=1.0,
    )


def table_of(hyper: Hyperparameters, steps: int) -> dict[str, list[float]]:
    """Return numbers of the first steps, for hosts that cannot compute them in float64 where they need them.

    Parameters
    ----------
    hyper : Hyperparameters
        The options. `b1`, `b2` and `clip_exponent` must not be arrays.
    steps : int
        The number of steps.

    Returns
    -------
    dict of lists
        The values of `numbers_of` for each count below `steps`, by their names: `scale`, with a synchronous update
        `mean_scale`, with a clip `limit`.

    Examples
    --------
    >>> table_of(Hyperparameters(clip_exponent=0.5), 4)["limit"]
    [1.0, 1.4142135623730951, 1.7320508075688772, 2.0]
    """
    counts, after = range(steps), range(1, steps + 1)
    table = {"scale": [_bias_correction(hyper.b2, n, None)[0] for n in (counts if hyper.asynchronous else after)]}
    if not hyper.asynchronous:
        table["mean_scale"] = [_bias_correction(hyper.b1, n, None)[0] for n in after]
    if hyper.clip_exponent is not None:
        table["limit"] = [_limit(hyper.clip_exponent, n) for n in after]
    return table


def cast(numbers: Numbers, real_dtype: Any, smallest_normal: float, xp: Any) -> Numbers:
    """Return `numbers` for arrays of one dtype: 0-d arrays become `real_dtype`, so that they never widen an array.

    Parameters
    ----------
    numbers : Numbers
        From `numbers_of`.
    real_dtype : dtype
        Dtype of the second moment, float32 or float64, as `xp` has it.
    smallest_normal : float
        The smallest normal number of `real_dtype`, which replaces a smaller eps. Rounding removes it from the sum
        with the square root of any nonzero number, and 0 / (sqrt(0) + eps) is 0.
    xp : namespace
        The array library; used for 0-d arrays only.

    Returns
    -------
    Numbers
        Python floats are kept.
    """

    def fit(x: Any) -> Any:
        # Ask for the type first: inside torch.compile a float may be a symbol, which cannot be asked for a dtype.
        return x if type(x) in (float, int) or x.dtype == real_dtype else xp.astype(x, real_dtype)

    numbers = Numbers(*map(fit, numbers))
    eps = numbers.eps
    if type(eps) in (float, int):
        return replace(numbers, "eps", _raised(eps, smallest_normal))
    return replace(numbers, "eps", xp.where(eps < smallest_normal, xp.full_like(eps, smallest_normal), eps))


def replace(values: Any, name: str, new: Any) -> Any:
    """Return numbers or flags with one changed, as `_replace`, which torch's compiler takes only in new versions.

    Parameters
    ----------
    values : Numbers or Flags
        What to copy.
    name : str
        Which to change.
    new : any
        Its new value.

    Returns
    -------
    Numbers or Flags
        Of the same type.
    """
    i = _INDICES[name]
    return type(values)(*[new if j == i else old for j, old in enumerate(values)])


_INDICES = {name: i for cls in (Numbers, Flags) for i, name in enumerate(cls._fields)}  # they share no name


def _raised(eps: float, smallest_normal: float) -> float:
    # a function of its own, because Numba, which compiles this for Python numbers, cannot compile `cast`
    return max(eps, smallest_normal)


def _bias_correction(b: Any, steps: Any, xp: Any) -> tuple[Any, Any]:
    """Return 1 / (1 - b^steps) and 0, or 0 and 1 before the first step."""
    # 1 - b^steps as -expm1(steps log b), because the plain form cancels: by 1.4e-3 in float32 at b = 0.99999.
    # For 0 steps use 1 and a numerator of 0, so that value and derivative stay free of 1/0.
    is_known = isinstance(steps, int)
    first = 1.0 * (steps == 0) if is_known else xp.astype(steps == 0, _widest_float(xp))
    exponent = (steps + first) * _log(b, xp)
    minus_rest = math.expm1(exponent) if is_known and isinstance(b, float) else xp.expm1(exponent)
    return (first - 1.0) / minus_rest, first


def _log(b: Any, xp: Any) -> Any:
    if isinstance(b, float):
        return math.log(b) if b > 0.0 else -math.inf
    b = xp.astype(b, _widest_float(xp))
    zero = b == 0  # kept out of the logarithm and its derivative
    return xp.where(zero, xp.full_like(b, -math.inf), xp.log(xp.where(zero, xp.ones_like(b), b)))


def _limit(exponent: Any, step: Any) -> Any:
    if isinstance(step, int):
        # a limit larger than float32's range has no effect
        return float(step) ** exponent if exponent * math.log2(step) < 127.0 else 2.0**127
    return step**exponent


def _dither(count: Any, xp: Any) -> Any:
    # Multiples of the golden ratio, because any few consecutive ones are spread evenly. There are 4096 of them, and 256
    # between each two, a new one each time round. Both start in the middle, so that a count that stops at 2**24, as in
    # float32, stops at nearly 0. Computed in integers of no more bits than float32 has: the same on any device.
    n = count if isinstance(count, int) else xp.astype(count, xp.int32)
    coarse = (n % 4096 * 2531 + 2048) % 4096
    fine = (n // 4096 % 256 * 159 + 128) % 256
    if not isinstance(count, int):
        coarse, fine = xp.astype(coarse, _widest_float(xp)), xp.astype(fine, _widest_float(xp))
    return (coarse + (fine + 0.5) / 256.0) / 4096.0 - 0.5


def _widest_float(xp: Any) -> Any:
    """Return float64, or the dtype that the library has instead (float32 in JAX without 64-bit mode)."""
    return xp.result_type(xp.float64)
