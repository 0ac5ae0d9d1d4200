"""What is special about XLA: how it rounds, how it is made to read the old state before it overwrites it, and programs.

A traced step is one small program for all parameters of one shape and dtype, so that the rule is traced once for them.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from acprop_core import ACProp
from acprop_core.adapt import Row, Step
from acprop_core.rule import Centering, Flags, Hyperparameters, Numbers, replace, table_of
from acprop_optax._trees import widened

Result = tuple[Any, Any, Any, Any]  # update, first moment, second moment and carry of one parameter


class _Rounded:
    """A real array whose products are rounded before anything is added to them, as in every other library.

    XLA rounds a * b + c once, where the processor can. So a zero is added to a product first: that sum is rounded
    once, which changes nothing, and no other is. The zero is -0.0, because 0.0 changes -0.0, and XLA must not know it.
    A product that is only multiplied or divided needs no zero.

    The functions are those of `jax.lax`, which promote no dtype and are traced faster than those of `jax.numpy`.
    """

    def __init__(self, x: jax.Array, zero: jax.Array, is_product: bool = False) -> None:
        self.x = x
        self.dtype = x.dtype
        self.shape = x.shape
        self._zero = zero
        self._is_product = is_product

    @property
    def rounded(self) -> jax.Array:
        return lax.add(self.x, lax.convert_element_type(self._zero, self.dtype)) if self._is_product else self.x

    def call(self, function: Callable[..., jax.Array], *others: Any) -> "_Rounded":
        """Return a function of this array, and of other arrays and numbers."""
        return _Rounded(function(self.rounded, *(self._fit(x, "rounded") for x in others)), self._zero)

    def _fit(self, other: Any, form: str) -> Any:
        if isinstance(other, _Rounded):
            return getattr(other, form)
        return self.dtype.type(other) if isinstance(other, float) else other

    def __add__(self, other: Any) -> "_Rounded":
        if isinstance(other, _Rounded):
            return self.call(lax.add, other)
        # the one product to which the rule adds a number is nu * scale + offset, and one of these two terms is 0
        return _Rounded(lax.add(self.x, self._fit(other, "x")), self._zero)

    def __sub__(self, other: Any) -> "_Rounded":
        return self.call(lax.sub, other)

    def __mul__(self, other: Any) -> "_Rounded":
        return _Rounded(lax.mul(self.x, self._fit(other, "x")), self._zero, is_product=True)

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> "_Rounded":
        return _Rounded(lax.div(self.x, self._fit(other, "x")), self._zero)


class _Namespace:
    """`jax.numpy`, for `_Rounded` arrays too, and with a clip that is not a program of its own.

    Without such programs, tracing and compiling take a tenth less.
    """

    def __getattr__(self, name: str) -> Any:
        function = getattr(jnp, name)
        if name not in _OF_ROUNDED:
            return function
        return lambda x, *more: x.call(_OF_ROUNDED[name], *more) if isinstance(x, _Rounded) else function(x, *more)

    @staticmethod
    def clip(x: Any, low: Any, high: Any) -> Any:
        if isinstance(x, _Rounded):
            return x.call(functools.partial(_Namespace.clip, low=low, high=high))
        return lax.min(high, lax.max(low, x))  # in this order of operands it is compiled faster

    @staticmethod
    def where(condition: Any, x: Any, y: Any) -> Any:
        if isinstance(x, _Rounded):
            return x.call(functools.partial(lax.select, condition), y)
        return jnp.where(condition, x, y)


_OF_ROUNDED: dict[str, Callable[..., Any]] = {
    **{"abs": lax.abs, "astype": lax.convert_element_type, "maximum": lax.max, "sqrt": lax.sqrt},
    "round": functools.partial(lax.round, rounding_method=lax.RoundingMethod.TO_NEAREST_EVEN),
    "asarray": lambda x: x,
}
namespace = _Namespace()

STEPS = 20_000
"""Number of steps whose numbers the host computes. With b2 = 0.999 the bias correction in float32 ends before."""


def step_in_xla(step: Step, optimizer: ACProp, count: Any) -> Callable[[Row, bool], Result]:
    """Return a step for one row at a time. If it is traced, it has the bits of other libraries, and XLA copies nothing.

    The bits are those of real arrays; complex arrays are multiplied as XLA does it.
    """
    if not isinstance(count, jax.core.Tracer):
        return lambda row, decays: step(widened(row), decays)
    numbers = _from_table(step.numbers, optimizer, count)
    floats = tuple(x if isinstance(x, float) else None for x in numbers)
    arrays = tuple(x if known is None else None for x, known in zip(numbers, floats, strict=True))
    # A zero by expm1, of which XLA does not know that expm1(-0.0) is -0.0, and which it takes for costly: it is
    # computed once, in a program of its own, so that nothing is known of it in those of the parameters.
    zero = lax.expm1(lax.mul(lax.convert_element_type(count, float), -0.0))
    never = count < 0

    program = _program(floats, step.flags)

    def compiled(row: Row, decays: bool) -> Result:
        if row.grad is None:
            return None, row.mu, row.nu, row.carry
        return program(row, arrays, zero, never, decays=decays)

    return compiled


@functools.lru_cache(maxsize=32)
def _program(floats: Any, flags: Flags) -> Callable[..., Result]:
    """Return the step of one row as a program of its own, for numbers that are in part known.

    JAX traces it once for all parameters of one shape and dtype: tracing 100 of them takes less than half of the time.
    XLA puts its operations into the caller's program. JAX keeps what it has traced for as long as the function exists,
    about 40 kB for a shape. So there is one function for each learning rate, and the oldest are dropped.
    """
    return jax.jit(functools.partial(_row_step, floats=floats, flags=flags), static_argnames="decays")


def _row_step(row: Row, arrays: Any, zero: Any, never: Any, *, floats: Any, flags: Flags, decays: bool) -> Result:
    numbers = Numbers(*(x if known is None else known for x, known in zip(arrays, floats, strict=True)))
    step, given = Step(numbers, flags, namespace), widened(row)
    if any(jnp.iscomplexobj(x) for x in row if x is not None):
        return _in_order(row, step(given, decays), never, flags)
    results = step(Row(*(None if x is None else _Rounded(x, zero) for x in given)), decays)
    update, mu, nu, carry = (None if x is None else x.rounded for x in results)
    return _in_order(row, (update, mu, nu, carry), never, flags)


def _from_table(numbers: Numbers, optimizer: ACProp, count: jax.Array) -> Numbers:
    """Return the numbers with those of the first steps from a table that the host computed in float64."""
    options = optimizer.b1, optimizer.b2, optimizer.clip_exponent
    if not all(x is None or isinstance(x, float) for x in options):
        return numbers
    is_known = lax.convert_element_type(count, float) < STEPS  # a float, because the count may have any dtype
    index = lax.convert_element_type(count, "int32")
    table = _table(*options, optimizer.asynchronous)
    later = tuple(getattr(numbers, name) for name in table)

    def known() -> tuple[jax.Array, ...]:
        columns = [jnp.asarray(column, x.dtype) for column, x in zip(table.values(), later, strict=True)]
        return tuple(lax.dynamic_index_in_dim(column, index, keepdims=False) for column in columns)

    for name, value in zip(table, lax.cond(is_known, known, lambda: later), strict=True):
        numbers = replace(numbers, name, value)
    return numbers


@functools.lru_cache(maxsize=16)
def _table(b1: float, b2: float, clip_exponent: float | None, asynchronous: bool) -> dict[str, Any]:
    hyper = Hyperparameters(b1=b1, b2=b2, clip_exponent=clip_exponent, asynchronous=asynchronous)
    return {name: np.array(column) for name, column in table_of(hyper, STEPS).items()}


def _in_order(row: Row, result: Result, never: Any, flags: Flags) -> Result:
    """Return the same result, so ordered that XLA computes what is written to the parameter before the moments.

    Both are made from s_{t-1}, whose memory s_t takes over where the state is donated. XLA orders only values that
    depend on each other. Without an order it copies s_{t-1} on the CPU: a parameter-sized temporary, and three times
    the time. So it does for a synchronous update, which it makes from s_{t-1} once more instead of reading s_t. With
    centering "previous", m_{t-1} is in the same danger, because s_t is made from it.
    """
    update, mu, nu, carry = result
    if carry is not None:
        # both are made from the old carry; either order costs copies, this one the fewest
        carry = _after(update, carry, never)
        update = _after(carry, update, never)
    written = update
    if flags.rated and row.param is not None:
        # the caller will compute the same; XLA sees that, and computes it once
        with jax.numpy_dtype_promotion("standard"):
            written = optax.apply_updates(row.param, update)
    nu = _after(written, nu, never)
    if flags.centering == Centering.PREVIOUS:
        mu = _after(nu, mu, never)
    return update, mu, nu, carry


def _after(first: jax.Array, x: jax.Array, never: jax.Array) -> jax.Array:
    """Return `x`, made to depend on `first`.

    `never` says whether the count is negative. It is not, but XLA cannot know that; and because it is one bool for all
    elements, no element of `first` is read. Its bits are used, because XLA drops the rounding of a value that it rounds
    and widens again, and because bits have no derivative.
    """
    if jnp.iscomplexobj(first):
        first = first.real
    if first.dtype == x.dtype and first.dtype.itemsize > 2:
        return lax.select(never, lax.stop_gradient(first), x)
    bits = lax.bitcast_convert_type(first, f"uint{8 * first.dtype.itemsize}")
    return lax.select(never, lax.convert_element_type(bits, x.dtype), x)  # `where` is a program of its own
