"""The engine "tiles": NumPy or CuPy alone, on parts of the parameters that stay in a processor's cache."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from acprop_core.adapt import Array, Row, Step
from acprop_core.kernels.calls import Operations, Program, program_of
from acprop_stepper._buffers import Buffer, Tile, tiles_of, with_gradients
from acprop_stepper._upcoming import Upcoming
from acprop_stepper._work import Task, run_at_once

# Bytes of one operand of a tile for a program, and of one whose operands are allocated or gathered. Smaller tiles cost
# time in the interpreter, larger ones in memory. Gathered tiles should stay in the second-level cache.
TILE = 2**19
GATHERED = 2**18


OPERATIONS = Operations(
    np.add, np.subtract, np.multiply, np.divide, np.sqrt, np.positive, maximum=np.maximum, minimum=np.minimum
)


class Tiles:
    """Arrays of any layout and dtype."""

    def __init__(self, buffer: Buffer) -> None:
        self.leaves = buffer.leaves
        self._buffer = buffer
        self._has_program = buffer.xp is np and buffer.is_alike()
        gathered = min(TILE, GATHERED) // buffer.mu.itemsize
        self._tiles = tiles_of(buffer, TILE // buffer.mu.itemsize if buffer.is_alike() else gathered, gathered)
        self._spare: list[list[Array]] = []  # operands and registers that no thread uses now
        self._instructions: Any = None  # those that the next two are for
        self._numbers: Any = None
        self._bound: list[_Bound] = []

    def calls_suffice(self, threads: int) -> bool:
        """Return whether `calls` can step contiguous gradients, and several threads have nothing to share."""
        return self._has_program and (threads == 1 or len(self._tiles) < 2)

    def calls(self, grads: Sequence[Array], found: Any, now: Upcoming) -> list[Callable[[], Any]]:
        """Return calls of compiled code that step all parameters; `grads` are those of the stepper."""
        own, program = [grads[i] for i in self.leaves], self._program_of(now.step)
        if program.instructions is not self._instructions:  # to bind takes longer than to step a few thousand numbers
            self._instructions, registers = program.instructions, self._with_registers(program, [])
            self._numbers = np.array(program.numbers, self._buffer.mu.dtype)
            self._bound = [_Bound(tile, self._buffer, program, self._numbers, registers) for tile in self._tiles]
        self._numbers[:] = program.numbers
        return [call for bound in self._bound for call in bound.calls(own)]

    def tasks(self, grads: Sequence[Array | None], now: Upcoming) -> list[Task]:
        """Return the tasks of one step; a gradient of None leaves its parameter out."""
        tiles = with_gradients(self._tiles, self._buffer, grads)
        if self._has_program:
            program = self._program_of(now.step)
            return [functools.partial(self._run_program, program, tile, grads) for tile in tiles]
        place = self._buffer.place()
        return [functools.partial(self._run_rule, now.step, tile, grads, place) for tile in tiles]

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

    def _program_of(self, step: Step) -> Program:
        buffer = self._buffer
        numbers, flags, *_ = step.cast_for(buffer.mu.dtype, buffer.params[0].dtype, buffer.decays)
        return program_of(flags, numbers, lambda _, value: value, OPERATIONS)

    def _with_registers(self, program: Program, taken: list[Array]) -> list[Array]:
        """Return arrays of the size of a tile: for parameters and gradients that are gathered, and for a program."""
        size = max((tile.stop - tile.start for tile in self._tiles), default=0)
        missing = range(len(taken), 2 + program.registers)
        return [*taken, *(np.empty(size, self._buffer.mu.dtype) for _ in missing)]

    def _run_program(self, program: Program, tile: Tile, grads: Sequence[Any]) -> None:
        try:
            taken = self._spare.pop()
        except IndexError:
            taken = []
        registers = self._with_registers(program, taken)
        numbers = np.array(program.numbers, self._buffer.mu.dtype)
        run_at_once(_Bound(tile, self._buffer, program, numbers, registers).calls(grads))
        self._spare.append(registers)


class _Bound:
    """A program with the arrays of one tile, except the gradients.

    Parameters
    ----------
    tile : Tile
        Of `buffer`.
    buffer : Buffer
        Its arrays are float32 or float64.
    program : Program
        A step.
    numbers : array
        Of one dimension; the calls read its values when they are made.
    registers : list of array
        At least as long as the tile: two for operands that are gathered, then those of the program.
    """

    def __init__(self, tile: Tile, buffer: Buffer, program: Program, numbers: Array, registers: list[Array]) -> None:
        self._tile = tile
        self._program = program
        self._gathered: list[Array] = []  # where the gradients are copied to, if there are several
        param, grad, *others = [x[: tile.stop - tile.start] for x in registers]
        before: list[Callable[[], Any]] = []
        if tile.last - tile.first == 1:
            param = buffer.params[tile.first][tile.block]
        else:
            members = buffer.params[tile.first : tile.last]
            parts = [part for _, part in tile.parts(grad, buffer)]
            self._gathered = [part.reshape(x.shape) for x, part in zip(members, parts, strict=True)]
            if program.reads_param:
                before = [functools.partial(np.positive, x, out=part) for x, part in tile.parts(param, buffer)]
        shape = param.shape
        moments = [x[tile.start : tile.stop].reshape(shape) for x in (buffer.mu, buffer.nu)]
        views = [numbers[i, ...] for i in range(numbers.size)]
        self._slots = [param, grad, *moments, *views, *(x.reshape(shape) for x in others)]
        update = self._slots[program.update]
        self._after = [functools.partial(np.add, x, part, out=x) for x, part in tile.parts(update, buffer)]
        self._all: list[Callable[[], Any]] = [*before, *program.calls(self._slots), *self._after]

    def calls(self, grads: Sequence[Array]) -> list[Callable[[], Any]]:
        """Return the calls that step the tile, with the gradients of the buffer."""
        members = grads[self._tile.first : self._tile.last]
        if self._gathered:
            copies = zip(members, self._gathered, strict=True)
            return [*(functools.partial(np.positive, g, out=part) for g, part in copies), *self._all]
        param, _, *others = self._slots
        return [*self._program.calls([param, members[0][self._tile.block], *others]), *self._after]
