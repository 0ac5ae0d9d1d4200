"""The engine "cuda": one launch for all CuPy arrays of a device that are alike in dtypes, compiled by numba-cuda.

It has not yet run on a device: its logic is tested with the kernel in Numba's simulator.
"""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from acprop_core import rule
from acprop_core.adapt import Array
from acprop_core.kernels import cuda, element
from acprop_core.kernels.sixteen_bits import is_compiled
from acprop_stepper._buffers import Buffer
from acprop_stepper._tiles import Tiles
from acprop_stepper._upcoming import Upcoming
from acprop_stepper._work import Task


class Cuda:
    """All buffers of one dtype and device, as a table of addresses."""

    def __init__(self, buffers: Sequence[Buffer], capability: tuple[int, int]) -> None:
        self.leaves = [leaf for buffer in buffers for leaf in buffer.leaves]
        self._tiles = [Tiles(buffer) for buffer in buffers]
        self._first = first = buffers[0]
        self._kind = first.params[0].dtype.name, first.mu.dtype.name, capability
        rows = [
            (x, *buffer.kept(i)[:2], buffer.kept(i)[2] if buffer.carry is not None else x)
            for buffer in buffers
            for i, x in enumerate(buffer.params)
        ]
        # no address of a count: the stepper counts on the host
        self._table = np.zeros((element.ROWS, len(rows)), np.int64)
        for i, row in enumerate(rows):
            self._table[[element.PARAM, element.MU, element.NU, element.CARRY], i] = list(map(address, row))
        self._table[element.SIZE] = [x.size for x, *_ in rows]
        self._decaying = np.concatenate([np.full(len(x.params), x.decays, np.int64) for x in buffers])
        # the table and stream of the last step, and copies on the device: of it and of the chunks
        self._sent: Any = None

    @staticmethod
    def fits(buffer: Buffer) -> bool:
        """Return whether the compiled step can take all parameters of this buffer."""
        return is_compiled(buffer.params[0].dtype.name, buffer.mu.dtype.name) and all(map(is_plain, buffer.params))

    def calls_suffice(self, threads: int) -> bool:
        """Return False: launching a kernel runs Python code."""
        return False

    def tasks(self, grads: Sequence[Array | None], now: Upcoming) -> list[Task]:
        """Return the tasks of one step; gradients that the compiled step cannot take are left to tiles."""
        first, xp = self._first, self._first.xp
        numbers, flags, _, real = now.step.cast_for(
            first.mu.dtype, first.params[0].dtype, has_carry=first.carry is not None
        )
        # compiled before anything is written; whether an array decays is in the table
        launcher = cuda.launcher_of(flags._replace(decay=rule.Decay.NONE, scaled=True), *self._kind)
        plain = [i for i, g in enumerate(grads) if g is not None and is_plain(g)]
        table = self._table.take(plain, axis=1)  # row by row in memory, which indexing does not promise
        table[element.GRAD] = [address(grads[i]) for i in plain]
        table[element.DECAY] = int(flags.decay) * self._decaying[plain]
        values = np.zeros((len(plain), cuda.NUMBERS), np.dtype(real))
        values[:, : cuda.FIELDS] = numbers
        others = dict(zip(self.leaves, grads, strict=True)) | dict.fromkeys(self.leaves[i] for i in plain)
        tasks = [task for tiles in self._tiles for task in tiles.tasks([others[i] for i in tiles.leaves], now)]
        # the kernel has only the addresses of the gradients, so the task holds them
        launch = functools.partial(self._launch, launcher, table, values, grads, first.place(), xp)
        return [launch, *tasks] if plain else tasks

    def _launch(self, launcher: Any, table: Any, values: Any, grads: Any, place: Any, xp: Any) -> None:
        with place():
            queue = stream(xp)
            if self._sent is None or self._sent[1] != queue or not np.array_equal(self._sent[0], table):
                self._sent = table, queue, xp.asarray(table), xp.asarray(cuda.chunks_of(table[element.SIZE]))
            *_, on_device, chunks = self._sent
            numbers = xp.asarray(values)
            where = address(on_device), table.shape[1], address(chunks), len(chunks)
            launcher.run(*queue, *where, options=0, numbers=address(numbers))


def address(x: Array) -> int:
    """Return where the data of a CuPy array begin."""
    return int(x.data.ptr)


def is_plain(x: Array) -> bool:
    """Return whether the kernel can read an array."""
    return bool(x.flags.c_contiguous) and address(x) % x.itemsize == 0


def stream(xp: Any) -> tuple[int, int]:
    """Return the number of the current device, and the handle of the current stream."""
    return xp.cuda.runtime.getDevice(), xp.cuda.get_current_stream().ptr
