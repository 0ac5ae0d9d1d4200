"""The choice of an engine for each buffer of parameters."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from acprop_core import ACProp
from acprop_core.adapt import decays_of, is_compensated, moment_dtypes_of, warn
from acprop_core.kernels import NO_CUDA, NOT_INSTALLED, numba_works, why_no_numba, why_no_numba_cuda
from acprop_stepper._buffers import Buffer, on_device_of
from acprop_stepper._matching import Matching
from acprop_stepper._tiles import Tiles


def check_engine(engine: str | None, xp: Any) -> None:
    """Refuse an engine that does not exist, is for another library, or is not installed."""
    usable = ("tiles", "numba" if xp is np else "cuda")
    if engine is not None and engine not in usable:
        raise ValueError(
            f"engine is {engine!r}; for {'NumPy' if xp is np else 'CuPy'} arrays use "
            f"{' or '.join(map(repr, usable))}, or None for the best that is installed"
        )
    if engine == "numba" and (reason := why_no_numba()) is not None:
        if reason == NOT_INSTALLED:
            raise ModuleNotFoundError("engine is 'numba', which needs Numba: python -m pip install numba")
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
        return _engines_on_cuda(buffers, engine)
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


def _engines_on_cuda(buffers: Sequence[Buffer], engine: str | None) -> list[Any]:
    compiled: dict[Any, list[Buffer]] = {}
    others = []
    for buffer in buffers:
        kind = None if engine == "tiles" else _kind_on_cuda(buffer, engine)
        if kind is None:
            others.append(Tiles(buffer))
        else:
            compiled.setdefault(kind, []).append(buffer)
    if not compiled:
        return others
    from acprop_stepper._cuda import Cuda

    return [*(Cuda(own, capability) for (capability, *_), own in compiled.items()), *others]


def _kind_on_cuda(buffer: Buffer, engine: str | None) -> tuple[Any, ...] | None:
    """Return what buffers have in common that share a launch, or None if Numba cannot step this one."""
    capability = _capability_of(buffer.mu)
    reason = why_no_numba_cuda(capability)
    if engine == "cuda" and reason == NO_CUDA:
        raise ModuleNotFoundError("engine is 'cuda', which needs numba-cuda: python -m pip install 'numba-cuda[cu13]'")
    if engine == "cuda" and reason is not None:
        raise RuntimeError(f"engine is 'cuda', but {reason}; repair it, or use engine='tiles'")
    if reason is not None:
        if reason != NO_CUDA:
            warn(f"{reason}; continuing without it, which is slower. Repair or uninstall numba-cuda", RuntimeWarning)
        return None
    from acprop_stepper._cuda import Cuda

    if not Cuda.fits(buffer):
        return None
    return capability, buffer.mu.device, buffer.params[0].dtype, buffer.mu.dtype


def _capability_of(x: Any) -> tuple[int, int]:
    """Return the compute capability of the device of a CuPy array, (9, 0) for "90"."""
    digits = x.device.compute_capability
    return int(digits[:-1]), int(digits[-1])
