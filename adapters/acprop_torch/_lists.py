"""The way to step of foreach=True: lists of tensors, on which the rule runs as on one array."""

from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from acprop_core.adapt import Row, Step, rounded_root
from acprop_torch import _private as private
from acprop_torch._rows import (
    Batch,
    Block,
    blocks,
    by_kind,
    count_steps,
    count_unless,
    kind_of,
    rows_of,
    skip_of,
    step_of,
    tile_of,
    write,
)
from acprop_torch._tiles import in_tiles


def prepare(batch: Batch) -> Callable[[], None]:
    """Return the step of a batch, with numbers of the host."""
    kinds = by_kind(batch)

    def run() -> None:
        for count, members in kinds:
            if members.columns.param[0].is_cpu:  # there torch's operations on lists are loops themselves
                in_tiles(members, step_of(members, count))
            else:
                _in_lists(members, step_of(members, count, _namespace))

    return run


def prepare_traced(batch: Batch) -> Callable[[], None]:
    """Return the step of a batch that reads no number, each tensor with the numbers of its own count.

    Gradients are divided by `grad_scale`, and nothing changes where `found_inf` is not 0.
    """

    def run() -> None:
        skip = skip_of(batch)
        kinds: dict[Any, list[int]] = {}
        for i, row in enumerate(rows_of(batch.columns)):
            kinds.setdefault(kind_of(row), []).append(i)
        for members in map(batch.choose, kinds.values()):
            step = step_of(members, torch.stack(members.steps), _namespace)
            start = 0
            for chunk in _chunks(map(Block, rows_of(members.columns))):
                own = step.map_numbers(_own(slice(start, start + len(chunk))))
                results = _results_of(chunk, own)
                write(chunk, results if skip is None else [_kept(skip, *x) for x in zip(chunk, results, strict=True)])
                start += len(chunk)
        count_unless(skip, batch.steps)

    return run


def _kept(skip: Tensor, block: Block, result: Any) -> tuple[Any, ...]:
    """Return results that change nothing where `skip` is true: no sum with -0.0 differs from the other number."""
    update, *new = result
    kept = (None if y is None else torch.where(skip, x, y) for x, y in zip(block.row[2:], new, strict=True))
    return torch.where(skip, -0.0, update), *kept


def _own(part: slice) -> Callable[[Any], Any]:
    """Return a function that takes the part of numbers that differ from tensor to tensor."""
    return lambda x: TensorList(x[part].unbind()) if isinstance(x, Tensor) and x.ndim == 1 else x


def _in_lists(batch: Batch, step: Step) -> None:
    for i, chunk in enumerate(_chunks(blocks(batch.rows))):
        results = _results_of(chunk, step)
        if i == 0:  # what has failed so far has changed nothing
            count_steps(batch.steps)
        write(chunk, results)


def _results_of(chunk: list[Block], step: Step) -> list[Any]:
    columns = zip(*(block.row for block in chunk), strict=True)
    results = step(Row(*(None if tensors[0] is None else TensorList(tensors) for tensors in columns)))
    lists = ([None] * len(chunk) if x is None else x.tensors for x in results)
    return list(zip(*lists, strict=True))


def _chunks(blocks: Iterable[Block]) -> Iterable[list[Block]]:
    """Sort blocks into lists that are, together, as large as a tile."""
    chunk: list[Block] = []
    size = 0
    for block in blocks:
        own = block.row.mu.numel() * block.row.mu.element_size()  # nbytes is refused where a traced size is a symbol
        if chunk and size + own > tile_of(block.row):
            yield chunk
            chunk, size = [], 0
        chunk.append(block)
        size += own
    if chunk:
        yield chunk


class TensorList:
    """Tensors of one dtype and device, treated as one array; a number or a 0-d tensor holds for all."""

    def __init__(self, tensors: tuple[Tensor, ...] | list[Tensor]) -> None:
        self.tensors = tensors

    @property
    def dtype(self) -> torch.dtype:
        return self.tensors[0].dtype

    @property
    def shape(self) -> tuple[int]:
        return (len(self.tensors),)

    def __neg__(self) -> "TensorList":
        return TensorList(private.foreach_neg(self.tensors))

    def __add__(self, other: Any) -> "TensorList":
        return TensorList(private.foreach_add(self.tensors, _operand(other)))

    def __sub__(self, other: Any) -> "TensorList":
        return TensorList(private.foreach_sub(self.tensors, _operand(other)))

    def __mul__(self, other: Any) -> "TensorList":
        return TensorList(private.foreach_mul(self.tensors, _operand(other)))

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> "TensorList":
        return TensorList(private.foreach_div(self.tensors, _operand(other)))


def _operand(x: Any) -> Any:
    return x.tensors if isinstance(x, TensorList) else x


def _clip(x: TensorList, low: Any, high: Any) -> TensorList:
    clipped = private.foreach_clamp_min(x.tensors, _operand(low))
    private.foreach_clamp_max_(clipped, _operand(high))
    return TensorList(clipped)


def _sqrt(x: TensorList) -> TensorList:
    roots = private.foreach_sqrt(x.tensors)
    return TensorList(roots if torch.compiler.is_compiling() else list(map(rounded_root, x.tensors, roots)))


def _where(condition: Tensor, x: Any, y: Any) -> Any:
    if isinstance(x, Tensor):
        return torch.where(condition, x, y)
    return TensorList([torch.where(condition, a, b) for a, b in zip(x.tensors, y.tensors, strict=True)])


def _astype(x: Any, dtype: torch.dtype) -> Any:
    return TensorList([y.to(dtype) for y in x.tensors]) if isinstance(x, TensorList) else x.to(dtype)


_namespace = SimpleNamespace(
    float32=torch.float32,
    float64=torch.float64,
    sqrt=_sqrt,
    abs=lambda x: TensorList(private.foreach_abs(x.tensors)),
    maximum=lambda x, y: TensorList(private.foreach_maximum(x.tensors, y.tensors)),
    round=lambda x: TensorList(private.foreach_round(x.tensors)),
    clip=_clip,
    where=_where,
    astype=_astype,
)
