"""The choice of an engine for each buffer of parameters."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from acprop_core import ACProp
from acprop_core.adapt import decays_of, is_compensated, moment_dtypes_of
from acprop_core.kernels import NOT_INSTALLED, numba_works, why_no_numba
from acprop_stepper._buffers import Buffer, on_device_of
from acprop_stepper._cupy import Cupy
from acprop_stepper._matching import Matching
from acprop_stepper._tiles import Tiles


def check_engine(engine: str | None, xp: Any) -> None:
    """Refuse an engine that does not exist, is for another library, or is not installed."""
    usable = ("tiles", "numba") if xp is np else ("cupy",)
    if engine is not None and engine not in usable:
        raise ValueError(
            f"engine is {engine!r}; for {'NumPy' if xp is np else 'CuPy'} arrays use "
            f"{' or '.join(map(repr, usable))}, or None for the best that is installed"
        )
    if engine == "numba" and (reason := why_no_numba()) is not None:
        if reason == NOT_INSTALLED:
            raise ModuleNotFoundError("engine is 'numba', which needs Numba: python -m pip install 'acprop-core[fast]'")
        raise RuntimeError(f"engine is 'numba', but {reason}; repair it, or use engine='tiles'")


def buffers_of(optimizer: ACProp, matching: Matching) -> list[Buffer]:
    """Return the parameters sorted by dtype, decay and device, with moments and carries of zeros."""
    xp, decays = matching.xp, decays_of(optimizer, matching.containers)
    groups: dict[Any, list[int]] = {}
    for i, x in enumerate(matching.leaves):
        if x is not None:
            groups.setdefault((x.dtype, decays[i], getattr(x, "device", None)), []).append(i)
    buffers = []
    for (dtype, decay, _), members in groups.items():
        params = [matching.leaves[i] for i in members]
        mu, nu = moment_dtypes_of(params[0], optimizer.moment_dtype, matching.namespace)
        size = sum(x.size for x in params)
        with on_device_of(params[0]):
            carry = xp.zeros(size, dtype) if optimizer.compensate and is_compensated(params[0]) else None
            buffers.append(Buffer(members, params, xp.zeros(size, mu), xp.zeros(size, nu), carry, decay, xp))
    return buffers


def engines_of(buffers: Sequence[Buffer], engine: str | None, xp: Any, threads: int) -> list[Any]:
    """Return the engines of all buffers."""
    if xp is not np:
        return [Cupy(buffer) if buffer.is_alike() else Tiles(buffer) for buffer in buffers]
    if engine == "tiles" or (engine is None and not numba_works()):
        return list(map(Tiles, buffers))
    from acprop_stepper._numba import Numba

    compiled: dict[Any, list[Buffer]] = {}
    others = []
    for buffer in buffers:
        if Numba.fits(buffer):
            compiled.setdefault((buffer.params[0].dtype, buffer.mu.dtype), []).append(buffer)
        else:
            others.append(Tiles(buffer))
    return [*(Numba(own, threads) for own in compiled.values()), *others]
