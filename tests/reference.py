"""The oracle: ACProp and its corners, element by element, in 50-digit arithmetic.

It shares no code with acprop_core. It follows the equations in their textbook form,
which in 50 digits is exact enough to be called the truth. With each number it carries
how ill-conditioned that number is: where g - m_t cancels, no arithmetic of the working
precision could do better, and an error bound must say so.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import mpmath

mp = mpmath.mp.clone()
mp.dps = 50


class Element(NamedTuple):
    """One element after one step: exact numbers, and the scales of their errors."""

    update: Any
    param: Any
    mu: Any
    nu: Any
    # largest lr (|d| + |decay x|) so far, times the conditioning of the denominator
    update_scale: Any
    mu_scale: Any  # largest |mu| so far
    # nu, and what rounding g and m_t to machine epsilon makes of g - m_t
    nu_scale: Any


@dataclass(frozen=True)
class Hyperparameters:
    """The options of ACProp in plain numbers; `decay` is the element's weight decay."""

    learning_rate: float | Callable[[int], float]
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-16
    eps_root: float = 1e-16
    decay: float | Callable[[int], float] = 0.0
    clip_exponent: float | None = None
    centering: str = "current"
    asynchronous: bool = True


def trajectory(
    h: Hyperparameters,
    grads: Sequence[complex],
    params: Sequence[complex],
    epsilon: float,
) -> list[Element]:
    """Return what ACProp does to one element, step by step.

    Given are its gradients and its values before each step. `epsilon` is the machine
    epsilon of the arithmetic under test; it enters the scales, not the numbers.
    """
    b1, b2, eps, eps_root = map(mp.mpf, (h.b1, h.b2, h.eps, h.eps_root))
    m = mp.mpf(0)
    s = mp.mpf(0)
    largest_update = largest_m = largest_input = mp.mpf(0)
    first_order = second_order = mp.mpf(0)
    elements = []
    for t, (g, x) in enumerate(zip(grads, params, strict=True), start=1):
        g, x = mp.mpmathify(g), mp.mpmathify(x)

        m_before, s_before = m, s
        before = 1 if s == 0 else 1 + (first_order + second_order) / (2 * s)

        m = b1 * m + (1 - b1) * g
        e = {"current": g - m, "previous": g - m_before, "none": g}[h.centering]
        s = b2 * s + (1 - b2) * abs(e) ** 2 + eps_root

        largest_m = max(largest_m, abs(m))
        largest_input = max(largest_input, abs(g), abs(m))
        # an error of epsilon * largest_input in e changes |e|^2 by 2 |e| times that
        # error, and by its square
        inexact = 0 if h.centering == "none" else largest_input
        first_order = b2 * first_order + (1 - b2) * 2 * abs(e) * inexact
        second_order = b2 * second_order + (1 - b2) * 4 * mp.mpf(epsilon) * inexact**2

        if h.asynchronous:  # the gradient, and the previous second moment
            numerator, largest_numerator = g, abs(g)
            s_hat = mp.mpf(1) if t == 1 else s_before / (1 - b2 ** (t - 1))
            conditioning = before
        else:  # the new moments; m_t may be what is left of larger ones
            numerator, largest_numerator = m / (1 - b1**t), largest_m / (1 - b1**t)
            s_hat = s / (1 - b2**t)
            conditioning = 1 if s == 0 else 1 + (first_order + second_order) / (2 * s)
        denominator = mp.sqrt(s_hat) + eps
        d, largest_d = numerator / denominator, largest_numerator / denominator
        if h.clip_exponent is not None:
            limit = mp.mpf(t) ** mp.mpf(h.clip_exponent)
            if abs(d) > limit:
                d, largest_d = d / abs(d) * limit, limit
        options = h.learning_rate, h.decay
        lr, decay = (mp.mpf(o(t - 1) if callable(o) else o) for o in options)
        u = -lr * (d + decay * x)
        # the two terms of an update may cancel
        largest_update = max(largest_update, abs(lr) * (largest_d + abs(decay * x)))
        elements.append(
            Element(
                update=u,
                param=x + u,
                mu=m,
                nu=s,
                update_scale=largest_update * conditioning,
                mu_scale=largest_m,
                nu_scale=s + first_order + second_order,
            )
        )
    return elements
