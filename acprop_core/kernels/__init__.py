"""`rule.step` on memory, for adapters: compiled by Numba (`cpu`, `cuda`), or as calls with outputs (`calls`).

Import each module by its name, where its dependencies are installed; `import acprop_core` imports none of them.
"""

import functools
import importlib.util
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from acprop_core._checks import warn

NOT_INSTALLED = "Numba is not installed"
NO_CUDA = "numba-cuda is not installed"


@functools.cache
def why_no_numba() -> str | None:
    """Return why Numba cannot compile here, or None if it can; `NOT_INSTALLED` is one reason.

    Numba is used once to find out, because it may be installed and not work: too old for this NumPy, or switched off.
    """
    try:
        # In another thread, because Ctrl-C arrives in the main one: an interrupted import leaves Numba in pieces.
        with ThreadPoolExecutor(1) as other:
            numba = other.submit(importlib.import_module, "numba").result()

        from acprop_core.kernels.disk import compiled

        if getattr(numba.config, "DISABLE_JIT", 0):
            return "Numba compiles nothing, because NUMBA_DISABLE_JIT is set"
        if compiled(_make_add_one, "int64(int64)", {}, "add one")(1) != 2:
            return "Numba computes 1 + 1 wrongly"
    except Exception as error:  # of any type: the caller can do without Numba
        if isinstance(error, ModuleNotFoundError) and error.name == "numba":
            return NOT_INSTALLED
        return f"Numba does not work here ({type(error).__name__}: {error})"
    return None


@functools.cache
def why_no_numba_cuda(capability: tuple[int, int]) -> str | None:
    """Return why Numba cannot compile for CUDA devices of this compute capability, or None if it can.

    A kernel is compiled and loaded to find out, because numba-cuda may be installed and not fit the device or its
    driver. `NO_CUDA` is one reason.
    """
    if importlib.util.find_spec("numba_cuda") is None:
        return NO_CUDA
    try:
        from acprop_core.kernels import cuda_device

        def nothing(a: int, b: int, c: int, d: int, e: int) -> None:
            pass

        cuda_device.load(cuda_device.assemble(cuda_device.compile_kernel(nothing, capability), capability))
    except Exception as error:  # of any type: the caller can do without Numba
        return f"numba-cuda does not work here ({type(error).__name__}: {error})"
    return None


def _make_add_one(names: Any) -> Callable[[int], int]:
    def add_one(x: int) -> int:
        return x + 1

    return add_one


@functools.cache
def numba_works() -> bool:
    """Return whether Numba can compile here; warn, at the first call, if it is installed and cannot."""
    reason = why_no_numba()
    if reason not in (None, NOT_INSTALLED):
        warn(f"{reason}; continuing without it, which is slower. Repair or uninstall Numba", RuntimeWarning)
    return reason is None
