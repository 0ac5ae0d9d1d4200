"""A step that is always finished once it has begun, whatever interrupts it.

Signal handlers, Ctrl-C's above all, run between any two instructions of the main thread and may raise there. So the
main thread only waits, and another thread, where no handler runs, does the writing.
"""

import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from queue import SimpleQueue

Task = Callable[[], None]  # writes memory that no other task touches, or raises and has written nothing


class Work:
    """All tasks of a step, and what makes it count when they are done."""

    def __init__(self, tasks: Sequence[Task], count: Task, threads: int = 1) -> None:
        self.finished = False
        self._pending = deque(tasks)
        self._count = count
        self._threads = threads
        self._errors: list[BaseException] = []
        self._attempt: _Attempt | None = None

    @property
    def begun(self) -> bool:
        """Whether anything may have been written."""
        return self._attempt is not None

    def finish(self) -> None:
        """Run the pending tasks, then raise what interrupted the wait.

        Raises what a task raises (MemoryError, say); its task and those after it are still pending then.
        """
        interruption: BaseException | None = None
        while not self.finished:
            try:
                if self._attempt is None:
                    self._attempt = _Attempt(self._run)
                self._attempt.wait()
            except BaseException as error:
                interruption = interruption or error
                continue
            if not self.finished:
                self._attempt = _Attempt(self._run)  # for the next call
                raise self._errors.pop()
        if interruption is not None:
            raise interruption

    def _run(self) -> None:
        helpers = [threading.Thread(target=self._drain) for _ in range(min(self._threads, len(self._pending)) - 1)]
        started = [helper for helper in helpers if _start(helper)]
        self._drain()
        for helper in started:
            helper.join()
        if not self._pending:
            self._count()
            self.finished = True

    def _drain(self) -> None:
        while True:
            try:
                task = self._pending.popleft()
            except IndexError:
                return
            try:
                task()
            except BaseException as error:
                self._errors.append(error)
                self._pending.append(task)
                return


class _Attempt:
    """A function that runs once, in the worker, and can be waited for as often as one likes."""

    def __init__(self, run: Task) -> None:
        self._run = run
        self._sent = False
        self._only_once = threading.Lock()
        self._ended = threading.Lock()
        self._ended.acquire()

    def wait(self) -> None:
        if not self._sent:
            _worker.send(self)  # twice, if the next line is interrupted; the second call then finds it done
            self._sent = True
        with self._ended:
            pass

    def __call__(self) -> None:
        if self._only_once.acquire(blocking=False):
            try:
                self._run()
            finally:
                self._ended.release()


class _Worker:
    """One thread for all steppers of a process; a call takes 15 microseconds, a new thread 100."""

    def __init__(self) -> None:
        self._calls: SimpleQueue[Task] = SimpleQueue()
        self._thread = threading.Thread(target=self._loop, daemon=True)

    def send(self, call: Task) -> None:
        if not self._thread.is_alive():
            self._thread = threading.Thread(target=self._loop, name="acprop_stepper", daemon=True)
            if not _start(self._thread):
                call()  # here, then
                return
        self._calls.put(call)

    def _loop(self) -> None:
        while True:
            self._calls.get()()


def _start(thread: threading.Thread) -> bool:
    try:
        thread.start()
    except RuntimeError:  # no more threads can be had, or the interpreter is about to end
        return False
    return True


def _new_worker() -> None:
    global _worker
    _worker = _Worker()


_new_worker()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_worker)  # threads do not survive a fork
