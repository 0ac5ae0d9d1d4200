"""The engine "numba": one pass over memory, for contiguous real NumPy arrays."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from acprop_core.adapt import Array, Step
from acprop_core.kernels import cpu
from acprop_core.kernels.sixteen_bits import is_readable
from acprop_stepper._buffers import Buffer
from acprop_stepper._overlap import addresses
from acprop_stepper._tiles import Tiles
from acprop_stepper._work import Task

RUN = 2**20  # elements of one task for threads: many enough to hide the call, few enough to share


class Numba:
    """All buffers of one dtype, as a table of addresses."""

    def __init__(self, buffers: Sequence[Buffer]) -> None:
        self.leaves = [leaf for buffer in buffers for leaf in buffer.leaves]
        self._tiles = [Tiles(buffer) for buffer in buffers]
        self._first = buffers[0]
        self._dtypes = self._first.params[0].dtype.name, self._first.mu.dtype.name
        self._decays = np.concatenate([np.full(len(buffer.params), buffer.decays) for buffer in buffers])
        self._sizes = np.array([x.size for buffer in buffers for x in buffer.params], np.int64)
        columns = [
            (x, mu, nu, x if carry is None else carry)
            for buffer in buffers
            for x, (mu, nu, carry) in zip(buffer.params, map(buffer.kept, range(len(buffer.params))), strict=True)
        ]
        param, mu, nu, carry = (addresses(column) for column in zip(*columns, strict=True))
        self._table = np.stack([param, param, mu, nu, carry])  # the second row is for the gradients

    @staticmethod
    def fits(buffer: Buffer) -> bool:
        """Return whether the compiled step can take all parameters of this buffer."""
        if buffer.mu.dtype != buffer.nu.dtype:  # complex numbers
            return False
        return is_readable(buffer.params[0].dtype.name, buffer.mu.dtype.name) and all(
            x.flags.carray for x in buffer.params
        )

    def run(self, grads: Any, step: Step, done: Any) -> None:
        """Step all parameters by one call, which increments `done` at its end; `grads` are addresses of all of them."""
        kernel, table, rest = self._arguments(grads[self.leaves], step)
        kernel(table, self._sizes, *rest, done)

    def tasks(self, grads: Sequence[Array | None], step: Step) -> list[Task]:
        """Return the tasks of one step; gradients that the compiled step cannot take are left to tiles."""
        if not all(g is not None and g.flags.c_contiguous and g.flags.aligned for g in grads):
            by_leaf = dict(zip(self.leaves, grads, strict=True))
            return [task for tiles in self._tiles for task in tiles.tasks([by_leaf[i] for i in tiles.leaves], step)]
        kernel, table, rest = self._arguments(addresses(grads), step)
        own, moments = self._first.params[0].itemsize, self._first.mu.itemsize
        cuts = range(0, int(self._sizes.sum()), RUN)
        parts = (cpu.part_of(table, self._sizes, (own, moments), cut, cut + RUN) for cut in cuts)

        def task(*part: Any) -> None:
            kernel(*part, *rest, np.zeros(1, np.int64))
            len(grads)  # the kernel has only their addresses, so they must live until here

        return [functools.partial(task, *part) for part in parts]

    def _arguments(self, grads: Any, step: Step) -> tuple[Any, Any, tuple[Any, Any]]:
        mu, own = self._first.mu, self._first.params[0]
        numbers, flags, *_ = step.cast_for(mu.dtype, own.dtype, has_carry=self._first.carry is not None)
        table = self._table.copy()
        table[1] = grads
        decays = self._decays * int(flags.decay)
        return cpu.kernel_of(flags, *self._dtypes), table, (decays, cpu.numbers_for(numbers, mu.dtype.name))
