"""Three ways to run the rule over a buffer of parameters: NumPy in tiles, Numba in one pass, CuPy in one kernel."""

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from array_api_compat import array_namespace

from acprop_core._program import Operations, Program, execute, program_of
from acprop_core._rule import NUMBERS, Array, Coefficients, displacement, rule
from acprop_core._step import compensated

# Bytes of one operand of a tile that a program runs on, and of one whose operands are allocated or gathered. Smaller
# tiles pay for the interpreter, larger ones for memory: the latter kind should stay in the second-level cache.
TILE = 2**19
GATHERED = 2**18

# Elements of one call of the compiled step: many enough to hide the call, few enough to share among threads.
RUN = 2**20

# Elements up to which small CuPy parameters are gathered for one launch; a larger one has a launch of its own.
PACK = 2**17


class Numbers(NamedTuple):
    """What a step needs beside arrays."""

    k: Coefficients
    dtype: Any  # in which to run the rule
    real_dtype: Any
    grad_scale: float  # what gradients are multiplied by first
    addresses: Any  # of the gradients, if all are known to be there and contiguous, otherwise None


class Buffer:
    """Parameters of one dtype and device that decay alike, and their moments, one behind the other in flat arrays."""

    def __init__(
        self,
        leaves: Sequence[int],
        params: Sequence[Array],
        mu: Array,
        nu: Array,
        carry: Array | None,
        decay: bool,
        xp: Any,
    ) -> None:
        self.leaves = leaves  # which of all the parameters these are
        self.xp = xp
        self.params = params
        self.ends = list(itertools.accumulate(x.size for x in params))
        self.mu = mu
        self.nu = nu
        self.carry = carry
        self.decay = decay
        # Those that can share a tile, as contiguous views of one dimension. NumPy computes complex 0-d arrays by other
        # code, to other last bits: as in the functional core, they stay by themselves.
        self.flat: list[Any] = [
            x.reshape(-1) if x.flags.c_contiguous and (x.shape or x.dtype.kind != "c") else None for x in params
        ]

    def place(self) -> Callable[[], Any]:
        """Return what makes contexts, for any thread: of the arrays' device, and the stream current here and now."""
        return contextlib.nullcontext if self.xp is np else _place(self.mu.device, self.xp)

    def kept(self, i: int) -> tuple[Array, Array, Array | None]:
        """Return the moments and the carry of the i-th parameter, as views."""
        part = slice(self.ends[i] - self.params[i].size, self.ends[i])
        mu, nu, carry = (
            None if x is None else x[part].reshape(self.params[i].shape) for x in (self.mu, self.nu, self.carry)
        )
        return mu, nu, carry


def _place(device: Any, xp: Any) -> Callable[[], Any]:
    stream = xp.cuda.get_current_stream(device.id)
    if stream.ptr == xp.cuda.Stream.ptds.ptr:
        stream = xp.cuda.Stream.null  # the thread's own stream would be another thread's there; this one waits for all

    @contextlib.contextmanager
    def place() -> Iterator[None]:
        with device, stream:
            yield

    return place


def alike(buffer: Buffer) -> bool:
    """Return whether parameters and moments are all float32, or all float64: the rule then needs no casts."""
    dtypes = {buffer.mu.dtype, buffer.nu.dtype, *(x.dtype for x in buffer.params)}
    return dtypes in ({np.dtype(np.float32)}, {np.dtype(np.float64)})


class Tile(NamedTuple):
    """A block of one parameter, or several small ones: [first, last) of a buffer, [start, stop) of its moments."""

    first: int
    last: int
    block: tuple[Any, ...]
    start: int
    stop: int


def tiles_of(buffer: Buffer, cut: int, pack: int) -> list[Tile]:
    """Cut a buffer into tiles of at most `cut` elements; small contiguous neighbours share one of at most `pack`."""
    tiles: list[Tile] = []
    start = 0
    open_to_more = False
    for i, x in enumerate(buffer.params):
        if open_to_more and buffer.flat[i] is not None and start + x.size - tiles[-1].start <= pack:
            start += x.size
            tiles[-1] = tiles[-1]._replace(last=i + 1, stop=start)
            continue
        for block, elements in blocks_of(x.shape, cut):
            tiles.append(Tile(i, i + 1, block, start, start + elements))
            start += elements
        open_to_more = buffer.flat[i] is not None and tiles[-1].block == (...,)
    return tiles


