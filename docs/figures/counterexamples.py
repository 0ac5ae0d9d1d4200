"""The two problems on which Zhuang et al. 2021 compare adaptive optimizers, and the optimizers that solve them.

Both problems are sequences of linear functions of one number, of period P: nearly every gradient points away from the
optimum, and a rare large one points towards it. A synchronous optimizer divides the large gradient by a second moment
that contains it; an asynchronous one does not.

Four of the optimizers are the corners of `acprop_core.ACProp`: its two switches, `asynchronous` and `centering`, and
the eps of the paper in question. RMSProp is not a corner, and is written here. Each is a function of one gradient g and
one pair of moments,

    direction, moments = optimizer(g, t, moments, b1, b2)

in float64, with t = 1 at the first step; `solve` maps it over all b1, b2 and P of a grid at once.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from acprop_core import ACProp, State

Array = Any
Moments = tuple[Array, Array]  # m and v; RMSProp has no m and leaves it as it is
Optimizer = Callable[[Array, Array, Moments, Array, Array], tuple[Array, Moments]]

# The two ideas of ACProp's paper, switched off and on.
CORNERS: dict[str, dict[str, Any]] = {
    "Adam": {"asynchronous": False, "centering": "none"},  # arXiv:1412.6980, algorithm 1
    "AdaBelief": {"asynchronous": False, "centering": "current"},  # arXiv:2010.07468, algorithm 2
    "AdaShift": {"asynchronous": True, "centering": "none"},  # arXiv:1810.00143 with n = 1, so that m_t is g_t
    "ACProp": {"asynchronous": True, "centering": "current"},  # arXiv:2110.05454, algorithm 2
}
# Adam's paper adds eps to the root alone, AdaBelief's and ACProp's to the moment too. AdaShift has Adam's here.
EPS = {
    "Adam": {"eps": 1e-8, "eps_root": 0.0},
    "AdaBelief": {"eps": 1e-16, "eps_root": 1e-16},
    "AdaShift": {"eps": 1e-8, "eps_root": 0.0},
    "ACProp": {"eps": 1e-16, "eps_root": 1e-16},
}


class Problem(NamedTuple):
    """Functions f_t(x) = slope(t, P) x on an interval; where x starts, and where their sum is least."""

    slope: Callable[[Array, Array], Array]
    interval: tuple[float, float]
    start: float
    optimum: float
    formula: str


# Reddi, Kale, Kumar 2018, arXiv:1904.09237, theorem 1; in ACProp's paper for every P from 3.
DENSE = Problem(
    slope=lambda t, p: jnp.where(t % p == 1, p, -1.0),
    interval=(-1.0, 1.0),
    start=0.0,
    optimum=-1.0,
    formula="P x, then -x (P - 1 times)",
)
# ACProp's paper: gradients are 0 in between. It needs P > 3: the two slopes would fall on one step.
SPARSE = Problem(
    slope=lambda t, p: jnp.where(t % p == 1, 0.5 * p, jnp.where(t % p == p - 2, -1.0, 0.0)),
    interval=(0.0, 1.0),
    start=1.0,
    optimum=0.0,
    formula="P/2 x, then 0, once -x",
)


def rmsprop(g: Array, t: Array, moments: Moments, b1: Array, b2: Array) -> tuple[Array, Moments]:
    """Divide by the root of v_t, which contains g_t (Hinton 2012)."""
    m, v = moments
    v = b2 * v + (1.0 - b2) * g**2
    return g / (jnp.sqrt(v) + 1e-8), (m, v)


def corner(name: str, clip_exponent: float | None = None, skips_first: bool = False) -> Optimizer:
    """Return the library's optimizer of a corner; AdaShift's paper leaves the first step out, as `skips_first` does."""

    def optimizer(g: Array, t: Array, moments: Moments, b1: Array, b2: Array) -> tuple[Array, Moments]:
        rule = ACProp(1.0, b1=b1, b2=b2, clip_exponent=clip_exponent, **CORNERS[name], **EPS[name])
        update, state = rule.update(g, State(t - 1, *moments))
        return jnp.where(skips_first & (t == 1), 0.0, -update), (state.mu, state.nu)

    return optimizer


OPTIMIZERS: dict[str, Optimizer] = {
    "RMSProp": rmsprop,
    **{name: corner(name, skips_first=name == "AdaShift") for name in CORNERS},
    "ACProp, clip 0.25": corner("ACProp", clip_exponent=0.25),
}
NO_FIRST_MOMENT = ("RMSProp", "AdaShift")  # b1 does not matter
LAST = 1000  # steps over which the distance from the optimum is averaged


class Grid(NamedTuple):
    """All combinations of these; results have the axes (rate, b1, b2, P)."""

    rates: Sequence[float]
    b1: Sequence[float]
    b2: Sequence[float]
    periods: Sequence[int]


def solve(problem: Problem, optimizer: Optimizer, grid: Grid, steps: int, trace: bool = False) -> np.ndarray:
    """Return the mean distance from the optimum over the last steps, or with `trace` x after every step.

    The learning rate of step t is rate / sqrt(t), and x is put back into the interval after each step. The gradients do
    not depend on x, so that all rates share their moments and directions.
    """
    with jax.enable_x64(True):
        arrays = Grid(*(jnp.asarray(axis, dtype=float) for axis in grid))
        return np.asarray(_solve(problem, optimizer, arrays, steps, trace))


@partial(jax.jit, static_argnums=(0, 1, 3, 4))
def _solve(problem: Problem, optimizer: Optimizer, grid: Grid, steps: int, trace: bool) -> Array:
    over_periods = jax.vmap(optimizer, in_axes=(0, None, 0, None, None))
    over_b2 = jax.vmap(over_periods, in_axes=(None, None, 0, None, 0))
    over_all = jax.vmap(over_b2, in_axes=(None, None, 0, 0, None))
    rates = grid.rates[:, None, None, None]

    def step(carry: Any, t: Array) -> tuple[Any, Array | None]:
        x, moments, total = carry
        d, moments = over_all(problem.slope(t, grid.periods), t, moments, grid.b1, grid.b2)
        x = jnp.clip(x - rates / jnp.sqrt(t) * d, *problem.interval)
        total = total + jnp.where(t > steps - LAST, jnp.abs(x - problem.optimum), 0.0)
        return (x, moments, total), x if trace else None

    zeros = jnp.zeros((len(grid.b1), len(grid.b2), len(grid.periods)))
    x = jnp.full((len(grid.rates), *zeros.shape), problem.start)
    (_, _, total), xs = jax.lax.scan(step, (x, (zeros, zeros), jnp.zeros_like(x)), jnp.arange(1, steps + 1))
    return xs if trace else total / min(LAST, steps)
