"""One step on many tensors: one after the other, or as lists. The rule is the same in both."""

import functools
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import repeat
from operator import attrgetter
from typing import Any, NamedTuple

import array_api_compat.torch as xp
import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from acprop_core import _rule
from acprop_core._program import Operations, execute, program_of
from acprop_core._step import Step
from acprop_torch import _foreach
from acprop_torch._foreach import TensorList

# What one operation sees at once, in bytes. On a CPU, what its cache holds: temporaries of whole large tensors are new
# memory at every operation, and their page faults cost more than the arithmetic.
_CPU_TILE, _TILE = 3 * 2**17, 2**23
_SMALL = 2**17  # bytes: on a CPU, starting the operations on fewer costs more than gathering them into a tile

PLAIN = frozenset({torch.Tensor, torch.nn.Parameter})


class Options(NamedTuple):
    """The options of a parameter group, by the names that `coefficients` knows."""

    learning_rate: Any
    b1: Any
    b2: Any
    eps: float
    eps_root: float
    weight_decay: Any
    clip_exponent: float | None
    centering: str
    decoupled: bool
    maximize: bool
    compensate: bool

    @property
    def decays(self) -> bool:
        """Whether there may be weight decay; a tensor is not read."""
        return isinstance(self.weight_decay, Tensor) or self.weight_decay != 0

    def at(self, count: Any) -> _rule.Coefficients:
        """Return the numbers of step ``count + 1``; tensors where `count` is one, of one step or of several."""
        k = _rule.coefficients(self, count, self.learning_rate, xp)
        if self.maximize:
            # The moments of -g are those of g, the first negated: only the way to go differs, and g need not be copied.
            k = k._replace(rate=-k.rate, weight_decay=-k.weight_decay)
        return k


class Row(NamedTuple):
    """A parameter, its gradient, its moments and its carry or None: real tensors of one shape, or as many lists."""

    param: Any
    grad: Any
    mu: Any
    nu: Any
    carry: Any

    def map(self, f: Callable[[Any], Any]) -> "Row":
        """Return the row with `f` applied to all that is there."""
        return Row(*(None if x is None else f(x) for x in self))


class Block(NamedTuple):
    """What the rule sees at once: a tensor, a part of one, or copies of the `members`, one behind the other."""

    row: Row
    members: Sequence[Row] = ()


def single_tensor(lists: Row, steps: list[Tensor], options: Options, traced: bool, differentiable: bool) -> None:
    """Run the rule on one tensor after the other; `traced` without reading a number, for graphs and derivatives."""
    if not traced:
        for count, members, own_steps in by_kind(lists, steps, on_a_cpu(lists)):
            count_steps(own_steps)
            in_tiles(members, options.at(count), options)
        return
    for row, done in zip(map(Row, *lists), steps, strict=True):
        step = Step(options.at(done), namespace(row.carry), options.decoupled)
        # derivatives need the old values of what is overwritten
        param, grad, mu, nu, carry = row.map(Tensor.clone) if differentiable else row
        update, *kept = step(grad, mu, nu, param, options.decays, carry)
        row.param.add_(update)
        for old, new in zip(row[2:], kept, strict=True):
            if old is not None:
                old.copy_(new)
        done.add_(1)


def in_tiles(lists: Row, k: _rule.Coefficients, options: Options) -> None:
    """Run the rule on rows of one device and alike in dtypes, as much at once as `blocks` says."""
    _keep_freed_memory()
    step = Step(k, xp, options.decoupled)
    if _takes_outputs(lists, k):
        _by_program(lists, step.numbers_for(lists.mu[0].dtype)[0], options)
        return
    # as for `_operand`
    step = Step(as_tensors(k)._replace(limit=k.limit), xp, options.decoupled)
    for block in blocks(lists):
        param, grad, mu, nu, carry = block.row
        write([block], *([new] for new in step(grad, mu, nu, param, options.decays, carry)))


def _takes_outputs(lists: Row, k: _rule.Coefficients) -> bool:
    """Return whether a program can step all rows: plain tensors on a CPU, without casts, and numbers of the host."""
    tensors = [x for column in lists[:4] for x in column]
    return (
        lists.param[0].is_cpu
        and {*map(attrgetter("dtype"), (column[0] for column in lists[:4]))} in ({torch.float32}, {torch.float64})
        and PLAIN.issuperset(map(type, tensors))
        and not any(isinstance(getattr(k, name), Tensor) for name in _rule.NUMBERS)
    )


