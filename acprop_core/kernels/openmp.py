"""The threads of OpenMP, in a process where PyTorch has loaded it.

OpenMP's threads wait for their next work by spinning, for some milliseconds, and other threads get no core meanwhile.
Right after another operation of torch on two cores, a step of 4 million elements takes 5.5 ms with a thread of our own,
and 3.0 with OpenMP's.
"""

import ctypes
import os

_address: int | None = None  # None: not looked up


def region() -> int:
    """Return the address of ``GOMP_parallel(function, data, threads, flags)``, or 0 where it cannot be used."""
    global _address
    if _address is None:
        try:
            _address = ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value or 0
        except (AttributeError, OSError, TypeError):  # another runtime, or another operating system
            _address = 0
    return _address


def _forget() -> None:
    global _address
    _address = 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)  # there it would wait for threads that do not exist
