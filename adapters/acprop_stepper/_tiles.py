"""The engine "tiles": NumPy or CuPy alone, on parts of the parameters that stay in a processor's cache."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from acprop_core.adapt import Array, Row, Step
from acprop_core.kernels.calls import Operations, Program, program_of
from acprop_stepper._buffers import Buffer, Tile, tiles_of, with_gradients
from acprop_stepper._work import Task

# Bytes of one operand of a tile for a program, and of one whose operands are allocated or gathered. Smaller tiles cost
# time in the interpreter, larger ones in memory. Gathered tiles should stay in the second-level cache.
TILE = 2**19
GATHERED = 2**18


def _copy(source: Array, target: Array) -> None:
    np.copyto(target, source)


OPERATIONS = Operations(
    np.add,
    np.subtract,
    np.multiply,
    np.divide,
    np.sqrt,
    clip=np.ndarray.clip,  # np.clip itself costs a microsecond more
    copy=_copy,
)


class Tiles:
    """Arrays of any layout and dtype."""

    def __init__(self, buffer: Buffer) -> None:
        self.leaves = buffer.leaves
        self._buffer = buffer
        gathered = min(TILE, GATHERED) // buffer.mu.itemsize
        self._tiles = tiles_of(buffer, TILE // buffer.mu.itemsize if buffer.is_alike() else gathered, gathered)
        self._spare: list[list[Array]] = []  # operands and registers that no thread uses now

    def tasks(self, grads: Sequence[Array | None], step: Step) -> list[Task]:
        """Return the tasks of one step; a gradient of None leaves its parameter out."""
        buffer = self._buffer
        tiles = with_gradients(self._tiles, buffer, grads)
        if buffer.xp is np and buffer.is_alike():
            numbers, flags, dtype, _ = step.cast_for(buffer.mu.dtype, buffer.params[0].dtype, buffer.decays)
            program = program_of(flags, numbers, lambda _, value: np.asarray(value, dtype), OPERATIONS)
            return [functools.partial(self._run_program, program, tile, grads) for tile in tiles]
        place = buffer.place()
        return [functools.partial(self._run_rule, step, tile, grads, place) for tile in tiles]

    def nonfinite_in(self, grads: Sequence[Array | None], step: Step) -> list[int]:
        """Return which parameters a step could make infinite or NaN, or their moments; nothing is written."""
        buffer = self._buffer
        for tile in with_gradients(self._tiles, buffer, grads):
            with buffer.place()(), np.errstate(all="ignore"):
                param, update, *kept = self._computed(step, tile, grads)
                new = [x for x in (param + update, *kept) if x is not None]
                if not all(bool(buffer.xp.isfinite(x).all()) for x in new):
                    return list(range(tile.first, tile.last))
        return []

    def _computed(self, step: Step, tile: Tile, grads: Sequence[Any]) -> tuple[Array, Array, Array, Array, Any]:
        """Return the parameter of a tile, its update, and the new moments and carry."""
        buffer, part = self._buffer, slice(tile.start, tile.stop)
        param, grad = tile.gather(buffer.params, buffer.xp), tile.gather(grads, buffer.xp)
        mu, nu, carry = (
            None if x is None else x[part].reshape(param.shape) for x in (buffer.mu, buffer.nu, buffer.carry)
        )
        return param, *step(Row(param, grad, mu, nu, carry), buffer.decays)

    def _run_rule(self, step: Step, tile: Tile, grads: Sequence[Any], place: Any) -> None:
        buffer, part = self._buffer, slice(tile.start, tile.stop)
        # `nonfinite` is for overflow, so no warnings
        with place(), np.errstate(all="ignore"):
            _, update, mu, nu, carry = self._computed(step, tile, grads)
            tile.add(update, buffer)
            buffer.mu[part], buffer.nu[part] = mu.reshape(-1), nu.reshape(-1)
            if buffer.carry is not None and carry is not None:
                buffer.carry[part] = carry.reshape(-1)

    def _run_program(self, program: Program, tile: Tile, grads: Sequence[Any]) -> None:
        buffer, size = self._buffer, tile.stop - tile.start
        try:
            taken = self._spare.pop()
        except IndexError:
            taken = []
        while len(taken) < 2 + program.registers:
            length = (TILE if len(taken) >= 2 else GATHERED) // buffer.mu.itemsize
            taken.append(np.empty(min(length, buffer.mu.size), buffer.mu.dtype))
        param, grad = tile.gather(buffer.params, np, taken[0]), tile.gather(grads, np, taken[1])
        shape = param.shape
        moments = [x[tile.start : tile.stop].reshape(shape) for x in (buffer.mu, buffer.nu)]
        registers = [x[:size].reshape(shape) for x in taken[2 : 2 + program.registers]]
        with np.errstate(all="ignore"):
            tile.add(program.run([param, grad, *moments, *program.numbers, *registers]), buffer)
        self._spare.append(taken)
