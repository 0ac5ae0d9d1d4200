"""`rule.step` on memory, for adapters: compiled by Numba (`cpu`, `sixteen_bits`), or as calls with outputs (`calls`).

Import each module by its name, where its dependencies are installed; `import acprop_core` imports none of them.
"""

import functools
from collections.abc import Callable
from typing import Any

from acprop_core._checks import warn

NOT_INSTALLED = "Numba is not installed"


@functools.cache
def why_no_numba() -> str | None:
    """Return why Numba cannot compile here, or None if it can; `NOT_INSTALLED` is one reason.

    Numba is used once to find out, because it may be installed and not work: too old for this NumPy, or switched off.
    """
    try:
        import numba

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