def _by_program(lists: Row, k: _rule.Coefficients, options: Options) -> None:
    # The operations write into a few registers that stay in the cache, where operators would make a tensor each.
    dtype = lists.mu[0].dtype
    program = program_of(
        k, 1.0, options.decays, functools.partial(_operand, dtype), _TORCH, options.decoupled, adds=False
    )
    memory = torch.empty((program.registers, 0), dtype=dtype, device="cpu")
    registers: list[Tensor] = []
    shape = None
    for block in blocks(lists):
        if block.row.param.shape != shape:
            shape = block.row.param.shape
            if shape.numel() > memory.shape[1]:
                memory = memory.new_empty((program.registers, shape.numel()))
            registers = [x[: shape.numel()].view(shape) for x in memory]
        slots = [*block.row[:4], *program.numbers, *registers]
        execute(program.compute, slots)
        execute(program.write, slots)
        # added where it belongs, not to a copy that is brought back: another parameter may share the memory
        bring([slots[program.result]], "param", [block], torch._foreach_add_)
        for name in ("mu", "nu") if block.members else ():  # copies, which the program has written
            bring([getattr(block.row, name)], name, [block], torch._foreach_copy_)
        del block, slots  # what was gathered goes before more is


def _operand(dtype: torch.dtype, name: str, value: float) -> Any:
    # torch would make a tensor of a Python number in every operation; but bounds that are numbers clip faster. A wider
    # number would widen parameters without axes.
    return value if name == "limit" else torch.tensor(value, dtype=dtype, device="cpu")


_TORCH = Operations(
    add=lambda x, y, out: torch.add(x, y, out=out),
    subtract=lambda x, y, out: torch.sub(x, y, out=out),
    multiply=lambda x, y, out: torch.mul(x, y, out=out),
    divide=lambda x, y, out: torch.div(x, y, out=out),
    sqrt=lambda x, out: torch.sqrt(x, out=out),
    clip=lambda x, low, high, out: torch.clamp(x, low, high, out=out),
    copy=lambda x, out: out.copy_(x),
)


def in_lists(lists: Row, k: _rule.Coefficients, options: Options) -> None:
    """Run the rule on lists of what `blocks` makes of rows of one device and alike in dtypes."""
    step = Step(k, _foreach, options.decoupled)
    for chunk in _chunks(blocks(lists)):
        _step_list(chunk, step, options.decays)


def multi_tensor(lists: Row, steps: list[Tensor], options: Options, traced: bool) -> None:
    """Run the rule on lists of tensors; `traced` without reading a number, and each with those of its own step."""
    if not traced:
        for count, members, own_steps in by_kind(lists, steps, on_a_cpu(lists)):
            count_steps(own_steps)
            # on a CPU torch's operations on lists are loops themselves
            (in_tiles if members.param[0].is_cpu else in_lists)(members, options.at(count), options)
        return
    rows = list(map(Row, *lists))
    kinds: dict[Any, list[int]] = {}
    for i, row in enumerate(rows):
        kinds.setdefault(_kind(row), []).append(i)
    for chosen in kinds.values():
        k = options.at(torch.stack([steps[i] for i in chosen]))
        start = 0
        for chunk in _chunks(Block(rows[i]) for i in chosen):
            part = slice(start, start + len(chunk))
            own = numbers_of_each(k, lambda x, part=part: TensorList(x[part].unbind()))
            _step_list(chunk, Step(own, _foreach, options.decoupled), options.decays)
            start += len(chunk)
    torch._foreach_add_(steps, 1)


def check_shapes(lists: Row) -> None:
    """Refuse tensors of different shapes, which torch would broadcast, or find out in the middle of a step."""
    shape = attrgetter("shape")
    first = list(map(shape, lists.param))
    for column in lists[1:4]:
        if not all(map(operator.eq, first, map(shape, column))):
            raise unequal(next(row for row in map(Row, *lists) if len({*map(shape, row[:4])}) > 1))
    for i, carry in enumerate(lists.carry):
        if carry is not None and carry.shape != first[i]:
            raise unequal(Row._make(column[i] for column in lists))