def blocks_of(shape: tuple[int, ...], size: int) -> Iterator[tuple[tuple[Any, ...], int]]:
    """Yield (index, elements) of blocks of at most `size` elements that make up an array, in its order."""
    if math.prod(shape) <= size:
        yield (...,), math.prod(shape)
        return
    row = math.prod(shape[1:])
    rows = size // row
    if rows == 0:
        for i in range(shape[0]):
            yield from (((i, *block), elements) for block, elements in blocks_of(shape[1:], size))
        return
    for i in range(0, shape[0], rows):
        j = min(i + rows, shape[0])
        yield (slice(i, j), ...), (j - i) * row


class TileTask:
    """One tile by NumPy: compute into temporaries, which may be repeated, then copy, which may be repeated too."""

    __slots__ = ("_buffer", "_grads", "_numbers", "_place", "_result", "_tile", "done")  # there may be many

    def __init__(self, buffer: Buffer, tile: Tile, grads: Sequence[Array], numbers: Numbers) -> None:
        self.done = False
        self._buffer = buffer
        self._tile = tile
        self._grads = grads
        self._numbers = numbers
        self._place = buffer.place()
        self._result: tuple[Array, Array, Array, Array | None] | None = None

    def run(self) -> None:
        """Step the tile."""
        if self.done:
            return
        with self._place():
            result = self._result or self.compute()
            if self.done:  # by a handler, perhaps while this computed: from what was half written then
                return
            self._result = param, mu, nu, carry = result
            buffer, tile = self._buffer, self._tile
            with np.errstate(all="ignore"):
                scatter(param, buffer, tile)
                buffer.mu[tile.start : tile.stop] = mu.reshape(-1)
                buffer.nu[tile.start : tile.stop] = nu.reshape(-1)
                if buffer.carry is not None and carry is not None:
                    buffer.carry[tile.start : tile.stop] = carry.reshape(-1)
        self.done = True
        self._result = None

    def compute(self) -> tuple[Array, Array, Array, Array | None]:
        """Return what parameter, moments and carry become; nothing is written."""
        k, dtype, real_dtype, grad_scale, _ = self._numbers
        buffer = self._buffer
        param, *others = self.operands()
        grad, mu, nu = (x.astype(kind, copy=False) for x, kind in zip(others, (dtype, dtype, real_dtype), strict=True))
        # overflow is the business of `nonfinite`, not of warnings
        with np.errstate(all="ignore"):
            if grad_scale != 1.0:
                grad = grad * grad_scale
            d, mu, nu = rule(grad, mu, nu, k, buffer.xp)
            update = displacement(d, param.astype(dtype, copy=False) if buffer.decay else None, k)
            carry = None
            if buffer.carry is not None:
                carry = buffer.carry[self._tile.start : self._tile.stop].reshape(param.shape)
                update, carry = compensated(update, param, carry, k, array_namespace(param))
            # rounded to 16 bits before it is added, where parameters are: to the bits what the functional core does
            return param + update.astype(param.dtype, copy=False), mu, nu, carry

    def operands(self, outs: Sequence[Array | None] = (None, None)) -> list[Array]:
        """Return parameter, gradient and moments of the tile: views, but for parameters that share a tile.

        The copies of those are made in `outs`, if this is given.
        """
        buffer, tile = self._buffer, self._tile
        groups = zip((buffer.params, self._grads), outs, strict=True)
        param, grad = (gather(arrays, tile, buffer.xp, out) for arrays, out in groups)
        return [param, grad, *(x[tile.start : tile.stop].reshape(param.shape) for x in (buffer.mu, buffer.nu))]

    def stays_finite(self) -> bool:
        """Return whether parameters and moments would be finite after the step."""
        buffer = self._buffer
        with self._place(), np.errstate(all="ignore"):
            param, mu, nu, carry = self.compute()
            kept = [(param, buffer.params[0]), (mu, buffer.mu), (nu, buffer.nu)]
            kept += [] if carry is None else [(carry, carry)]
            return all(bool(buffer.xp.isfinite(x.astype(y.dtype, copy=False)).all()) for x, y in kept)

    @property
    def members(self) -> range:
        """Which parameters of the buffer the tile is of."""
        return range(self._tile.first, self._tile.last)


