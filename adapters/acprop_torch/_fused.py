"""The way to step of fused=True: each device by its compiler, and the rest by the rule uncompiled."""

from collections.abc import Callable
from operator import attrgetter

import torch

from acprop_core.adapt import Row
from acprop_torch import _inductor, _numba
from acprop_torch._numba import Memory
from acprop_torch._rows import Batch, by_kind, check_shapes, columns_of, contiguous
from acprop_torch._tiles import prepare as prepare_tiles


def prepare(batch: Batch, known: dict[int, Memory], group: int, check: Callable[[], None]) -> Callable[[], None]:
    """Return the step of a batch.

    `known` remembers for each group where its rows are. `check` refuses bad tensors of a group that has changed.
    """
    batches = [batch]
    if not all(map(attrgetter("is_cpu"), batch.columns.param)):
        devices: dict[torch.device, list[int]] = {}
        for i, param in enumerate(batch.columns.param):
            devices.setdefault(param.device, []).append(i)
        batches = list(map(batch.choose, devices.values()))
    runs = []
    for members in batches:
        if not members.columns.param[0].is_cpu:
            runs.append(_inductor.prepare_on_accelerator(members))
        elif members.found_inf is None or not members.found_inf.item():
            runs += _prepare_on_cpu(members, known, group, check)

    def run() -> None:
        for part in runs:
            part()

    return run


def _prepare_on_cpu(
    batch: Batch, known: dict[int, Memory], group: int, check: Callable[[], None]
) -> list[Callable[[], None]]:
    if _numba.has_numba() and (memory := _numba.memory_of(batch.columns, known.get(group))) is not None:
        known[group] = memory
        counts = {*batch.counts} if batch.counts else ()
        if len(counts) == 1:  # the usual case
            return [_numba.prepare(batch, memory, *counts)]
    if known.pop(group, None) is not None:
        check()
    check_shapes(batch.columns)
    return [run for count, members in by_kind(batch) for run in _prepare_kind(members, count)]


def _prepare_kind(batch: Batch, count: int) -> list[Callable[[], None]]:
    """Return the steps of rows alike in dtypes: compiled where they are plain memory."""
    # Other rows take the rule uncompiled, operation by operation. So do 16-bit tensors without Numba, because the rule
    # rounds in between and torch's compiler would leave that out.
    plain = list(map(_as_plain, batch.rows))
    runs = []
    compiled = batch.choose([i for i, row in enumerate(plain) if row is not None])
    if rows := [row for row in plain if row is not None]:
        compiled = compiled._replace(columns=columns_of(rows))
        if _numba.has_numba() and (memory := _numba.memory_of(compiled.columns, None)) is not None:
            runs.append(_numba.prepare(compiled, memory, count))
        else:
            runs.append(_inductor.prepare(compiled, count))
    if others := [i for i, row in enumerate(plain) if row is None]:
        runs.append(prepare_tiles(batch.choose(others)))
    return runs


def _as_plain(row: Row) -> Row | None:
    flat = contiguous(row)
    return flat if flat is not None and _numba.are_plain(columns_of([flat])) else None
