"""Parameters with their moments in flat buffers, and how they are cut into tiles."""

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from acprop_core.adapt import Array


@dataclasses.dataclass(eq=False)
class Buffer:
    """Parameters of one dtype and device that decay alike, and their moments, back to back in flat arrays."""

    leaves: Sequence[int]  # the places of these parameters among all
    params: Sequence[Array]
    mu: Array
    nu: Array
    carry: Array | None
    decays: bool
    xp: Any

    def __post_init__(self) -> None:
        self.ends = list(itertools.accumulate(x.size for x in self.params))
        # Parameters that can share a tile, as contiguous views of one dimension. Complex 0-d arrays stay by themselves,
        # as in the functional core, because NumPy computes them by other code, to other last bits.
        self.flat: list[Any] = [
            x.reshape(-1) if x.flags.c_contiguous and (x.shape or x.dtype.kind != "c") else None for x in self.params
        ]

    def place(self) -> Callable[[], Any]:
        """Return a function that makes contexts, for any thread, of the arrays' device and the stream current now."""
        return contextlib.nullcontext if self.xp is np else _place(self.mu.device, self.xp)

    def kept(self, i: int) -> tuple[Array, Array, Array | None]:
        """Return the moments and the carry of the i-th parameter, as views."""
        part = slice(self.ends[i] - self.params[i].size, self.ends[i])
        mu, nu, carry = (
            None if x is None else x[part].reshape(self.params[i].shape) for x in (self.mu, self.nu, self.carry)
        )
        return mu, nu, carry

    def is_alike(self) -> bool:
        """Return whether parameters and moments are all float32, or all float64: the rule then needs no casts."""
        dtypes = {self.mu.dtype, self.nu.dtype, *(x.dtype for x in self.params)}
        return dtypes in ({np.dtype(np.float32)}, {np.dtype(np.float64)})


def on_device_of(x: Array) -> Any:
    """Return a context of the device of an array, on which CuPy's functions then make arrays."""
    return contextlib.nullcontext() if isinstance(x, np.ndarray) else x.device


def _place(device: Any, xp: Any) -> Callable[[], Any]:
    stream = xp.cuda.get_current_stream(device.id)
    if stream.ptr == xp.cuda.Stream.ptds.ptr:
        stream = xp.cuda.Stream.null  # in another thread, ptds is another stream; the null stream waits for all

    @contextlib.contextmanager
    def place() -> Iterator[None]:
        with device, stream:
            yield

    return place


def copy_within(source: Array, target: Array, place: Callable[[], Any]) -> None:
    """Copy into an array, within a context that `Buffer.place` makes."""
    with place():
        target[...] = source


class Tile(NamedTuple):
    """A block of one parameter, or several small ones: [first, last) of a buffer, [start, stop) of its moments."""

    first: int
    last: int
    block: tuple[Any, ...]
    start: int
    stop: int

    def gather(self, arrays: Sequence[Array], xp: Any, out: Array | None = None) -> Array:
        """Return the elements as one array: a view, if they are in one array, and otherwise a copy, in `out`."""
        if self.last - self.first == 1:
            return arrays[self.first][self.block]
        out = None if out is None else out[: self.stop - self.start]
        return xp.concatenate(arrays[self.first : self.last], axis=None, out=out)

    def parts(self, values: Array, buffer: Buffer) -> Iterator[tuple[Array, Array]]:
        """Yield each parameter, or the block of it, with its part of the values."""
        if self.last - self.first == 1:
            yield buffer.params[self.first][self.block], values
            return
        stops = [end - self.start for end in buffer.ends[self.first : self.last]]
        yield from zip(
            buffer.flat[self.first : self.last],
            map(values.__getitem__, map(slice, [0, *stops], stops)),
            strict=True,
        )

    def add(self, update: Array, buffer: Buffer) -> None:
        """Add the updates of the elements to the parameters."""
        for param, part in self.parts(update, buffer):
            buffer.xp.add(param, part, out=param)


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


def with_gradients(tiles: list[Tile], buffer: Buffer, grads: Sequence[Array | None]) -> list[Tile]:
    """Return the tiles that have gradients; a tile that lacks some of them becomes one tile for each parameter."""
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