def unequal(row: Row) -> RuntimeError:
    """Return the refusal of a row of different shapes."""
    shapes = ", ".join(str(tuple(x.shape)) for x in row if x is not None)
    names = "exp_avg and exp_avg_var" if row.carry is None else "exp_avg, exp_avg_var and carry"
    return RuntimeError(
        f"a parameter, its gradient, {names} have the shapes {shapes}; clear `optimizer.state`, or load the state of "
        "this model"
    )


def numbers_of_each(k: _rule.Coefficients, take: Any) -> _rule.Coefficients:
    """Return the numbers of several steps with `take` applied to those that differ from step to step."""
    numbers = {name: getattr(k, name) for name in _rule.NUMBERS}
    return k._replace(**{name: take(x) for name, x in numbers.items() if isinstance(x, Tensor) and x.ndim == 1})


def as_tensors(k: _rule.Coefficients, dtype: torch.dtype = torch.float64) -> _rule.Coefficients:
    """Return `k` with 0-d tensors for its Python numbers: on the CPU, from where they go with tensors of any device."""
    numbers: dict[str, Any] = {name: getattr(k, name) for name in _rule.NUMBERS}
    for name in [name for name, x in numbers.items() if isinstance(x, float)]:
        numbers[name] = torch.tensor(numbers[name], dtype=dtype, device="cpu")
    return k._replace(**numbers)


def by_kind(lists: Row, steps: list[Tensor], one_device: bool) -> Iterator[tuple[int, Row, list[Tensor]]]:
    """Sort rows by count, device and dtypes; yield each count with the lists and the steps of its rows."""
    counts = list(map(Tensor.item, steps))
    dtype = attrgetter("dtype")
    if one_device and len({*counts}) == 1 and all(len({*map(dtype, column)}) == 1 for column in lists[:4]):
        yield int(counts[0]), lists, steps  # the usual case, asked in few words: with many small parameters they count
        return
    groups: dict[Any, list[tuple[Row, Tensor]]] = {}
    for row, step, count in zip(map(Row, *lists), steps, counts, strict=True):
        groups.setdefault((count, *_kind(row)), []).append((row, step))
    for key, members in groups.items():
        yield int(key[0]), transposed([row for row, _ in members]), [step for _, step in members]


def on_a_cpu(lists: Row) -> bool:
    """Return whether all parameters are on a CPU."""
    return all(map(attrgetter("is_cpu"), lists.param))


def transposed(rows: list[Row]) -> Row:
    """Return the lists of the parameters, gradients, moments and carries of several rows."""
    return Row(*map(list, zip(*rows, strict=True))) if rows else Row([], [], [], [], [])


