"""Threads that help with compiled calls. They are kept, because to start one takes 100 microseconds."""

import os
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

_jobs: "SimpleQueue[tuple[int, Callable[[], Any]]]" = SimpleQueue()
_threads: list[threading.Thread] = []


def call_beside(call: Callable[[], Any], helpers: int) -> None:
    """Have so many threads call a function, some time, and do not wait for it.

    The function must release the interpreter, raise nothing, and do nothing if it is called too late: a thread may be
    late, and threads that cannot be started are left out.
    """
    while len(_threads) < helpers:
        thread = threading.Thread(target=_loop, args=(_jobs,), name="acprop_core", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # too many threads, or the interpreter is about to end
            helpers = len(_threads)
            break
        _threads.append(thread)
    if helpers and _jobs.qsize() < len(_threads):  # or else they are too late for the last call already
        _jobs.put((helpers, call))


def _loop(jobs: "SimpleQueue[tuple[int, Callable[[], Any]]]") -> None:
    while True:
        helpers, call = jobs.get()
        # Each wakes two more, so that the caller wakes only one: to wake a thread takes it some microseconds.
        for others in ((helpers - 1) // 2, helpers // 2):
            if others:
                jobs.put((others, call))
        call()
        del call  # it holds memory


def _forget() -> None:
    global _jobs
    _jobs = SimpleQueue()
    _threads.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)  # threads do not survive a fork
