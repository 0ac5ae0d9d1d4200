"""The way to step of fused=True without Numba, or on an accelerator: one program by torch.compile for each tensor."""

import sys
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from acprop_core import kernels
from acprop_core.adapt import Row
from acprop_core.rule import Flags, Numbers
from acprop_torch import _rows
from acprop_torch._private import foreach_add_, foreach_copy_
from acprop_torch._rows import PLAIN, Batch, blocks, bring, map_row, step_of
from acprop_torch._traced import step_in_place

Program = Callable[[Row, Numbers, Flags, Tensor | None], None]

_programs: dict[Any, Program] = {}  # by all on which a program depends
_LARGE = 2**20  # elements: as many are enough for torch to choose a program for large tensors


def prepare(batch: Batch, count: int) -> Callable[[], None]:
    """Return the step of a batch of plain rows on a CPU that are alike in dtypes and have taken `count` steps."""
    step = step_of(batch, count)
    # Tensors, because the compiled function would contain Python numbers, and convert them anew for every few elements
    dtype = batch.columns.mu[0].dtype
    numbers = Numbers(*(_rows.as_tensor(x, dtype) for x in step.numbers))
    programs: dict[int, Program] = {}
    for kind, size in _sizes_of_blocks(batch.columns.mu).items():
        try:
            programs[kind] = _compile(Row(*(column[0] for column in batch.columns)), size, numbers, step.flags, None)
        except Exception as error:
            if (why := kernels.why_no_numba()) is None:
                raise
            said = str(error).partition("\n")[0]
            raise RuntimeError(
                f"fused=True finds no compiler: Numba cannot be used ({why}), and torch.compile raises "
                f"{type(error).__name__} ({said}); install one, or use fused=False"
            ) from error

    def run() -> None:
        torch.autograd.graph.increment_version(batch.columns.param)
        for block in blocks(batch.rows, tile=sys.maxsize):
            program = programs[min(block.row.mu.numel(), 2)]
            program(map_row(_memory, block.row), numbers, step.flags, None)
            for i in (0, 2, 3) if block.members else ():
                bring([block.row[i]], i, [block], foreach_copy_)
        _rows.count_steps(batch.steps)

    return run


def prepare_on_accelerator(batch: Batch) -> Callable[[], None]:
    """Return the step of a batch on one accelerator. Read no value here: it would synchronize with the device."""
    _rows.check_shapes(batch.columns)
    device = batch.columns.param[0].device
    scale, found = (None if x is None else x.to(device, non_blocking=True) for x in (batch.grad_scale, batch.found_inf))
    batch = batch._replace(grad_scale=scale)
    skip = None if found is None else found.squeeze() != 0
    step = step_of(batch, torch.stack(batch.steps))
    numbers = list(map(_rows.as_tensor, step.numbers))
    calls = []
    for i, row in enumerate(map(_as_memory, batch.rows)):
        own = Numbers(*(x[i] if x.ndim == 1 else x for x in numbers))
        size = row.param.numel() if row.param.ndim == 1 else None
        calls.append((_compile(row, size, own, step.flags, skip), row, own))

    def run() -> None:
        for program, row, own in calls:
            program(map_row(Tensor.detach, row), own, step.flags, skip)
        torch.autograd.graph.increment_version(batch.columns.param)
        foreach_add_(batch.steps, 1 if skip is None else (~skip).to(batch.steps[0].dtype))

    return run


def _sizes_of_blocks(tensors: list[Tensor]) -> dict[int, int]:
    """Return one size for each program that `blocks` of these need: torch has others for 0 elements, 1, and more."""
    sizes = [x.numel() for x in tensors if not _rows.is_small(x)]
    if small := [x.numel() for x in tensors if _rows.is_small(x)]:
        sizes.append(sum(small))
    return {min(size, 2): size for size in sorted(sizes)}


def _compile(row: Row, size: int | None, numbers: Numbers, flags: Flags, skip: Tensor | None) -> Program:
    """Return the program for such a row; if it is new, compile it, by a call on other tensors.

    Compiling takes seconds; if it fails or Ctrl-C arrives then, nothing has changed. The tensors have this size, on
    which the compiler's choices depend, or are copies.
    """
    kinds = (None if x is None else (type(x), x.dtype, x.device) for x in row)
    sizes = row.param.shape if size is None else (size,)
    key = (flags, skip is None, size is None, *(min(n, 2) for n in sizes), *kinds)
    program = _programs.get(key)
    if program is None:
        # Torch allows a few programs for each code object, so that each kind of rows has a copy of the code.
        program = torch.compile(
            FunctionType(step_in_place.__code__.replace(), step_in_place.__globals__), dynamic=True, fullgraph=True
        )
        n = min(size or 0, _LARGE)
        program(map_row(Tensor.clone if size is None else lambda x: x.new_zeros(n), row), numbers, flags, skip)
        _programs[key] = program
    return program


def _as_memory(row: Row) -> Row:
    flat = _rows.contiguous(row)
    is_plain = PLAIN.issuperset(map(type, row[:4])) and not (row.param.is_neg() or row.grad.is_neg())
    return map_row(_memory, flat) if flat is not None and is_plain else row


def _memory(x: Tensor) -> Tensor:
    """Return a contiguous tensor as a 1-D one that is not a view of it, so that the compiler sees one shape only."""
    flat = torch.empty(0, dtype=x.dtype, device=x.device)
    return flat.set_(x.untyped_storage(), x.storage_offset(), (x.numel(),), (1,))
