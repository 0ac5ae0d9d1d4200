"""A step that is always finished once it has begun, even if it is interrupted.

Signal handlers, Ctrl-C's above all, run between any two instructions of the main thread and may raise there. So the
main thread only waits, and another thread, where no handler runs, does the writing. `run_at_once` needs no thread.
"""

import functools
import operator
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any

import numpy as np

from acprop_core.kernels.helpers import call_beside

Task = Callable[[], None]  # writes memory that no other task touches, or raises and has written nothing


def run_at_once(calls: Sequence[Callable[[], Any]]) -> None:
    """Call all of these functions, which must be compiled code that calls none of Python.

    Python looks for signals between its own instructions, of which there are none here. So all are called or none.
    """
    with np.errstate(all="ignore"):  # `nonfinite` is for overflow, so no warnings
        deque(map(operator.call, calls), maxlen=0)


class Work:
    """All tasks of a step, and the task that counts it when they are done."""

    def __init__(self, tasks: Sequence[Task], count: Task, threads: int = 1) -> None:
        self.begun = self.finished = False
        self._pending = deque(tasks)
        self._count = count
        self._threads = threads
        self._errors: list[BaseException] = []
        self._ended: Any = None  # the lock of an attempt, held until it ends

    def finish(self) -> None:
        """Run the pending tasks, then raise the exception that interrupted the wait.

        An exception of a task (MemoryError, say) is raised too; the task is then still pending, and another call tries
        it again.
        """
        interruption: BaseException | None = None
        while not self.finished:
            try:
                self.begun = True
                if self._ended is None:
                    self._ended = _worker.send(self._run)
                with self._ended:
                    pass
            except BaseException as error:
                interruption = interruption or error
                continue
            if not self.finished:
                self._ended = None
                raise self._errors.pop() if self._errors else RuntimeError(_FORKED)
        if interruption is not None:
            raise interruption

    def _run(self) -> None:
        try:
            self._do_all()
        except BaseException as error:  # `finish` raises it; here it would end the thread of all steppers
            self._errors.append(error)

    def _do_all(self) -> None:
        locks = [threading.Lock() for _ in range(min(self._threads, len(self._pending)) - 1)]
        if locks:
            call_beside(functools.partial(self._help, locks), len(locks))
        self._drain()
        for lock in locks:
            lock.acquire()  # waits for a thread that is at work; one that comes later finds it taken
        if not (self._pending or self.finished):  # an interrupted `finish` may have sent this twice
            self._count()
            self.finished = True

    def _help(self, locks: Sequence[Any]) -> None:
        for lock in locks:
            if lock.acquire(blocking=False):
                try:
                    self._drain()
                finally:
                    lock.release()
                return

    def _drain(self) -> None:
        while self._pending:
            try:
                task = self._pending.popleft()
            except IndexError:  # another thread was faster
                return
            try:
                task()
            except BaseException as error:
                self._errors.append(error)
                self._pending.append(task)
                return


_FORKED = (
    "a signal handler forked this process in the middle of a step, which only the other process finishes; "
    "make a new stepper here, with new parameters"
)


class _Worker:
    """One thread for all steppers of a process, because passing a job takes 15 microseconds, a new thread 100."""

    def __init__(self) -> None:
        self._jobs: SimpleQueue[tuple[Task, Any]] = SimpleQueue()
        self._thread = threading.Thread(target=self._loop)
        self.open: Any = None  # the lock of the last job

    def send(self, job: Task) -> Any:
        """Return a lock that is released when the job has ended."""
        ended = self.open = threading.Lock()
        ended.acquire()
        if not self._thread.is_alive():
            self._thread = threading.Thread(target=self._loop, name="acprop_stepper", daemon=True)
            if not _start(self._thread):
                self._do(job, ended)  # in this thread instead
                return ended
        self._jobs.put((job, ended))
        return ended

    def _loop(self) -> None:
        while True:
            self._do(*self._jobs.get())

    @staticmethod
    def _do(job: Task, ended: Any) -> None:
        try:
            job()
        finally:
            ended.release()


def cores() -> int:
    """Return the number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start(thread: threading.Thread) -> bool:
    try:
        thread.start()
    except RuntimeError:  # too many threads, or the interpreter is about to end
        return False
    return True


def _new_worker() -> None:
    global _worker
    if _worker.open is not None and _worker.open.locked():
        _worker.open.release()  # the copy of a thread that waits for it would wait forever
    _worker = _Worker()


_worker = _Worker()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_worker)  # threads do not survive a fork
