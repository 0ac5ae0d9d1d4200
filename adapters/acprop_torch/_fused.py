"""The ways to step that are compiled: each device by its compiler, and the rest by the rule uncompiled."""

from collections.abc import Callable

import torch

from acprop_core import kernels
from acprop_core.adapt import Row
from acprop_torch import _cuda, _inductor, _lists, _numba
from acprop_torch._rows import PLAIN, Batch, by_kind, check_shapes, columns_of, contiguous
from acprop_torch._tiles import prepare as prepare_tiles

Run = Callable[[], None]


def prepare(batch: Batch) -> tuple[Batch | None, list[Run]]:
    """Return the rows for Numba, which steps those of all groups at once, and the steps of the others."""
    devices: dict[torch.device, list[int]] = {}
    for i, param in enumerate(batch.columns.param):
        devices.setdefault(param.device, []).append(i)
    compiled: list[int] = []
    runs: list[Run] = []
    for device, members in devices.items():
        own = batch if len(devices) == 1 else batch.choose(members)
        if device.type == "cpu" and own.found_inf is not None and own.found_inf.item():
            continue
        if device.type == "cpu" and not _numba.has_numba():
            _numba.warn_of_torch_compile()
            check_shapes(own.columns)
            runs += [run for count, alike in by_kind(own) for run in _prepare_kind(alike, count)]
        elif device.type == "cpu" or _cuda.has_numba_cuda(device):
            plain, others = _prepare_by_numba(own)
            compiled += [members[i] for i in plain]
            runs += others
        else:
            runs += prepare_on_accelerator(own)
    if len(compiled) == len(batch.steps):
        return batch, runs
    return batch.choose(sorted(compiled)) if compiled else None, runs


def prepare_default(batch: Batch) -> tuple[Batch | None, list[Run]]:
    """Return the same where nothing is asked for: on a CPU, by Numba where it works, and otherwise by tiles."""
    if not (_numba.has_numba() and kernels.numba_works()):
        check_shapes(batch.columns)
        return None, [prepare_tiles(batch)]
    plain, runs = _prepare_by_numba(batch)
    if len(plain) == len(batch.steps):
        return batch, runs
    return batch.choose(plain) if plain else None, runs


def prepare_on_accelerator(batch: Batch) -> list[Run]:
    """Return the steps of a batch on one accelerator: compiled by torch for memory, and otherwise by the rule on lists.

    Read no value here: it would synchronize with the device.
    """
    check_shapes(batch.columns)
    device = batch.columns.param[0].device
    scale, found = (None if x is None else x.to(device, non_blocking=True) for x in (batch.grad_scale, batch.found_inf))
    batch = batch._replace(grad_scale=scale, found_inf=found)
    memory = {i: flat for i, row in enumerate(batch.rows) if (flat := _as_memory(row)) is not None}
    runs = []
    if memory:
        compiled = batch.choose(list(memory))._replace(columns=columns_of(list(memory.values())))
        runs.append(_inductor.prepare_on_accelerator(compiled))
    if others := [i for i in range(len(batch.steps)) if i not in memory]:
        runs.append(_lists.prepare_traced(batch.choose(others)))
    return runs


def _as_memory(row: Row) -> Row | None:
    is_plain = PLAIN.issuperset(map(type, row[:4])) and not (row.param.is_neg() or row.grad.is_neg())
    return contiguous(row) if is_plain else None


def _prepare_by_numba(batch: Batch) -> tuple[list[int], list[Run]]:
    """Return which rows of one device Numba can step, and the step of the others."""
    check_shapes(batch.columns)
    plain = _numba.plain_members(batch)
    if len(plain) == len(batch.steps):
        return plain, []
    others = batch.choose(sorted({*range(len(batch.steps))}.difference(plain)))
    if batch.columns.param[0].is_cpu:  # the rule uncompiled, operation by operation
        return plain, [prepare_tiles(others)]
    return plain, prepare_on_accelerator(others)


def _prepare_kind(batch: Batch, count: int) -> list[Run]:
    """Return the steps of rows alike in dtypes without Numba: compiled by torch where they are plain memory."""
    # Other rows take the rule uncompiled. So do 16-bit tensors, because the rule rounds in between and torch's compiler
    # would leave that out.
    rows = batch.rows
    plain = {i: contiguous(rows[i]) for i in _numba.plain_members(batch)}
    runs = []
    if plain:
        compiled = batch.choose(list(plain))._replace(columns=columns_of(list(map(_not_none, plain.values()))))
        runs.append(_inductor.prepare(compiled, count))
    if others := [i for i in range(len(batch.steps)) if i not in plain]:
        runs.append(prepare_tiles(batch.choose(others)))
    return runs


def _not_none(row: Row | None) -> Row:
    assert row is not None  # `plain_members` has looked
    return row
