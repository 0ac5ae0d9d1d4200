"""The way to step of fused=True without Numba: programs by torch.compile, of one tensor, or of several."""

import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import pairwise
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from acprop_core import kernels
from acprop_core.adapt import Row
from acprop_core.rule import Flags, Numbers
from acprop_torch import _rows
from acprop_torch._private import foreach_copy_
from acprop_torch._rows import Batch, blocks, bring, count_unless, map_row, skip_of, step_of
from acprop_torch._traced import step_in_place

Program = Callable[[Sequence[Row], Numbers, Flags, Tensor | None], None]

_programs: dict[Any, Program] = {}  # by all on which a program depends
_LARGE = 2**20  # elements: as many are enough for torch to choose a program for large tensors
_TOGETHER = 8  # rows of one call on an accelerator: 512 tensors take half of the time, and compiling as long as before


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
            program([map_row(_memory, block.row)], numbers, step.flags, None)
            for i in (0, 2, 3) if block.members else ():
                bring([block.row[i]], i, [block], foreach_copy_)
        _rows.count_steps(batch.steps)

    return run


def prepare_on_accelerator(batch: Batch) -> Callable[[], None]:
    """Return the step of a batch of contiguous rows on one accelerator, several in a call; no value is read."""
    skip = skip_of(batch)
    kinds: dict[Any, list[int]] = {}
    for i, row in enumerate(batch.rows):
        kinds.setdefault((min(row.param.numel(), 2), _dtypes_of(row)), []).append(i)
    calls = []
    for (size, _), members in kinds.items():
        own = batch.choose(members)
        step = step_of(own, torch.stack(own.steps))
        numbers = list(map(_rows.as_tensor, step.numbers))
        rows = [map_row(_memory, row) for row in own.rows]
        together = len(rows) - len(rows) % _TOGETHER if size == 2 and not _share_memory(rows) else 0
        starts = [*range(0, together, _TOGETHER), *range(together, len(rows))]
        for start, end in pairwise([*starts, len(rows)]):
            chosen = Numbers(*(_memory(x[start:end]) if x.ndim else x for x in numbers))
            program = _compile(rows[start], rows[start].mu.numel(), chosen, step.flags, skip, end - start)
            calls.append((program, rows[start:end], chosen, step.flags))

    def run() -> None:
        for program, rows, numbers, flags in calls:
            program(rows, numbers, flags, skip)
        torch.autograd.graph.increment_version(batch.columns.param)
        count_unless(skip, batch.steps)

    return run


def _sizes_of_blocks(tensors: list[Tensor]) -> dict[int, int]:
    """Return one size for each program that `blocks` of these need: torch has others for 0 elements, 1, and more."""
    sizes = [x.numel() for x in tensors if not _rows.is_small(x)]
    if small := [x.numel() for x in tensors if _rows.is_small(x)]:
        sizes.append(sum(small))
    return {min(size, 2): size for size in sorted(sizes)}


def _compile(row: Row, size: int, numbers: Numbers, flags: Flags, skip: Tensor | None, together: int = 1) -> Program:
    """Return the program for so many rows together; if it is new, compile it, by a call on other tensors.

    Compiling takes seconds; if it fails or Ctrl-C arrives then, nothing has changed. The tensors have about this size,
    on which the compiler's choices depend.
    """
    key = (flags, skip is None, together, min(size, 2), _dtypes_of(row))
    program = _programs.get(key)
    if program is None:
        # Torch allows a few programs for each code object, so that each kind of rows has a copy of the code.
        program = torch.compile(
            FunctionType(_step_rows.__code__.replace(), _step_rows.__globals__), dynamic=True, fullgraph=True
        )
        sizes = [min(size, _LARGE)]
        if together > 1:
            # All different, also from the number of rows: a program takes only tensors whose sizes are equal where they
            # were equal as it was compiled.
            sizes = [max(sizes[0], together + 1) + i for i in range(together)]
        columns = Row(*([None] * together if x is None else [x.new_zeros(n) for n in sizes] for x in row))
        if row.mu.is_cpu:
            program = _with_constants_on_a_cpu(program)
        program(_rows.rows_of(columns), numbers, flags, skip)
        _programs[key] = program
    return program


def _with_constants_on_a_cpu(program: Program) -> Program:
    """Return the program, to be compiled and called as if a CPU were the default device.

    Inductor of torch 2.8 would make the constants of the program on another one, and the process would crash.
    """

    def call(*args: Any) -> None:
        # torch.get_default_device of 2.6 does not know of `with torch.device(...)`
        with nullcontext() if torch.empty(0).is_cpu else torch.device("cpu"):
            program(*args)

    return call


def _step_rows(rows: Sequence[Row], numbers: Numbers, flags: Flags, skip: Tensor | None) -> None:
    """Step rows as `step_in_place`, with numbers of each, or for all."""
    for i, row in enumerate(rows):
        step_in_place(row, Numbers(*[x[i] if x.ndim else x for x in numbers]), flags, skip)


def _dtypes_of(row: Row) -> Any:
    return tuple(None if x is None else (x.dtype, x.device) for x in row)


def _share_memory(rows: Sequence[Row]) -> bool:
    """Return whether two of the tensors that a step writes share bytes: in one program one would not see the other."""
    written = [x for row in rows for x in (row.param, *row[2:]) if x is not None]
    spans = sorted((x.data_ptr(), x.data_ptr() + x.nbytes) for x in written)
    return any(end > start for (_, end), (start, _) in pairwise(spans))


def _memory(x: Tensor) -> Tensor:
    """Return a contiguous tensor as a 1-D one that begins where its storage does, and is not a view.

    So the compiler sees one shape only. It makes other programs for views, and where the offset is 0, and not.
    """
    storage, start = x.untyped_storage(), x.storage_offset() * x.element_size()
    if start:
        storage = storage[start : start + x.nbytes]  # the same memory, which it keeps alive
    return torch.empty(0, dtype=x.dtype, device=x.device).set_(storage, 0, (x.numel(),), (1,))
