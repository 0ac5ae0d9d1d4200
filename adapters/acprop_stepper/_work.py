"""A step as a list of tasks that is always finished once it is begun, whatever interrupts it."""

import contextlib
import itertools
import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from acprop_core._rule import Array


class Task(Protocol):
    """A part of a step, for memory that no other part touches.

    `run` may be interrupted anywhere and called again; `done` becomes true when all of it is written.
    """

    done: bool

    def run(self) -> None:
        """Do what is not done yet."""


class Work:
    """All tasks of a step, and what makes it count once they are done.

    A signal's handler, Ctrl-C's above all, runs between any two instructions of the main thread. If it raises an
    exception, `finish` takes up the step where that left it, and raises it when the step is complete. If it looks at
    the stepper, that finishes the step first; whatever the main thread was about then finds itself done.
    """

    def __init__(
        self, tasks: Sequence[Task], count: Callable[[], None], threads: int = 1, shielded: bool = False
    ) -> None:
        self.begun = False
        self.finished = False
        self._tasks = tasks
        self._count = count
        self._shielded = shielded  # from signals: nothing runs in the calling thread
        self._next = itertools.count()  # shared by the threads
        helpers = min(threads, len(tasks)) - (0 if shielded else 1)
        self._helpers = [threading.Thread(target=self._help) for _ in range(helpers)]

    def finish(self) -> None:
        """Run what is left, then raise what interrupted it."""
        interruption: BaseException | None = None
        failures = 0
        while True:
            try:
                self._run()
                break
            except Exception as error:
                # what fails thrice (no memory, say) will go on failing; the next use of the stepper takes it up again
                failures += 1
                if failures == 3:
                    raise
                interruption = interruption or error
            except BaseException as error:
                interruption = interruption or error
        if interruption is not None:
            raise interruption

    def _run(self) -> None:
        self.begun = True
        for helper in self._helpers:
            if helper.ident is None:
                with contextlib.suppress(RuntimeError):  # no more threads are to be had: the loop below does its part
                    helper.start()
        if not self._shielded:
            self._drain()
        for helper in self._helpers:
            if helper.ident is not None:
                helper.join()
        for task in self._tasks:  # what an exception cut short in one of the threads
            if not task.done:
                task.run()
        self._count()
        self.finished = True

    def _drain(self) -> None:
        for task in iter(self._take, None):
            task.run()

    def _take(self) -> Task | None:
        i = next(self._next)
        return self._tasks[i] if i < len(self._tasks) else None

    def _help(self) -> None:
        # what fails here fails again in the last loop of _run, where the caller sees it
        for task in iter(self._take, None):
            try:
                task.run()
            except Exception:
                continue


class Copy:
    """The task of copying one array into another."""

    def __init__(self, source: Array, target: Array, place: Callable[[], Any]) -> None:
        self.done = False
        self._source = source
        self._target = target
        self._place = place

    def run(self) -> None:
        """Copy."""
        with self._place():
            self._target[...] = self._source
        self.done = True
