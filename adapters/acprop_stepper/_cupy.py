"""The engine "cupy": one fused CUDA kernel, for float32 or float64 CuPy arrays with moments of the same dtype."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from acprop_core import rule
from acprop_core.adapt import Array
from acprop_stepper._buffers import Buffer, Tile, tiles_of, with_gradients
from acprop_stepper._upcoming import Upcoming
from acprop_stepper._work import Task

PACK = 2**17  # elements up to which small parameters are gathered for one launch


class Cupy:
    """Parameters in any layout; a large one has a launch of its own."""

    def __init__(self, buffer: Buffer) -> None:
        self.leaves = buffer.leaves
        self._buffer = buffer
        self._tiles = tiles_of(buffer, max((x.size for x in buffer.params), default=1) or 1, PACK)

    def calls_suffice(self, threads: int) -> bool:
        """Return False: launching a kernel runs Python code."""
        return False

    def tasks(self, grads: Sequence[Array | None], now: Upcoming) -> list[Task]:
        """Return the tasks of one step; a gradient of None leaves its parameter out."""
        buffer = self._buffer
        numbers, flags, dtype, _ = now.step.cast_for(buffer.mu.dtype, buffer.params[0].dtype, buffer.decays)
        # scalars of the arrays' dtype, so that nothing is computed wider
        kernel, scalars = fused_step(flags, buffer.xp), list(map(np.dtype(dtype).type, numbers))
        tiles = [tile for tile in with_gradients(self._tiles, buffer, grads) if tile.stop > tile.start]
        place = buffer.place()
        return [functools.partial(self._launch, kernel, scalars, tile, grads, place) for tile in tiles]

    def _launch(self, kernel: Any, scalars: Sequence[Any], tile: Tile, grads: Sequence[Any], place: Any) -> None:
        buffer, part = self._buffer, slice(tile.start, tile.stop)
        with place():
            param, grad = tile.gather(buffer.params, buffer.xp), tile.gather(grads, buffer.xp)
            mu, nu = (x[part].reshape(param.shape) for x in (buffer.mu, buffer.nu))
            kernel(param, grad, mu, nu, *scalars)
            if tile.last - tile.first > 1:  # the parameter is a copy
                for x, new in tile.parts(param, buffer):
                    x[...] = new


@functools.cache
def fused_step(flags: rule.Flags, xp: Any) -> Callable[..., None]:
    """Return `rule.step` as one kernel with three outputs, in place."""

    def acprop(param: Array, grad: Array, mu: Array, nu: Array, *numbers: Any) -> None:
        update, new_mu, new_nu, _ = rule.step(param, grad, mu, nu, None, rule.Numbers(*numbers), flags, xp)
        param[...] = param + update
        mu[...] = new_mu
        nu[...] = new_nu

    return xp.fuse(kernel_name="acprop")(acprop)
