"""What is special about XLA: how it is made to read the old state before it overwrites it, and a clip."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from acprop_core import ACProp
from acprop_core.adapt import Row


class _Rounded:
    """An array whose products are rounded before anything is added to them, as in every other library.

    XLA has a * b + c rounded once, not twice, wherever a processor can. To the product a zero is added here, so that it
    is this addition that is fused, which changes no product. It must be -0.0, because 0.0 would change the sign of
    -0.0; and XLA must not be able to know that it is zero.
    """

    def __init__(self, x: jax.Array, zero: jax.Array) -> None:
        self.x = x
        self.zero = zero
        self.dtype = x.dtype
        self.shape = x.shape

    def map(self, function: Callable[..., jax.Array], *others: Any) -> "_Rounded":
        """Return a function of this array and of others or numbers; `jax.lax` is traced in half the time of jax.numpy."""
        return _Rounded(function(self.x, *map(self._operand, others)), self.zero)

    def _operand(self, other: Any) -> Any:
        if isinstance(other, _Rounded):
            return other.x
        return self.dtype.type(other) if isinstance(other, float) else other

    def __add__(self, other: Any) -> "_Rounded":
        return self.map(jax.lax.add, other)

    def __sub__(self, other: Any) -> "_Rounded":
        return self.map(jax.lax.sub, other)

    def __mul__(self, other: Any) -> "_Rounded":
        return self.map(jax.lax.mul, other).map(jax.lax.add, self.zero)

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> "_Rounded":
        return self.map(jax.lax.div, other)


class _Namespace:
    """`jax.numpy`, with functions for `_Rounded` arrays, and a clip that is not a program of its own.

    Without such programs, tracing and compiling take a tenth less.
    """

    def __getattr__(self, name: str) -> Any:
        return getattr(jnp, name)

    @staticmethod
    def clip(x: Any, low: Any, high: Any) -> Any:
        return _mapped(jax.lax.min, _mapped(jax.lax.max, x, low), high)

    @staticmethod
    def sqrt(x):
        return x.map(jax.lax.sqrt) if isinstance(x, _Rounded) else jnp.sqrt(x)

    @staticmethod
    def astype(x, dtype):
        if not isinstance(x, _Rounded):
            return jnp.astype(x, dtype)
        return x.map(lambda a: jax.lax.convert_element_type(a, dtype))

    @staticmethod
    def abs(x):
        return x.map(jax.lax.abs) if isinstance(x, _Rounded) else jnp.abs(x)

    @staticmethod
    def round(x):
        return x.map(lambda a: jax.lax.round(a, jax.lax.RoundingMethod.TO_NEAREST_EVEN))

    @staticmethod
    def maximum(x, y):
        return x.map(jax.lax.max, y)

    @staticmethod
    def asarray(x):
        return x if isinstance(x, _Rounded) else jnp.asarray(x)

    @staticmethod
    def where(c, x, y):
        if isinstance(x, _Rounded):
            return x.map(lambda a,b: jax.lax.select(c,a,b), y)
        return jnp.where(c, x, y)


def _mapped(function, x, other):
    return x.map(function, other) if isinstance(x, _Rounded) else function(x, other)


def rounded_products(step, count):
    if not isinstance(count, jax.core.Tracer):
        return step
    zeros = {}
    def zero(dtype):
        if dtype not in zeros:
            zeros[dtype] = jax.lax.mul(jax.lax.convert_element_type(count, dtype), dtype.type(-0.0))
        return zeros[dtype]
    def rounded(row, decays=True):
        if row.grad is None:
            return step(row, decays)
        real = _moment(row)
        if any(jnp.iscomplexobj(x) for x in row if x is not None):
            return step(row, decays)
        z = zero(real)
        results = step(Row(*(x if x is None else _Rounded(x, z) for x in row)), decays)
        return tuple(x if x is None else x.x for x in results)
    return rounded

def _moment(row):
    wide = any(x is not None and x.dtype == jnp.float64 for x in (row.mu, row.param))
    return jnp.dtype(jnp.float64 if wide else jnp.float32)


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
