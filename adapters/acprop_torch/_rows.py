"""Rows of tensors, the input of a step: how they are checked, sorted, cut and gathered."""

from collections.abc import Callable, Iterator, Sequence
from itertools import repeat
from operator import attrgetter
from typing import Any, NamedTuple

import array_api_compat.torch as xp
import torch
from torch import Tensor

from acprop_core.adapt import Row, Step
from acprop_core.rule import Hyperparameters, flags_of, numbers_of
from acprop_torch._private import flatten_dense, foreach_add_, foreach_copy_, unflatten_dense

# Bytes that one operation sees at once. On a CPU they fit its cache, because temporaries of whole large tensors are new
# memory at every operation, and their page faults cost more than the arithmetic.
_CPU_TILE, _TILE = 3 * 2**17, 2**23
_SMALL = 2**17  # bytes: on a CPU, starting the operations on fewer costs more than gathering them into a tile

PLAIN = frozenset({torch.Tensor, torch.nn.Parameter})


class Batch(NamedTuple):
    """The rows of a parameter group, real tensors of equal shapes in a row, and the inputs of their step.

    They are kept as a row of lists, because with a thousand tuples more the garbage collector doubles a step's time.
    """

    columns: Row
    steps: list[Tensor]
    counts: list[int] | None  # None if they are not read
    hyper: Hyperparameters
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    @property
    def rows(self) -> list[Row]:
        """The rows one by one."""
        return rows_of(self.columns)

    def choose(self, members: Sequence[int]) -> "Batch":
        """Return the batch of some of the rows."""
        columns = Row(*([column[i] for i in members] for column in self.columns))
        counts = None if self.counts is None else [self.counts[i] for i in members]
        steps = [self.steps[i] for i in members]
        return Batch(columns, steps, counts, self.hyper, self.grad_scale, self.found_inf)


def rows_of(columns: Row) -> list[Row]:
    """Return a row of lists as rows."""
    return [Row(*row) for row in zip(*columns, strict=True)]


class Block(NamedTuple):
    """The input of one call of the rule: a row, a part of one, or copies of the `members`, back to back."""

    row: Row
    members: Sequence[Row] = ()


def step_of(batch: Batch, count: Any, namespace: Any = xp) -> Step:
    """Return step ``count + 1`` of a batch; no number is read if `count` is a tensor."""
    step = Step(numbers_of(batch.hyper, count, xp), flags_of(batch.hyper), namespace)
    if batch.grad_scale is None:
        return step
    scale = batch.grad_scale.squeeze().double() if isinstance(count, Tensor) else batch.grad_scale.item()
    return step.with_grad_scale(1.0 / scale)


def as_tensor(x: Any, dtype: torch.dtype = torch.float64) -> Any:
    """Return a number as a 0-d tensor on the CPU, which can be used with tensors of any device."""
    return torch.tensor(x, dtype=dtype, device="cpu") if isinstance(x, float) else x


def map_row(f: Callable[[Any], Any], row: Row) -> Row:
    """Return the row with `f` applied to all tensors in it."""
    return Row(*(None if x is None else f(x) for x in row))


def local_columns(columns: Row, has_complex: bool) -> Row:
    """Return the tensors that the rule works on: local shards of sharded ones, and complex ones as real."""
    # not by `PLAIN` or `all`, which torch's compiler cannot trace in versions before 2.9
    is_plain = not [x for x in columns.param if type(x) not in (Tensor, torch.nn.Parameter)]
    if is_plain and not has_complex:
        return columns
    rows = list(map(Row, *columns))
    if has_complex:
        rows = list(map(_real_row, rows))
    return columns_of(rows if is_plain else list(map(_local_row, rows)))


def columns_of(rows: Sequence[Row]) -> Row:
    """Return rows as a row of lists."""
    return Row(*map(list, zip(*rows, strict=True)))


def _real_row(row: Row) -> Row:
    # a gradient may be conjugated lazily; a parameter may not, because its memory is what counts
    row = Row(row.param, row.grad.resolve_conj(), row.mu, row.nu, row.carry)
    return map_row(lambda x: torch.view_as_real(x) if x.is_complex() else x, row)


def _local_row(row: Row) -> Row:
    if not hasattr(row.param, "to_local"):
        return row
    if row.grad.placements != row.param.placements:
        grad = row.grad.redistribute(placements=row.param.placements)
        row = Row(row.param, grad, row.mu, row.nu, row.carry)
    return map_row(lambda x: x.to_local(), row)


def note_sharded(groups: list[dict[str, Any]]) -> None:
    """Tell autograd of the step of sharded parameters, of which it sees the local part alone."""
    params = [p for group in groups for p in group["params"] if p.grad is not None]
    torch.autograd.graph.increment_version([p for p in params if hasattr(p, "to_local")])


def check_shapes(columns: Row) -> None:
    """Refuse tensors of different shapes, which torch would broadcast, or refuse in the middle of a step."""
    shape = attrgetter("shape")
    shapes = list(map(shape, columns.param))
    for others in columns[1:4]:
        if shapes != list(map(shape, others)):
            raise unequal(next(row for row in map(Row, *columns) if len({*map(shape, row[:4])}) > 1))
    for i, carry in enumerate(columns.carry):
        if carry is not None and carry.shape != shapes[i]:
            raise unequal(Row(*(column[i] for column in columns)))


