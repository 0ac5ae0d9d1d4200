"""The copy hazard: how XLA is made to read the old state before it overwrites it."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from acprop_core import ACProp
from acprop_core.adapt import Row

Result = tuple[Any, Any, Any, Any]  # update, first moment, second moment and carry of one parameter


def in_order(
    rows: Sequence[Row],
    results: Sequence[Result],
    written: Callable[[Row, Any], Any],
    count: Any,
    optimizer: ACProp,
) -> list[Result]:
    """Return the same results, so ordered that XLA computes the `written` value of an update before the moments.

    Both are made from s_{t-1}, whose memory s_t takes over where the state is donated. XLA orders only values that
    depend on each other. Without an order it copies s_{t-1} on the CPU: a parameter-sized temporary, and three times
    the time. So it does for a synchronous update, which it makes from s_{t-1} once more instead of reading s_t. With
    centering "previous", m_{t-1} is in the same danger, because s_t is made from it.
    """
    if not isinstance(count, jax.core.Tracer):
        return list(results)
    ordered = []
    for row, (update, mu, nu, carry) in zip(rows, results, strict=True):
        if carry is not None and update is not None:
            # both are made from the old carry; either order costs copies, this one the fewest
            carry = _after(update, carry, count)
            update = _after(carry, update, count)
        if update is not None:
            nu = _after(written(row, update), nu, count)
            if optimizer.centering == "previous":
                mu = _after(nu, mu, count)
        ordered.append((update, mu, nu, carry))
    return ordered


def _after(first: jax.Array, x: jax.Array, count: jax.Array) -> jax.Array:
    """Return `x`, made to depend on `first`.

    A count is never negative, but XLA cannot know that; and because the condition is one number for all elements, no
    element of `first` is read. Its bits are used, because XLA drops the rounding of a value that it rounds and widens
    again, and because bits have no derivative.
    """
    first = jnp.real(first)
    bits = jax.lax.bitcast_convert_type(first, f"uint{8 * first.dtype.itemsize}")
    return jnp.where(count < 0, bits.astype(x.dtype), x)
