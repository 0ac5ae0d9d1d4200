"""Norm and finiteness of all gradients, read block by block so that no parameter-sized array is made."""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from acprop_core.adapt import Array, Step, called
from acprop_stepper._buffers import Buffer, blocks_of, on_device_of
from acprop_stepper._tiles import Tiles

_BLOCK = 2**15


def find_nonfinite(
    buffers: Sequence[Buffer], names: Sequence[str], leaves: Sequence[Array | None], step: Step, tame: bool
) -> tuple[str | None, bool]:
    """Name a value that is not finite, or would not be after this step, or None; and whether the moments stay tame.

    They are tame if none exceeds `safe_magnitude`. Otherwise the step is computed before it is judged.
    """
    exact = not tame
    parts = [(buffer, [leaves[i] for i in buffer.leaves]) for buffer in buffers]
    for buffer, grads in parts:
        bound = safe_magnitude(buffer, step)
        for leaf, grad in zip(buffer.leaves, grads, strict=True):
            magnitude = 0.0 if grad is None else largest(grad, buffer.xp)
            if not math.isfinite(magnitude):
                return f"{called('gradient', names[leaf])} holds {magnitude}", tame
            exact = exact or magnitude > bound
    for buffer, grads in parts if exact else ():
        if members := Tiles(buffer).nonfinite_in(grads, step):
            culprits = ", ".join(repr(names[buffer.leaves[i]]) for i in members)
            return f"the step would make parameters or moments of {culprits} infinite or NaN", tame
    return None, not exact


def safe_magnitude(buffer: Buffer, step: Step) -> float:
    """Return the magnitude up to which gradients lead to finite results, if moments are not larger.

    0.0 if it is not known.
    """
    numbers, _, _, real_dtype = step.cast_for(buffer.mu.dtype, buffer.params[0].dtype)
    info = np.finfo(real_dtype)
    if min(buffer.params[0].real.dtype.itemsize, buffer.nu.dtype.itemsize) < np.dtype(real_dtype).itemsize:
        return 0.0
    bound = math.sqrt(float(info.max)) / 4.0  # |g - m|^2 stays finite
    largest_update = bound / max(numbers.eps, float(info.tiny)) * abs(numbers.rate)
    return bound if largest_update < float(info.max) / 4.0 else 0.0


def largest(grad: Array, xp: Any) -> float:
    """Return the largest magnitude in a gradient; NaN if it holds one."""
    with np.errstate(all="ignore"), on_device_of(grad):
        return float(np.max([float(xp.max(x)) for x in _magnitudes(grad, xp)], initial=0.0))


def global_norm(grads: Iterable[Array | None], xp: Any) -> tuple[float, float]:
    """Return two factors of the Euclidean norm of all elements of all gradients: the largest magnitude, and the rest.

    Nothing overflows or vanishes on the way, though the norm itself can be more than a float holds.
    """
    peak, ratio = 0.0, 0.0
    with np.errstate(all="ignore"):
        for grad in grads:
            if grad is None:
                continue
            with on_device_of(grad):
                for x in _magnitudes(grad, xp):
                    highest = float(xp.max(x))
                    if not math.isfinite(highest):
                        return highest, 1.0
                    if highest > peak:
                        peak, ratio = highest, ratio * (peak / highest)
                    if peak != 0.0:
                        x = x.astype(np.float64) / peak
                        ratio = math.hypot(ratio, math.sqrt(float(xp.sum(x * x))))
    return peak, ratio


def _magnitudes(grad: Array, xp: Any) -> Iterator[Array]:
    size = _BLOCK if xp is np else 64 * _BLOCK
    for block, elements in blocks_of(grad.shape, size):
        if elements:
            x = grad[block]
            yield xp.abs(x if x.dtype.kind in "fc" else x.astype(np.float32))  # ml_dtypes' kinds are "V"
