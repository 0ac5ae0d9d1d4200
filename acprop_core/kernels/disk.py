"""Programs that Numba has compiled, on disk, so that the next process loads them: 0.1 s instead of 2.

They are in Numba's cache: `__pycache__` next to cpu.py, or a folder of the user's if that cannot be written;
NUMBA_CACHE_DIR names another. ACPROP_CACHE=0 in the environment switches it off.
"""

import contextlib
import hashlib
import os
import threading
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import llvmlite
import numba
from llvmlite import binding
from numba.core.bytecode import FunctionIdentity
from numba.core.caching import FunctionCache

from acprop_core import rule

SWITCH = "ACPROP_CACHE"
_SOURCES = [
    Path(rule.__file__),
    *map(Path(__file__).with_name, ("cpu.py", "disk.py", "element.py", "scalars.py", "sixteen_bits.py")),
]


def _digest() -> str | None:
    """Return what identifies the sources, the compiler and the processor; None if a source cannot be read."""
    try:
        sources = [file.read_bytes() for file in _SOURCES]
    except OSError:  # in a zip archive, for example
        return None
    processor = f"{binding.get_host_cpu_name()} {binding.get_host_cpu_features().flatten()}"
    parts = [*sources, f"{numba.__version__} {llvmlite.__version__} {processor}".encode()]
    return "".join(hashlib.sha256(part).hexdigest() for part in parts)


# Numba puts a number into the name of each compiled function, counted from 1 in each process. Where programs of several
# processes are loaded into one, two functions would have one name, and the first would run in the place of the second.
# So the numbers are drawn at random; without them nothing is kept on disk.
_HAS_NUMBERS = hasattr(FunctionIdentity, "_unique_ids")
if _HAS_NUMBERS:
    _numbers: Any = iter(lambda: int.from_bytes(os.urandom(8), "little"), -1)
    FunctionIdentity._unique_ids = _numbers

_one_at_a_time = threading.Lock()  # because Numba prepares itself without a lock, at the first program of a process
_KEY = _digest()  # of the sources as they were imported


class _Names(types.ModuleType):
    """What a program is made of: the only variable of its closure.

    Numba's key of a program has the closure pickled. Pickled functions would differ from process to process.
    """

    def __reduce__(self) -> Any:
        return str, (self.__name__,)


def compiled(
    make: Callable[[Any], Callable[..., Any]],
    signature: Any,
    parts: Mapping[str, Any],
    kind: str,
    compiler: str = "njit",
) -> Any:
    """Return the function that `make` returns, compiled for this signature, or loaded from a file.

    Parameters
    ----------
    make : callable
        Called with a namespace of the `parts`, which must be the function's only variable from outside its module.
    signature : numba signature
        The types of its arguments.
    parts : mapping
        Compiled functions and constants.
    kind : str
        Names the function and the options from which its parts are made.
    compiler : {"njit", "cfunc"}
        Of Numba; "cfunc" for a function that C code can call.
    """
    # The name of the file is unique to the key too. In one file of several programs, one process could put its program
    # where the index of another process says that there is another.
    key = hashlib.sha256(f"{kind} {_KEY}".encode()).hexdigest()
    names = _Names(key)
    vars(names).update(parts)
    function: Any = make(names)
    function.__qualname__ = f"{function.__name__}_{key[:32]}"
    compile_function = getattr(numba, compiler)
    options = {"nogil": True, "error_model": "numpy"}
    with _one_at_a_time:
        if _HAS_NUMBERS and _KEY is not None and os.environ.get(SWITCH) != "0":
            try:
                return compile_function(signature, cache=True, **options)(function)
            except Exception:  # no folder can be written, the disk is full, or a file is damaged
                _remove(function)
        return compile_function(signature, **options)(function)


def _remove(function: Callable[..., Any]) -> None:
    """Remove the files of a function, because Numba never replaces a damaged one; the next process writes them anew."""
    with contextlib.suppress(Exception):  # there may be no folder, or no right to remove
        folder = Path(FunctionCache(function).cache_path)  # type: ignore[no-untyped-call]
        for file in folder.glob(f"*{function.__qualname__}*.nb[ci]"):
            file.unlink()