def gather(arrays: Sequence[Array], tile: Tile, xp: Any, out: Array | None = None) -> Array:
    """Return the elements of a tile as one array: a view, if they are in one array, or else in `out`."""
    if tile.last - tile.first == 1:
        return arrays[tile.first][tile.block]
    out = None if out is None else out[: tile.stop - tile.start]
    return xp.concatenate(arrays[tile.first : tile.last], axis=None, out=out)


def scatter(values: Array, buffer: Buffer, tile: Tile) -> None:
    """Write into the parameters what `gather` would read."""
    if tile.last - tile.first == 1:
        buffer.params[tile.first][tile.block] = values
        return
    stops = [end - tile.start for end in buffer.ends[tile.first : tile.last]]
    parts = map(values.__getitem__, map(slice, [0, *stops], stops))
    for x, part in zip(buffer.flat[tile.first : tile.last], parts, strict=True):
        x[...] = part


class ProgramTask(TileTask):
    """One tile by a program, which needs no allocation and one copy less: all real arrays of one dtype."""

    __slots__ = ("_program", "_slots", "_spare")

    def __init__(
        self,
        buffer: Buffer,
        tile: Tile,
        grads: Sequence[Array],
        numbers: Numbers,
        program: Program,
        spare: list[list[Array]],
    ) -> None:
        super().__init__(buffer, tile, grads, numbers)
        self._program = program
        self._spare = spare  # registers that are free
        self._slots: list[Array] | None = None  # once computed

    def run(self) -> None:
        """Step the tile."""
        if self.done:
            return
        buffer, tile, program, taken = self._buffer, self._tile, self._program, None
        with np.errstate(all="ignore"):
            slots = self._slots
            if slots is None:
                taken = self._take()  # a handler that runs this very task takes others, and cannot spoil these
                operands = self.operands(taken[:2])
                shape, size = operands[0].shape, tile.stop - tile.start
                registers = [x[:size].reshape(shape) for x in taken[2 : 2 + program.registers]]
                slots = [*operands, *program.numbers, *registers]
                execute(program.compute, slots)
                if self.done:  # by such a handler, perhaps while this computed
                    return
                self._slots = slots
            scatter(slots[program.result], buffer, tile)
            execute(program.write, slots)
        self.done = True
        self._slots = None
        if taken is not None:  # else they are those of a call that was cut short, or that called the handler
            self._spare.append(taken)

    def _take(self) -> list[Array]:
        """Return two arrays in which to gather parameter and gradient, and the registers of the program."""
        try:
            registers = self._spare.pop()
        except IndexError:
            registers = []
        mu = self._buffer.mu
        while len(registers) < 2 + self._program.registers:
            length = (TILE if len(registers) >= 2 else GATHERED) // mu.itemsize
            registers.append(np.empty(min(length, mu.size), mu.dtype))
        return registers


