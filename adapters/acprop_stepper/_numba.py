"""The engine "numba": one pass over memory, for contiguous real NumPy arrays."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numba
import numpy as np
from numba import types as nb
from numba.extending import intrinsic

from acprop_core import rule
from acprop_core.adapt import Array, Step
from acprop_core.kernels import cpu
from acprop_core.kernels.sixteen_bits import is_readable
from acprop_stepper._buffers import Buffer
from acprop_stepper._overlap import addresses
from acprop_stepper._tiles import Tiles
from acprop_stepper._work import Task, wake

CHUNK = 2**14  # elements that a thread takes at a time
SHARE = 2**19  # elements for which it pays to wake one more thread: to wake it takes 30 microseconds


class Numba:
    """All buffers of one dtype, as a table of addresses."""

    def __init__(self, buffers: Sequence[Buffer], threads: int) -> None:
        self.leaves = [leaf for buffer in buffers for leaf in buffer.leaves]
        self._tiles = [Tiles(buffer) for buffer in buffers]
        self._first = buffers[0]
        self._dtypes = self._first.params[0].dtype.name, self._first.mu.dtype.name
        sizes = np.array([x.size for buffer in buffers for x in buffer.params], np.int64)
        self._helpers = min(threads - 1, int(sizes.sum()) // SHARE)
        owners, starts, self._sizes, self._chunks = _cut(sizes, CHUNK if self._helpers else None)
        columns = [
            (x, mu, nu, x if carry is None else carry)
            for buffer in buffers
            for x, (mu, nu, carry) in zip(buffer.params, map(buffer.kept, range(len(buffer.params))), strict=True)
        ]
        param, mu, nu, carry = (addresses(column)[owners] for column in zip(*columns, strict=True))
        own, moments = starts * self._first.params[0].itemsize, starts * self._first.mu.itemsize
        rows = np.stack([param, param, mu, nu, carry]) + np.stack([own, own, moments, moments, own])
        # chunk by chunk, so that the five rows of each are a table of their own
        chunks = list(itertools.pairwise(self._chunks.tolist()))
        self._table = np.concatenate([rows[:, a:b].reshape(-1) for a, b in chunks])
        self._gradients = np.concatenate([np.arange(4 * a + b, 4 * a + 2 * b - a) for a, b in chunks])
        self._owners, self._places, self._offsets = owners, np.array(self.leaves)[owners], own
        self._decaying = np.concatenate([np.full(len(x.params), x.decays, np.int64) for x in buffers])[owners]
        self._decays = np.zeros_like(self._decaying)
        self._numbers = cpu.numbers_for(rule.Numbers(*[0.0] * len(rule.Numbers._fields)), self._dtypes[1])
        self._record = np.full(2, len(chunks), np.int64)  # no chunk is left to take
        # what the arguments are for: they are kept for the next step, and a step with other flags changes them
        self._grads: Any = None
        self._flags: Any = None
        self._kernel: Any = None

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
        self._prepare(step)
        if grads is not self._grads:
            self._table[self._gradients] = grads[self._places] + self._offsets
            self._grads = grads
        if not self._helpers:
            self._kernel(self._table.reshape(5, -1), self._sizes, self._decays, self._numbers, done)
            return
        shared, ignored = _shared(self._kernel), np.zeros(1, np.int64)
        arguments = self._table, self._sizes, self._decays, self._numbers, self._chunks, self._record, ignored
        wake([functools.partial(shared, *arguments, ignored, False)] * self._helpers)
        shared(*arguments, done, True)

    def tasks(self, grads: Sequence[Array | None], step: Step) -> list[Task]:
        """Return the tasks of one step; gradients that the compiled step cannot take are left to tiles."""
        if not all(g is not None and g.flags.c_contiguous and g.flags.aligned for g in grads):
            by_leaf = dict(zip(self.leaves, grads, strict=True))
            return [task for tiles in self._tiles for task in tiles.tasks([by_leaf[i] for i in tiles.leaves], step)]
        self._prepare(step)
        self._table[self._gradients] = addresses(grads)[self._owners] + self._offsets
        self._grads = None

        def task(a: int, b: int) -> None:
            table = self._table[5 * a : 5 * b].reshape(5, -1)
            self._kernel(table, self._sizes[a:b], self._decays[a:b], self._numbers, np.zeros(1, np.int64))
            len(grads)  # the kernel has only their addresses, so they must live until here

        return [functools.partial(task, *pair) for pair in itertools.pairwise(self._chunks.tolist())]

    def _prepare(self, step: Step) -> None:
        """Fill in the numbers and flags of a step."""
        numbers, flags, *_ = step.cast_for(
            self._first.mu.dtype, self._first.params[0].dtype, has_carry=self._first.carry is not None
        )
        self._numbers[:] = numbers
        if flags != self._flags:
            np.multiply(self._decaying, int(flags.decay), out=self._decays)
            self._kernel = cpu.kernel_of(flags, *self._dtypes)
            self._flags = flags


def _cut(sizes: Any, chunk: int | None) -> tuple[Any, Any, Any, Any]:
    """Cut arrays of these sizes into pieces, and lay these together in chunks; with None, all arrays are one chunk.

    Return the array of each piece, where the piece begins in it, and its size; and the first piece of each chunk,
    followed by the number of pieces.
    """
    if chunk is None:
        return np.arange(sizes.size), np.zeros_like(sizes), sizes, np.array([0, sizes.size])
    pieces = np.maximum(-(-sizes // chunk), 1)
    owners = np.repeat(np.arange(sizes.size), pieces)
    starts = chunk * (np.arange(owners.size) - np.repeat(np.cumsum(pieces) - pieces, pieces))
    cut = np.minimum(sizes[owners] - starts, chunk)
    chunks = (np.cumsum(cut) - cut) // chunk
    return owners, starts, cut, np.append(np.unique(chunks, return_index=True)[1], owners.size)


@functools.cache
def _shared(kernel: Callable[..., None]) -> Callable[..., None]:
    """Return a kernel for many threads, which share the chunks of a step.

    ``shared(table, sizes, decays, numbers, chunks, record, ignored, done, leads)``: one thread leads. Its call returns
    when all is written and `done` is incremented, and no Python code runs in between. The others may come when they
    like, even after the step or in the middle of the next one: they take chunks while there are any, and otherwise
    touch nothing. `record` is the next chunk, and the number of chunks that are done.
    """

    @numba.njit(nogil=True)
    def shared(
        table: Any, sizes: Any, decays: Any, numbers: Any, chunks: Any, record: Any, ignored: Any, done: Any, leads: Any
    ) -> None:
        following, finished = record.ctypes.data, record.ctypes.data + 8
        last = chunks.size - 1
        if leads:
            _swap(finished, 0)
            _swap(following, 0)
        while True:
            i = _add(following, 1)
            if i >= last:
                break
            a, b = chunks[i], chunks[i + 1]
            part = table[5 * a : 5 * b].reshape(5, b - a)
            kernel(part, sizes[a:b], decays[a:b], numbers, ignored)
            _add(finished, 1)
        if leads:
            while _add(finished, 0) < last:  # another thread is at its last chunk
                pass
            done[0] += 1

    return shared


def _atomic(operation: str) -> Any:
    """Return a compiled function that changes the int64 at an address in one go, and returns what was there."""

    @intrinsic
    def change(typing_context: Any, address: Any, number: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            pointer = builder.inttoptr(arguments[0], context.get_value_type(nb.int64).as_pointer())
            return builder.atomic_rmw(operation, pointer, arguments[1], "seq_cst")

        return nb.int64(nb.int64, nb.int64), generate

    return change


_add, _swap = _atomic("add"), _atomic("xchg")
