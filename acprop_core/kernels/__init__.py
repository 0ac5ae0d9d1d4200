"""`rule.step` on memory, for adapters: compiled by Numba (`cpu`, `sixteen_bits`), or as calls with outputs (`calls`).

Import each module by its name, where its dependencies are installed; `import acprop_core` imports none of them.
"""

import functools


@functools.cache
def why_no_numba() -> str | None:
    """Return why Numba cannot be used, None if it can."""
    try:
        import numba

        numba.njit(lambda x: x + 1.0)(1.0)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "NUMBA_DISABLE_JIT is set" if numba.config.DISABLE_JIT else None
