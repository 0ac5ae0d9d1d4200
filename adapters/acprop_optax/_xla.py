"""What is special about XLA: how it is made to read the old state before it overwrites it, and a clip."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from acprop_core import ACProp
from acprop_core.adapt import Row


class _Namespace:
    """`jax.numpy`, with a clip that is not a program of its own: tracing and compiling then take a tenth less."""

    def __getattr__(self, name: str) -> Any:
        return getattr(jnp, name)

    @staticmethod
    def clip(x: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
        return jax.lax.min(high, jax.lax.max(low, x))


namespace = _Namespace()
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
    never = count < 0
    ordered = []
    for row, (update, mu, nu, carry) in zip(rows, results, strict=True):
        if carry is not None and update is not None:
            # both are made from the old carry; either order costs copies, this one the fewest
            carry = _after(update, carry, never)
            update = _after(carry, update, never)
        if update is not None:
            nu = _after(written(row, update), nu, never)
            if optimizer.centering == "previous":
                mu = _after(nu, mu, never)
        ordered.append((update, mu, nu, carry))
    return ordered


def _after(first: jax.Array, x: jax.Array, never: jax.Array) -> jax.Array:
    """Return `x`, made to depend on `first`.

    `never` says whether the count is negative. It is not, but XLA cannot know that; and because it is one bool for all
    elements, no element of `first` is read. Its bits are used, because XLA drops the rounding of a value that it rounds
    and widens again, and because bits have no derivative.
    """
    if jnp.iscomplexobj(first):
        first = first.real
    if first.dtype == x.dtype and first.dtype.itemsize > 2:
        return jax.lax.select(never, jax.lax.stop_gradient(first), x)
    bits = jax.lax.bitcast_convert_type(first, f"uint{8 * first.dtype.itemsize}")
    return jax.lax.select(never, jax.lax.convert_element_type(bits, x.dtype), x)  # `where` is a program of its own
