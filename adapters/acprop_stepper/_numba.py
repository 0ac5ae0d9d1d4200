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
        size = int(self._table[element.SIZE].sum())
        self._helpers = min(threads - 1, size // SHARE)
        self._record = cpu.shared(size, CHUNK if self._helpers else max(size, 1))
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
        self._prepare(found[self._places], now)
        return [self._begun()]

    def tasks(self, grads: Sequence[Array | None], now: Upcoming) -> list[Task]:
        """Return the tasks of one step; gradients that the compiled step cannot take are left to tiles."""
        if not all(g is not None and g.flags.c_contiguous and g.flags.aligned for g in grads):
            by_leaf = dict(zip(self.leaves, grads, strict=True))
            return [task for tiles in self._tiles for task in tiles.tasks([by_leaf[i] for i in tiles.leaves], now)]
        self._prepare(addresses(grads), now)

        def task() -> None:
            self._begun()()
            len(grads)  # the kernel has only their addresses, so they must live until here

        return [task]

    def _begun(self) -> Callable[[], Any]:
        """Return the call of the kernel, with which other threads begin to help as soon as this one lets them."""
        step = functools.partial(self._kernel, self._table, self._options, self._record)
        if self._helpers:
            call_beside(functools.partial(step, False), self._helpers)
        return functools.partial(step, True)

    def _prepare(self, grads: Any, now: Upcoming) -> None:
        """Fill in the addresses of the gradients, and the numbers of a step."""
        hyper = now.hyper
        flags = rule.flags_of(hyper)
        if flags != self._flags:
            self._table[element.DECAY] = self._decaying * int(flags.decay)
            dtype = self._first.params[0].dtype.name
            of_carry = flags._replace(format=None if self._first.carry is None else rule.FORMATS[dtype])
            self._kernel = cpu.kernel_of(of_carry, dtype, self._first.mu.dtype.name)
            self._flags = flags
        self._table[element.GRAD] = grads
        self._options[0] = *hyper[:6], hyper.clip_exponent or 0.0, hyper.maximize, now.grad_scale
        self._count[0] = now.count
