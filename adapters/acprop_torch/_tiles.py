"""The way to step of foreach=False, and of foreach=True on a CPU: tile after tile, with numbers of the host."""

import functools
from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from acprop_core.adapt import Row, Step, rounded_root
from acprop_core.kernels.calls import Operations, program_of
from acprop_torch._private import foreach_add_, foreach_copy_, is_intercepted
from acprop_torch._rows import PLAIN, Batch, as_tensor, blocks, bring, by_kind, count_steps, step_of, write


def prepare(batch: Batch) -> Callable[[], None]:
    """Return the step of a batch."""
    kinds = by_kind(batch)

    def run() -> None:
        for count, members in kinds:
            in_tiles(members, step_of(members, count))

    return run


def in_tiles(batch: Batch, step: Step) -> None:
    """Step rows that are alike in device and dtypes, as much at once as `blocks` says."""
    rows = batch.rows
    if _takes_outputs(rows):
        _by_program(rows, step, batch.steps)
        return
    step = step.map_numbers(as_tensor)  # torch would make a tensor of a Python number in every operation
    for i, block in enumerate(blocks(rows)):
        results = [step(block.row)]
        if i == 0:  # what has failed so far has changed nothing
            count_steps(batch.steps)
        write([block], results)


def _takes_outputs(rows: list[Row]) -> bool:
    """Return whether a program can step all rows: plain tensors on a CPU, without casts."""
    first = rows[0]
    dtypes = {*map(attrgetter("dtype"), first[:4])}
    plain = all(PLAIN.issuperset(map(type, row[:4])) for row in rows)
    return not is_intercepted() and first.param.is_cpu and plain and dtypes in ({torch.float32}, {torch.float64})


def _by_program(rows: list[Row], step: Step, steps: list[Tensor]) -> None:
    # The operations write into a few registers that stay in the cache, because operators would make a tensor each.
    dtype = rows[0].mu.dtype
    numbers, flags, *_ = step.cast_for(dtype, dtype)
    program = program_of(flags, numbers, functools.partial(_operand, dtype), _OPERATIONS)
    memory = torch.empty((program.registers, 0), dtype=dtype, device="cpu")
    registers: list[Tensor] = []
    shape = None
    for number, block in enumerate(blocks(rows)):
        if block.row.param.shape != shape:
            shape = block.row.param.shape
            if shape.numel() > memory.shape[1]:
                memory = memory.new_empty((program.registers, shape.numel()))
            registers = [x[: shape.numel()].view(shape) for x in memory]
        update = program.run([*block.row[:4], *program.numbers, *registers])
        if number == 0:  # as above
            count_steps(steps)
        # added in place, not to a copy that is written later, because another parameter may share the memory
        bring([update], 0, [block], foreach_add_)
        for i in (2, 3) if block.members else ():  # copies, which the program has written
            bring([block.row[i]], i, [block], foreach_copy_)
        del block  # free the gathered tensors before more are gathered


def _operand(dtype: torch.dtype, name: str, value: float) -> Any:
    # as above, but numbers clip faster; and in their dtype, because a wider number would widen parameters without axes
    return value if name == "limit" else as_tensor(value, dtype)


def _sqrt(x: Tensor, out: Tensor) -> None:
    root = rounded_root(x, out)
    if root is not out:
        out.copy_(root)


_OPERATIONS = Operations(
    add=lambda x, y, out: torch.add(x, y, out=out),
    subtract=lambda x, y, out: torch.sub(x, y, out=out),
    multiply=lambda x, y, out: torch.mul(x, y, out=out),
    divide=lambda x, y, out: torch.div(x, y, out=out),
    sqrt=_sqrt,
    clip=lambda x, low, high, out: torch.clamp(x, low, high, out=out),
    copy=lambda x, out: out.copy_(x),
)