def blocks(lists: Row, tile: int | None = None) -> Iterator[Block]:
    """Cut large tensors into tiles, and gather small ones on a CPU. The rows are of one device and alike in dtypes."""
    rows = list(map(Row, *lists))
    tile = tile or _tile_of(rows[0])
    small: list[Row] = []
    gathered = 0
    for row in rows:
        size = row.mu.nbytes
        if size < _SMALL and row.param.is_cpu:
            if small and gathered + size > _CPU_TILE:
                yield _gathered(small)
                small, gathered = [], 0
            small.append(row)
            gathered += size
        elif size > tile:
            yield from map(Block, _tiles(row, tile // row.mu.element_size()))
        else:
            yield Block(row)
    if small:
        yield _gathered(small)


def contiguous(row: Row) -> Row | None:
    """Return the row as contiguous tensors, their axes permuted alike; None if there is no such order."""
    if all(x is None or x.is_contiguous() for x in row):
        return row
    order = sorted(range(row.param.ndim), key=row.param.stride, reverse=True)
    permuted = row.map(lambda x: x.permute(order))
    return permuted if all(x is None or x.is_contiguous() for x in permuted) else None


def write(
    blocks: Sequence[Block],
    updates: Sequence[Any],
    mus: Sequence[Any],
    nus: Sequence[Any],
    carries: Sequence[Any],
) -> None:
    """Add the updates to the parameters of the blocks, and put new moments and carries in the place of the old."""
    bring(updates, "param", blocks, torch._foreach_add_)
    bring(mus, "mu", blocks, torch._foreach_copy_)
    bring(nus, "nu", blocks, torch._foreach_copy_)
    if carries[0] is not None:
        bring(carries, "carry", blocks, torch._foreach_copy_)


def bring(values: Sequence[Any], name: str, blocks: Sequence[Block], operation: Callable[..., None]) -> None:
    """Add or copy a value for each block to its tensor of this name, or to those of which it is made."""
    targets: list[Tensor] = []
    parts: list[Tensor] = []
    for block, value in zip(blocks, values, strict=True):
        owners = [getattr(row, name) for row in block.members or [block.row]]
        targets += owners
        parts += _unflatten_dense_tensors(value, owners) if block.members else [value]
    operation(targets, parts)


def count_steps(steps: list[Tensor]) -> None:
    """Add one to the step counts."""
    if steps[0].is_cpu:
        one = torch.tensor(1.0, device="cpu")  # a Python number would be made a tensor for every step
        torch._foreach_add_(steps, one, alpha=1.0)
    else:
        torch._foreach_add_(steps, 1)


def namespace(carry: Any) -> Any:
    """Return torch as the namespace of a step, for parameters with or without a carry."""
    return _keeping_casts if carry is not None and torch.compiler.is_compiling() else xp


@torch.library.custom_op("acprop::narrowed", mutates_args=())
def _narrowed(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype, copy=True)


_narrowed.register_fake(lambda x, dtype: torch.empty_like(x, dtype=dtype))


class _KeepingCasts:
    """The namespace for torch's compiler, which leaves out a rounding to 16 bits that is widened again.

    Of what rounding takes nothing would then be left to carry. Into an operator of our own it does not look.
    """

    def __getattr__(self, name: str) -> Any:
        return getattr(xp, name)

    def astype(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return _narrowed(x, dtype) if dtype.itemsize == 2 else xp.astype(x, dtype)


_keeping_casts = _KeepingCasts()


@functools.cache
def _keep_freed_memory() -> None:
    # What is free beyond twice the largest block that was ever mapped and freed, glibc returns to the system, and each
    # temporary would be new memory again. So let there have been such a block; untouched, it costs nothing.
    torch.empty(2**24, dtype=torch.uint8, device="cpu")


def _step_list(chunk: list[Block], step: Step, decays: bool) -> None:
    param, grad, mu, nu, carry = (
        None if column[0] is None else TensorList(column)
        for column in zip(*(block.row for block in chunk), strict=True)
    )
    write(chunk, *([None] if new is None else new.tensors for new in step(grad, mu, nu, param, decays, carry)))


def _kind(row: Row) -> tuple[Any, ...]:
    return row.param.device, row.param.dtype, row.grad.dtype, row.mu.dtype, row.nu.dtype


def _gathered(rows: list[Row]) -> Block:
    if len(rows) == 1:
        return Block(rows[0])
    columns = zip(*rows, strict=True)
    return Block(Row(*(None if column[0] is None else _flatten_dense_tensors(column) for column in columns)), rows)


def _tiles(row: Row, size: int) -> Iterator[Row]:
    if (flat := contiguous(row)) is not None:
        pieces = flat.map(lambda x: x.view(-1).split(size))
    else:
        axis = max(range(row.param.ndim), key=row.param.size)
        length = max(1, row.param.size(axis) * size // row.param.numel())
        pieces = row.map(lambda x: x.split(length, axis))
    return map(Row, *(repeat(None) if x is None else x for x in pieces))


def _chunks(blocks: Iterable[Block]) -> Iterator[list[Block]]:
    """Sort blocks into lists that are, together, as large as a tile."""
    chunk: list[Block] = []
    size = 0
    for block in blocks:
        own = block.row.mu.numel() * block.row.mu.element_size()  # nbytes is refused where a traced size is a symbol
        if chunk and size + own > _tile_of(block.row):
            yield chunk
            chunk, size = [], 0
        chunk.append(block)
        size += own
    if chunk:
        yield chunk


def _tile_of(row: Row) -> int:
    return _CPU_TILE if row.param.is_cpu else _TILE
