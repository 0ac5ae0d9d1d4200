"""The choice of an engine for each buffer of parameters."""

import importlib
import importlib.util
from collections.abc import Sequence
from typing import Any

import numpy as np

from acprop_core import State
from acprop_core.adapt import Array, flatten, library
from acprop_stepper._buffers import Buffer, on_device_of
from acprop_stepper._cupy import Cupy
from acprop_stepper._tiles import Tiles


def native(xp: Any) -> Any:
    """Return NumPy or CuPy itself for array_api_compat's namespace of it."""
    return importlib.import_module(library(xp)) if library(xp) in ("numpy", "cupy") else xp


def check_engine(engine: str | None, xp: Any) -> None:
    """Refuse an engine that does not exist, is for another library, or is not installed."""
    usable = ("tiles", "numba") if xp is np else ("cupy",)
    if engine is not None and engine not in usable:
        raise ValueError(
            f"engine is {engine!r}; for {'NumPy' if xp is np else 'CuPy'} arrays use "
            f"{' or '.join(map(repr, usable))}, or None for the best that is installed"
        )
    if engine == "numba" and not _has_numba():
        raise ModuleNotFoundError("engine is 'numba', which needs Numba: python -m pip install 'acprop-core[fast]'")


def _has_numba() -> bool:
    return importlib.util.find_spec("numba") is not None


def buffers_of(leaves: Sequence[Array], decays: Sequence[bool], state: State, xp: Any) -> list[Buffer]:
    """Return parameters sorted by dtype, decay and device, with moments of zeros in the dtypes of the state."""
    columns = ([None] * len(leaves) if tree is None else [x for _, x in flatten(tree)] for tree in state[1:])
    kept = list(zip(*columns, strict=True))
    groups: dict[Any, list[int]] = {}
    for i, x in enumerate(leaves):
        if x is not None:
            groups.setdefault((x.dtype, decays[i], getattr(x, "device", None)), []).append(i)
    buffers = []
    for (_, decay, _), members in groups.items():
        params = [leaves[i] for i in members]
        size = sum(x.size for x in params)
        with on_device_of(params[0]):
            mu, nu, carry = (None if x is None else xp.zeros(size, x.dtype) for x in kept[members[0]])
        buffers.append(Buffer(members, params, mu, nu, carry, decay, xp))
    return buffers


def engines_of(buffers: Sequence[Buffer], engine: str | None, xp: Any) -> list[Any]:
    """Return the engines of all buffers."""
    if xp is not np:
        return [Cupy(buffer) if buffer.is_alike() else Tiles(buffer) for buffer in buffers]
    if engine == "tiles" or (engine is None and not _has_numba()):
        return list(map(Tiles, buffers))
    from acprop_stepper._numba import Numba

    compiled: dict[Any, list[Buffer]] = {}
    for buffer in filter(Numba.fits, buffers):
        compiled.setdefault((buffer.params[0].dtype, buffer.mu.dtype), []).append(buffer)
    return [*map(Numba, compiled.values()), *(Tiles(buffer) for buffer in buffers if not Numba.fits(buffer))]
