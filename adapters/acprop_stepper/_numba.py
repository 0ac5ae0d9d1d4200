"""The engine "numba": one pass over memory, for contiguous real NumPy arrays."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from acprop_core import rule
from acprop_core.adapt import Array
from acprop_core.kernels import cpu, element
from acprop_core.kernels.helpers import call_beside
from acprop_core.kernels.sixteen_bits import is_readable
from acprop_stepper._buffers import Buffer
from acprop_stepper._overlap import addresses
from acprop_stepper._tiles import Tiles
from acprop_stepper._upcoming import Upcoming
from acprop_stepper._work import Task

CHUNK = 2**13  # elements that a thread takes at a time
SHARE = 2**17  # elements for which it pays to wake one more thread: to wake it takes 30 microseconds


class Numba:
    """All buffers of one dtype, as a table of addresses."""

    def __init__(self, buffers: Sequence[Buffer], threads: int) -> None:
        self.leaves = [leaf for buffer in buffers for leaf in buffer.leaves]
        self._places = np.array(self.leaves)
        self._tiles = [Tiles(buffer) for buffer in buffers]
        self._first = buffers[0]
        columns = [
            (x, mu, nu, x if carry is None else carry)
            for buffer in buffers
            for x, (mu, nu, carry) in zip(buffer.params, map(buffer.kept, range(len(buffer.params))), strict=True)
        ]
        param, mu, nu, carry = zip(*columns, strict=True)
        self._table = np.zeros((element.ROWS, len(param)), np.int64)
        for row, column in ((element.PARAM, param), (element.MU, mu), (element.NU, nu), (element.CARRY, carry)):
            self._table[row] = addresses(column)
        self._table[element.SIZE] = [x.size for x in param]
        self._count = np.zeros(1)  # all parameters share it: the kernel reads it, and what it adds does not matter
        self._table[element.COUNT] = self._count.ctypes.data
        self._table[element.WIDE] = True
        self._decaying = np.concatenate([np.full(len(x.params), x.decays, np.int64) for x in buffers])
        self._options = np.zeros((1, len(element.OPTIONS)))
        self._helpers = min(threads - 1, int(self._table[element.SIZE].sum()) // SHARE)
        self._record = self._record_of(self._table)
        self._flags: rule.Flags | None = None  # those that the kernel is for
        self._kernel: Any = None

    @staticmethod
    def fits(buffer: Buffer) -> bool:
        """Return whether the compiled step can take all parameters of this buffer."""
        if buffer.mu.dtype != buffer.nu.dtype:  # complex numbers
            return False
        return is_readable(buffer.params[0].dtype.name, buffer.mu.dtype.name) and all(
            x.flags.carray for x in buffer.params
        )

    def calls_suffice(self, threads: int) -> bool:
        """Return whether `calls` can step contiguous gradients."""
        return True

    def calls(self, grads: Sequence[Array], found: Any, now: Upcoming) -> list[Callable[[], Any]]:
        """Return one call that steps all parameters; `grads` are those of the stepper, and `found` their addresses."""
        self._prepare(now)
        self._table[element.GRAD] = found[self._places]
        return [self._begun(self._table, self._record)]

    def tasks(self, grads: Sequence[Array | None], now: Upcoming) -> list[Task]:
        """Return the tasks of one step; gradients that the compiled step cannot take are left to tiles."""
        plain = [i for i, g in enumerate(grads) if g is not None and g.flags.c_contiguous and g.flags.aligned]
        others = dict(zip(self.leaves, grads, strict=True)) | dict.fromkeys(self.leaves[i] for i in plain)
        tasks = [task for tiles in self._tiles for task in tiles.tasks([others[i] for i in tiles.leaves], now)]
        if not plain:
            return tasks
        self._prepare(now)
        table, record = self._table, self._record
        if len(plain) < len(grads):
            table = table.take(plain, axis=1)  # row by row in memory, which indexing does not promise
            record = self._record_of(table)
        table[element.GRAD] = addresses([grads[i] for i in plain])

        def task() -> None:
            self._begun(table, record)()
            len(grads)  # the kernel has only their addresses, so they must live until here

        return [task, *tasks]

    def _record_of(self, table: Any) -> Any:
        size = int(table[element.SIZE].sum())
        return cpu.shared(size, CHUNK if self._helpers else max(size, 1))

    def _begun(self, table: Any, record: Any) -> Callable[[], Any]:
        """Return the call of the kernel, with which other threads begin to help as soon as this one lets them."""
        step = functools.partial(self._kernel, table, self._options, record)
        if self._helpers:
            call_beside(functools.partial(step, False), self._helpers)
        return functools.partial(step, True)

    def _prepare(self, now: Upcoming) -> None:
        """Fill in the options and the count of a step."""
        hyper = now.hyper
        flags = rule.flags_of(hyper)
        if flags != self._flags:
            self._table[element.DECAY] = self._decaying * int(flags.decay)
            dtype = self._first.params[0].dtype.name
            of_carry = flags._replace(format=None if self._first.carry is None else rule.FORMATS[dtype])
            self._kernel = cpu.kernel_of(of_carry, dtype, self._first.mu.dtype.name)
            self._flags = flags
        self._options[0] = *hyper[:6], hyper.clip_exponent or 0.0, hyper.maximize, now.grad_scale
        self._count[0] = now.count