class Tiles:
    """NumPy, in tiles that stay in the processor's cache: arrays of any layout and dtype."""

    def __init__(self, buffer: Buffer) -> None:
        self._buffer = buffer
        gathered = min(TILE, GATHERED) // buffer.mu.itemsize
        self._tiles = tiles_of(buffer, TILE // buffer.mu.itemsize if alike(buffer) else gathered, gathered)
        self._spare: list[list[Array]] = []

    def tasks(self, grads: Sequence[Array | None], numbers: Numbers) -> Sequence[TileTask]:
        """Return the tasks of one step; a gradient of None leaves its parameter out."""
        tiles = present(self._tiles, self._buffer, grads)
        if not alike(self._buffer):
            return [TileTask(self._buffer, tile, grads, numbers) for tile in tiles]
        program = program_for(numbers.k, numbers.grad_scale, self._buffer.decay, numbers.dtype)
        return [ProgramTask(self._buffer, tile, grads, numbers, program, self._spare) for tile in tiles]


def program_for(k: Coefficients, grad_scale: float, decay: bool, dtype: Any) -> Program:
    """Return a step of real NumPy arrays of `dtype`."""
    return program_of(k, grad_scale, decay, lambda _, value: np.asarray(value, dtype), _NUMPY)


def _copy(source: Array, target: Array) -> None:
    np.copyto(target, source)


_NUMPY = Operations(
    np.add,
    np.subtract,
    np.multiply,
    np.divide,
    np.sqrt,
    clip=np.ndarray.clip,  # np.clip itself costs a microsecond more
    copy=_copy,
)


def present(tiles: list[Tile], buffer: Buffer, grads: Sequence[Array | None]) -> list[Tile]:
    """Return the tiles whose gradients are there, with those taken apart of which some are."""
    if not any(g is None for g in grads):
        return tiles
    result = []
    for tile in tiles:
        stops = [*buffer.ends[tile.first : tile.last - 1], tile.stop]
        starts = [tile.start, *stops[:-1]]
        for i, start, stop in zip(range(tile.first, tile.last), starts, stops, strict=True):
            if grads[i] is not None:
                result.append(Tile(i, i + 1, tile.block, start, stop))
    return result


class NumbaTask:
    """A run of parameters by the compiled step, which Python cannot interrupt."""

    def __init__(self, step: Callable[[Array], None], grads: Sequence[Array]) -> None:
        self._done = np.zeros(1, np.bool_)
        self._step = step
        self._grads = grads  # of which the step has only the addresses

    @property
    def done(self) -> bool:
        """Whether the compiled step has come to its end."""
        return bool(self._done[0])

    def run(self) -> None:
        """Step the run."""
        self._step(self._done)


class Numba:
    """Numba, one pass over memory: contiguous real parameters, with moments that are computed in the same dtype."""

    def __init__(self, buffer: Buffer) -> None:
        from acprop_core import _numba, _numba16

        self.compiled = _numba
        own, moments = _seen(buffer) or (None, None)  # it fits
        self._kept = [x.view(moments) for x in (buffer.mu, buffer.nu)]
        self._carry = np.empty(0, own) if buffer.carry is None else buffer.carry.view(own)
        self._low = None if buffer.carry is None else _numba16.format_of(buffer.carry.dtype.name)
        self._buffer = buffer
        self._tiles = Tiles(buffer)
        self._params = _numba.addresses(buffer.params)
        self._ends = np.asarray(buffer.ends)
        self._runs = tiles_of(buffer, RUN, RUN)

    @staticmethod
    def fits(buffer: Buffer) -> bool:
        """Return whether the compiled step can take all parameters of this buffer."""
        return _seen(buffer) is not None and all(x.flags.carray for x in buffer.params)

    def tasks(self, grads: Sequence[Array | None], numbers: Numbers) -> Sequence[Any]:
        """Return the tasks of one step; gradients of another layout than the parameters' are left to tiles."""
        grad_addresses = numbers.addresses
        if grad_addresses is None:
            if not all(g is not None and g.flags.c_contiguous and g.flags.aligned for g in grads):
                return self._tiles.tasks(grads, numbers)
            grad_addresses = self.compiled.addresses(grads)
        buffer, dtype, width = self._buffer, np.dtype(numbers.dtype), self._carry.itemsize
        k, scale = self.compiled.scalars_of(numbers.k, dtype), dtype.type(numbers.grad_scale)
        tasks = []
        for run in self._runs:
            whole = run.start - (buffer.ends[run.first - 1] if run.first else 0)  # elements before, of a cut parameter
            leaves, part = slice(run.first, run.last), slice(run.start, run.stop)
            ends = np.minimum(self._ends[leaves], run.stop) - run.start
            arguments = (
                self._params[leaves] + whole * width,
                grad_addresses[leaves] + whole * width,
                ends,
                *(x[part] for x in (*self._kept, self._carry)),
                k,
                self._low,
                buffer.decay,
                scale,
            )
            tasks.append(NumbaTask(functools.partial(self.compiled.step, *arguments), grads))
        return tasks


def _seen(buffer: Buffer) -> tuple[Any, Any] | None:
    """Return the dtypes that the compiled step takes for parameters and moments; None if it can take none."""
    from acprop_core import _numba16

    if buffer.mu.dtype != buffer.nu.dtype:  # those of complex numbers
        return None
    return _numba16.seen_as(buffer.params[0].dtype.name, buffer.mu.dtype.name)


class CupyTask(TileTask):
    """A tile by the fused kernel. It must run where no signal interrupts it, between launch and `done`."""

    __slots__ = ()

    def run(self) -> None:
        """Launch the kernel."""
        buffer, tile = self._buffer, self._tile
        k, dtype, _, grad_scale, _ = self._numbers
        with self._place():
            operands = self.operands()
            fused_step(k, buffer.decay, buffer.xp)(*operands, *scalars_of(k, grad_scale, dtype))
            if tile.last - tile.first > 1:
                scatter(operands[0], buffer, tile)
        self.done = True


class Cupy:
    """CuPy, one fused kernel: float32 or float64 parameters with moments of the same dtype, in any layout."""

    def __init__(self, buffer: Buffer) -> None:
        self._buffer = buffer
        self._tiles = tiles_of(buffer, max((x.size for x in buffer.params), default=1) or 1, PACK)

    @staticmethod
    def fits(buffer: Buffer) -> bool:
        """Return whether the kernel can take all parameters of this buffer."""
        return alike(buffer)

    def tasks(self, grads: Sequence[Array | None], numbers: Numbers) -> list[CupyTask]:
        """Return the tasks of one step; a gradient of None leaves its parameter out."""
        tiles = present(self._tiles, self._buffer, grads)
        return [CupyTask(self._buffer, tile, grads, numbers) for tile in tiles if tile.stop > tile.start]


def scalars_of(k: Coefficients, grad_scale: float, dtype: Any) -> list[Any]:
    """Return the arguments of `fused_step` behind its arrays: scalars of `dtype`, so that nothing is computed wider."""
    numbers = [0.0 if x is None else x for x in (getattr(k, name) for name in NUMBERS)]
    return [np.dtype(dtype).type(x) for x in (*numbers, grad_scale)]


def fused_step(k: Coefficients, decay: bool, xp: Any) -> Callable[..., None]:
    """Return the rule as one CUDA kernel with three outputs, in place; only the flags of `k` matter."""
    flags = (k.old_is_lighter1, k.old_is_lighter2, k.from_previous, k.limit is not None)
    return _fused_step(flags, decay, xp)


@functools.cache
def _fused_step(flags: tuple[bool, bool, bool, bool], decay: bool, xp: Any) -> Callable[..., None]:
    old_is_lighter1, old_is_lighter2, from_previous, clipped = flags

    def acprop(
        param: Array, grad: Array, mu: Array, nu: Array,
        scale: Any, offset: Any, eps: Any, limit: Any, weight1: Any, weight2: Any, eps_root: Any, rate: Any,
        weight_decay: Any, dither: Any, grad_scale: Any,
    ) -> None:  # fmt: skip
        k = Coefficients(
            scale=scale,
            offset=offset,
            eps=eps,
            limit=limit if clipped else None,
            weight1=weight1,
            old_is_lighter1=old_is_lighter1,
            weight2=weight2,
            old_is_lighter2=old_is_lighter2,
            eps_root=eps_root,
            from_previous=from_previous,
            is_complex=False,
            rate=rate,
            weight_decay=weight_decay,
            dither=dither,
        )
        d, new_mu, new_nu = rule(grad * grad_scale, mu, nu, k, xp)
        param[...] = param + displacement(d, param if decay else None, k)
        mu[...] = new_mu
        nu[...] = new_nu

    return xp.fuse(kernel_name="acprop")(acprop)
