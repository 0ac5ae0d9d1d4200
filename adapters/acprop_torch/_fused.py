"""The ways to step that are compiled: each device by its compiler, and the rest by the rule uncompiled."""

from collections.abc import Callable
from operator import attrgetter

import torch

from acprop_core import kernels
from acprop_core.adapt import Row
from acprop_torch import _inductor, _numba
from acprop_torch._rows import Batch, by_kind, check_shapes, columns_of, contiguous
from acprop_torch._tiles import prepare as prepare_tiles

Run = Callable[[], None]


def prepare(batch: Batch) -> tuple[Batch | None, list[Run]]:
    """Return the rows for Numba, which steps those of all groups at once, and the steps of the others."""
    batches = [batch]
    if not all(map(attrgetter("is_cpu"), batch.columns.param)):
        devices: dict[torch.device, list[int]] = {}
        for i, param in enumerate(batch.columns.param):
            devices.setdefault(param.device, []).append(i)
        batches = list(map(batch.choose, devices.values()))
    compiled, runs = None, []
    for members in batches:
        if not members.columns.param[0].is_cpu:
            runs.append(_inductor.prepare_on_accelerator(members))
        elif members.found_inf is None or not members.found_inf.item():
            if _numba.has_numba():
                compiled, others = _prepare_by_numba(members)
                runs += others
            else:
                _numba.warn_of_torch_compile()
                check_shapes(members.columns)
                runs += [run for count, alike in by_kind(members) for run in _prepare_kind(alike, count)]
    return compiled, runs


def prepare_default(batch: Batch) -> tuple[Batch | None, list[Run]]:
    """Return the same where nothing is asked for: on a CPU, by Numba where it works, and otherwise by tiles."""
    if _numba.has_numba() and kernels.numba_works():
        return _prepare_by_numba(batch)
    check_shapes(batch.columns)
    return None, [prepare_tiles(batch)]


def _prepare_by_numba(batch: Batch) -> tuple[Batch | None, list[Run]]:
    check_shapes(batch.columns)
    plain = _numba.plain_members(batch)
    if len(plain) == len(batch.steps):
        return batch, []
    # Other rows take the rule uncompiled, operation by operation.
    others = batch.choose(sorted({*range(len(batch.steps))}.difference(plain)))
    return batch.choose(plain) if plain else None, [prepare_tiles(others)]


def _prepare_kind(batch: Batch, count: int) -> list[Run]:
    """Return the steps of rows alike in dtypes without Numba: compiled by torch where they are plain memory."""
    # Other rows take the rule uncompiled. So do 16-bit tensors, because the rule rounds in between and torch's compiler
    # would leave that out.
    plain = {i: contiguous(batch.rows[i]) for i in _numba.plain_members(batch)}
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
