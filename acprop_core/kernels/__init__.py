"""`rule.step` on memory, for adapters: compiled by Numba (`cpu`, `sixteen_bits`), or as calls with outputs (`calls`).

Import each module by its name, where its dependencies are installed; `import acprop_core` imports none of them.
"""

import functools

from acprop_core._checks import warn

NOT_INSTALLED = "Numba is not installed"


@functools.cache
def why_no_numba() -> str | None:
    """Return why Numba cannot compile here, or None if it can; `NOT_INSTALLED` is one reason.

    Numba is used once to find out, because it may be installed and not work: too old for this NumPy, or switched off.
    """
    try:
        import numba

        function = numba.njit("int64(int64)")(_add_one)
        if function(1) != 2 or not getattr(function, "signatures", None):
            return "Numba compiles nothing, because NUMBA_DISABLE_JIT is set"
    except Exception as error:  # of any type: the caller can do without Numba
        if isinstance(error, ModuleNotFoundError) and error.name == "numba":
            return NOT_INSTALLED
        return f"Numba does not work here ({type(error).__name__}: {error})"
    return None


def _add_one(x: int) -> int:
    return x + 1


@functools.cache
def numba_works() -> bool:
    """Return whether Numba can compile here; warn, at the first call, if it is installed and cannot."""
    reason = why_no_numba()
    if reason not in (None, NOT_INSTALLED):
        warn(f"{reason}; continuing without it, which is slower. Repair or uninstall Numba", RuntimeWarning)
    return reason is None