def unequal(row: Row) -> RuntimeError:
    """Return the refusal of a row of different shapes."""
    shapes = ", ".join(str(tuple(x.shape)) for x in row if x is not None)
    names = "exp_avg and exp_avg_var" if row.carry is None else "exp_avg, exp_avg_var and carry"
    return RuntimeError(
        f"a parameter, its gradient, {names} have the shapes {shapes}; clear `optimizer.state`, or load the state of "
        "this model"
    )


def by_kind(batch: Batch) -> list[tuple[int, Batch]]:
    """Return the rows sorted by count, device and dtypes: each count with the batch of its rows."""
    counts = list(map(int, map(Tensor.item, batch.steps))) if batch.counts is None else batch.counts
    kinds: dict[Any, list[int]] = {}
    for i, (row, count) in enumerate(zip(batch.rows, counts, strict=True)):
        kinds.setdefault((count, *kind_of(row)), []).append(i)
    if len(kinds) == 1:
        return [(counts[0], batch)]
    return [(key[0], batch.choose(members)) for key, members in kinds.items()]


def kind_of(row: Row) -> tuple[Any, ...]:
    """Return device and dtypes of a row."""
    return row.param.device, row.param.dtype, row.grad.dtype, row.mu.dtype, row.nu.dtype


def contiguous(row: Row) -> Row | None:
    """Return the row as contiguous tensors, their axes permuted alike; None if there is no such order."""
    if all(x is None or x.is_contiguous() for x in row):
        return row
    order = sorted(range(row.param.ndim), key=row.param.stride, reverse=True)
    permuted = map_row(lambda x: x.permute(order), row)
    return permuted if all(x is None or x.is_contiguous() for x in permuted) else None


def blocks(rows: Sequence[Row], tile: int | None = None) -> Iterator[Block]:
    """Cut large tensors into tiles, and gather small ones on a CPU. The rows are alike in device and dtypes."""
    tile = tile or tile_of(rows[0])
    small: list[Row] = []
    gathered = 0
    for row in rows:
        size = row.mu.nbytes
        if is_small(row.mu):
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


def is_small(x: Tensor) -> bool:
    """Return whether `blocks` gathers a row of such tensors with others."""
    return x.is_cpu and x.nbytes < _SMALL


def tile_of(row: Row) -> int:
    """Return how many bytes of such a row one operation should see."""
    return _CPU_TILE if row.param.is_cpu else _TILE


def _gathered(rows: list[Row]) -> Block:
    if len(rows) == 1:
        return Block(rows[0])
    columns = zip(*rows, strict=True)
    return Block(Row(*(None if tensors[0] is None else flatten_dense(tensors) for tensors in columns)), rows)


def _tiles(row: Row, size: int) -> Iterator[Row]:
    if (flat := contiguous(row)) is not None:
        pieces = map_row(lambda x: x.view(-1).split(size), flat)
    else:
        axis = max(range(row.param.ndim), key=row.param.size)
        length = max(1, row.param.size(axis) * size // row.param.numel())
        pieces = map_row(lambda x: x.split(length, axis), row)
    return map(Row, *(repeat(None) if x is None else x for x in pieces))


def write(blocks: Sequence[Block], results: Sequence[tuple[Any, Any, Any, Any]]) -> None:
    """Add the updates to the parameters of the blocks, and replace moments and carries by the new ones."""
    updates, mus, nus, carries = zip(*results, strict=True)
    bring(updates, 0, blocks, foreach_add_)
    bring(mus, 2, blocks, foreach_copy_)
    bring(nus, 3, blocks, foreach_copy_)
    if carries[0] is not None:
        bring(carries, 4, blocks, foreach_copy_)


def bring(values: Sequence[Any], i: int, blocks: Sequence[Block], operation: Callable[..., None]) -> None:
    """Add or copy a value for each block to the i-th tensor of its row, or of the rows that it is made of."""
    targets: list[Tensor] = []
    parts: list[Tensor] = []
    for block, value in zip(blocks, values, strict=True):
        owners = [row[i] for row in block.members or [block.row]]
        targets += owners
        parts += unflatten_dense(value, owners) if block.members else [value]
    operation(targets, parts)


def skip_of(batch: Batch) -> Tensor | None:
    """Return a 0-d tensor that says whether nothing may change, which is not read; None if there is no `found_inf`."""
    return None if batch.found_inf is None else batch.found_inf.squeeze() != 0


def count_unless(skip: Tensor | None, steps: list[Tensor]) -> None:
    """Add one to the step counts, which are on a device, or nothing where the 0-d tensor `skip` is true."""
    foreach_add_(steps, 1 if skip is None else (~skip).to(steps[0].dtype))


def count_steps(steps: list[Tensor]) -> None:
    """Add one to the step counts."""
    if steps[0].is_cpu:
        one = torch.tensor(1.0, device="cpu")  # a Python number would become a tensor for every count
        foreach_add_(steps, one, alpha=1.0)
    else:
        foreach_add_(steps, 1)
