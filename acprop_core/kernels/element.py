"""What the kernels of all devices share: the step of one element, the numbers of a step, and the table of a kernel.

Plain functions, from which each compiler makes its own. This file imports no compiler.
"""

import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from acprop_core import rule

# What a compiler must know of the rule: the functions of a step, each before those that call it, and of its numbers.
OF_ELEMENTS = (
    *(rule._direction, rule._moments, rule._residual, rule._square, rule._average, rule._compensated),
    rule.step,
)
OF_NUMBERS = (
    *(rule.numbers_of, rule._raised),
    *(rule._bias_correction, rule._log, rule._limit, rule._dither, rule._widest_float),
)

# Rows of the table of a kernel, a column a parameter: addresses, the number of elements, a `rule.Decay`,
# the row of its hyperparameters, and whether its count is a float64 instead of a float32.
PARAM, GRAD, MU, NU, CARRY, COUNT, SIZE, DECAY, GROUP, WIDE = range(10)
ROWS = 10
"""Number of rows of the table."""

OPTIONS = (*rule.Hyperparameters._fields[:7], "maximize", "grad_scale")
"""Columns of the hyperparameters of a kernel: float64, and 0 for a `clip_exponent` of None."""


class Access(NamedTuple):
    """How compiled code reads and writes numbers of one dtype."""

    dtype: Any  # of the array as compiled code gets it
    load: Callable[[Any], Any]  # from an element to a float32 or float64
    store: Callable[[Any], Any]  # and back, to the nearest that the dtype has
    rounded: Callable[[Any], Any]  # both: to the nearest that the dtype has, as a float32 or float64


def element_of(flags: rule.Flags, own: Access, moments: Access, functions: Mapping[str, Any]) -> Callable[..., Any]:
    """Return the step of one element.

    Parameters
    ----------
    flags : rule.Flags
        Except `decay` and `scaled`, as for `cpu.kernel_of`.
    own, moments : Access
        How parameters and moments are read and written.
    functions : mapping
        The namespace of the rule, without `rounded`.

    Returns
    -------
    callable
        ``element(param, grad, mu, nu, carry, decay, numbers)`` takes and returns numbers as they are in memory: the new
        parameter, moments and carry. The carry is not read, and None is returned for it, if flags have no format.
    """
    load, store, rounded = own[1:]
    load_moment, store_moment = moments[1:3]
    namespace = types.ModuleType("scalars")
    vars(namespace).update(functions, rounded=rounded)
    centering, asynchronous, _, clipped, old_is_lighter1, old_is_lighter2, *_ = flags
    low: Any = None if flags.format is None else rule.Format._make(map(np.float32, flags.format))
    compensates = low is not None

    def element(param: Any, grad: Any, mu: Any, nu: Any, carry: Any, decay: Any, numbers: Any) -> Any:
        flags = rule.Flags(
            centering, asynchronous, decay, clipped, old_is_lighter1, old_is_lighter2, False, True, low, True
        )
        x = load(param)
        old = load(carry) if compensates else None
        update, new_mu, new_nu, new = rule.step(
            x, load(grad), load_moment(mu), load_moment(nu), old, numbers, flags, namespace
        )
        # the update is rounded before it is added, as in every framework
        result = store(x + rounded(update)), store_moment(new_mu), store_moment(new_nu)
        return (*result, store(new)) if compensates else (*result, None)

    return element


def maker_of(asynchronous: bool, compensates: bool, dtype: str, makers: Any) -> Callable[..., Any]:
    """Return a function that makes the numbers of a step.

    Parameters
    ----------
    asynchronous, compensates : bool
        Options of the step.
    dtype : {"float32", "float64"}
        Of the numbers. They are computed in float64.
    makers : namespace
        For `rule.numbers_of`.

    Returns
    -------
    callable
        ``numbers_at(options, i, count)`` takes row i of an array of `OPTIONS`, and returns `rule.Numbers`.
    """
    real: Any = getattr(np, dtype)
    smallest_normal = rule.SMALLEST_NORMAL[dtype]

    def numbers_at(options: Any, i: Any, count: Any) -> Any:
        o = options[i]
        centering: Any = None  # it is one of the flags, and so is the form of the decay
        hyper = rule.Hyperparameters(
            o[0], o[1], o[2], o[3], o[4], o[5], o[6], centering, asynchronous, compensates, False, o[7] != 0.0
        )
        k = rule.numbers_of(hyper, count, makers)
        return rule.Numbers(
            real(k.scale),
            real(k.offset),
            real(k.mean_scale),
            real(rule._raised(k.eps, smallest_normal)),
            real(k.limit),
            real(k.old_weight1),
            real(k.new_weight1),
            real(k.old_weight2),
            real(k.new_weight2),
            real(k.eps_root),
            real(k.rate),
            real(k.weight_decay),
            real(k.dither),
            real(o[8]),
        )

    return numbers_at
