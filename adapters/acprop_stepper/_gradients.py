"""Numbers about all gradients at once, read block by block so that nothing parameter-sized is made."""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from acprop_core.adapt import Array
from acprop_stepper._buffers import blocks_of, on_device_of

_BLOCK = 2**15


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

