"""The rule as a list of calls with outputs, as NumPy and torch have them: a tile needs few arrays and allocates none.

The rule is run once, on arrays that are not there and write down what is done with them. As in a compiler, registers
are given to the values: here arrays of the size of a tile, taken over where a value is needed no more.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

from acprop_core._rule import NUMBERS, Coefficients, displacement, regularized, rule

Instruction = tuple[Callable[..., Any], Callable[[Sequence[Any]], Any]]  # a function, and what picks its arguments


class Operations(NamedTuple):
    """Functions of an array library that take their output behind their operands."""

    add: Callable[..., Any]
    subtract: Callable[..., Any]
    multiply: Callable[..., Any]
    divide: Callable[..., Any]
    sqrt: Callable[..., Any]
    clip: Callable[..., Any]
    copy: Callable[..., Any]


class Program(NamedTuple):
    """A step of one tile. Its arrays stand in slots: parameter, gradient, mu, nu, then numbers, then registers."""

    compute: list[Instruction]  # writes registers only
    result: int  # the slot of what the parameter becomes, or of what is to be added to it
    write: list[Instruction]  # writes mu and nu, without reading them, so that it may be repeated
    numbers: list[Any]
    registers: int


def program_of(
    k: Coefficients,
    grad_scale: float,
    decay: bool,
    number: Callable[[str, float], Any],
    operations: Operations,
    decoupled: bool = True,
    adds: bool = True,
) -> Program:
    """Return a step of real arrays of one dtype; `number` makes an operand of the name and the value of a number.

    Its result is the new parameter if it `adds`, otherwise the update.
    """
    numbers = {name: getattr(k, name) for name in NUMBERS} | {"grad_scale": grad_scale}
    neutral = {"offset": 0.0, "eps_root": 0.0, "grad_scale": 1.0, "limit": None}
    absent = frozenset(name for name, x in neutral.items() if numbers[name] == x)
    traced = _trace(absent, k.old_is_lighter1, k.old_is_lighter2, k.from_previous, decay, decoupled, adds, operations)
    return traced._replace(numbers=[number(x.name, x.sign * numbers[x.name]) for x in traced.numbers])


def execute(instructions: list[Instruction], slots: Sequence[Any]) -> None:
    """Run a part of a program."""
    for function, arguments in instructions:
        function(*arguments(slots))


class _Array:
    """An array that is not there: what is done with it is appended to a list of calls."""

    def __init__(self, calls: "list[_Call]", operations: Operations) -> None:
        self._calls = calls
        self.operations = operations

    def call(self, function: Callable[..., Any], *operands: Any) -> "_Array":
        """Return the result of one of the operations."""
        result = _Array(self._calls, self.operations)
        self._calls.append(_Call(function, operands, result))
        return result

    def __add__(self, other: Any) -> "_Array":
        # None: zero. x + 0 differs from x in the sign of a zero alone, and no second moment is a negative zero.
        return self if other is None else self.call(self.operations.add, self, other)

    def __sub__(self, other: Any) -> "_Array":
        return self.call(self.operations.subtract, self, other)

    def __mul__(self, other: Any) -> "_Array":
        return self.call(self.operations.multiply, self, other)

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> "_Array":
        return self.call(self.operations.divide, self, other)


@dataclasses.dataclass(frozen=True)
class _Number:
    """A number of the step, or its negative."""

    name: str
    sign: float = 1.0

    def __neg__(self) -> "_Number":
        return _Number(self.name, -self.sign)


class _Call(NamedTuple):
    function: Callable[..., Any]
    operands: tuple[Any, ...]
    result: _Array


_namespace = SimpleNamespace(
    sqrt=lambda x: x.call(x.operations.sqrt, x),
    clip=lambda x, low, high: x.call(x.operations.clip, x, low, high),
)


@functools.cache
def _trace(
    absent: frozenset[str],
    old_is_lighter1: bool,
    old_is_lighter2: bool,
    from_previous: bool,
    decay: bool,
    decoupled: bool,
    adds: bool,
    operations: Operations,
) -> Program:
    """Return the program for numbers of which `absent` change nothing."""
    k = Coefficients(
        **{name: None if name in absent else _Number(name) for name in NUMBERS},
        old_is_lighter1=old_is_lighter1,
        old_is_lighter2=old_is_lighter2,
        from_previous=from_previous,
        is_complex=False,
    )
    calls: list[_Call] = []
    param, grad, mu, nu = inputs = [_Array(calls, operations) for _ in range(4)]
    scaled = grad if "grad_scale" in absent else grad * _Number("grad_scale")
    if decay and not decoupled:
        scaled = regularized(scaled, param, k)
    d, new_mu, new_nu = rule(scaled, mu, nu, k, _namespace)
    result = displacement(d, param if decay and decoupled else None, k)
    if adds:
        result = param + result

    write = []
    for old, new in ((mu, new_mu), (nu, new_nu)):
        last = next(call for call in calls if call.result is new)
        if {mu, nu} & set(last.operands) or any(new in call.operands for call in calls):
            write.append(_Call(operations.copy, (new,), old))
        else:  # it waits for nothing and nothing for it: it is made where it belongs
            write.append(last._replace(result=old))
            calls.remove(last)
    return _allocate(calls, result, write, inputs)


def _allocate(compute: list[_Call], result: _Array, write: list[_Call], inputs: list[_Array]) -> Program:
    """Give every array and number a slot."""
    calls = [*compute, *write]
    last_use = {x: i for i, call in enumerate(calls) for x in call.operands}  # of `result`: none
    numbers = [x for x in last_use if isinstance(x, _Number)]
    slots: dict[Any, int] = {x: i for i, x in enumerate([*inputs, *numbers])}
    first = end = len(slots)
    free: list[int] = []
    instructions: list[Instruction] = []
    for i, call in enumerate(calls):
        # a register that is read here for the last time can take the result
        free += {slots[x] for x in call.operands if last_use[x] == i and slots[x] >= first}
        if call.result not in slots:
            if not free:
                free.append(end)
                end += 1
            slots[call.result] = free.pop()
        instructions.append((call.function, operator.itemgetter(*(slots[x] for x in (*call.operands, call.result)))))
    n = len(compute)
    return Program(instructions[:n], slots[result], instructions[n:], numbers, end - first)
