"""Threads that wait for work, and lend a hand with a step.

`concurrent.futures` would do, but takes a tenth of a millisecond for it, where a step of ResNet-50 takes ten.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from queue import SimpleQueue

__all__ = ["together"]


class Job:
    """Work that is offered to helpers: one does it, or it is taken back.

    Who it is for can be asked again with the same answer, since an interrupt may come before the answer is used.

    Parameters
    ----------
    work : callable
        Called by the helper.

    Attributes
    ----------
    failure : BaseException or None
        What the work has raised.
    """

    def __init__(self, work: Callable[[], object]) -> None:
        self.failure: BaseException | None = None
        self._work: Callable[[], object] | None = work
        self._takers: dict[str, str] = {}
        self._is_done = False
        self._done = threading.Lock()
        self._done.acquire()

    def do(self) -> None:
        """Do it, unless it was taken back."""
        if not self._is_for("helper"):
            return
        try:
            if self._work is not None:
                self._work()
        except BaseException as error:
            self.failure = error
        finally:
            self._work = None
            self._is_done = True
            self._done.release()

    def wait(self) -> None:
        """Return when nobody is at it, and nobody will be."""
        if self._is_for("owner"):
            self._work = None  # what a helper that comes late finds in the queue must not keep memory alive
        elif not self._is_done:
            self._done.acquire()

    def _is_for(self, taker: str) -> bool:
        return self._takers.setdefault("first", taker) == taker


class Helpers:
    """Threads that take jobs from one queue. They don't keep the interpreter from ending."""

    def __init__(self) -> None:
        self.queue: SimpleQueue[Job] = SimpleQueue()
        self.count = 0
        self._lock = threading.Lock()

    def offer(self, jobs: Sequence[Job]) -> None:
        """Have the jobs done, each by another thread, as far as threads are to be had."""
        if self.count < len(jobs):
            self._start(len(jobs))
        for job in jobs:
            self.queue.put(job)

    def _start(self, count: int) -> None:
        with self._lock:
            while self.count < count:
                try:
                    threading.Thread(target=self._work_off, name=f"lars-array-{self.count}", daemon=True).start()
                except RuntimeError:  # none is to be had, at exit say
                    return
                self.count += 1

    def _work_off(self) -> None:
        queue = self.queue
        while True:
            queue.get().do()


_helpers = Helpers()


def together(work: Callable[[], object], count: int) -> None:
    """Call ``work()`` here and on up to ``count - 1`` more threads, if they come in time, and return when all is done.

    Parameters
    ----------
    work : callable
        Does what is left to do, whoever else does so at the same time; called when nothing is left it does nothing.
    count : int
        How many threads it is worth.
    """
    jobs = [Job(work) for _ in range(count - 1)]
    interrupt: BaseException | None = None
    try:
        if jobs:
            _helpers.offer(jobs)
        work()
    finally:
        # An interrupt has to wait too: helpers work on memory that the caller may free. It comes at calls and where
        # loops end, so there is none of these between the two `try`.
        while True:
            try:
                for job in jobs:
                    job.wait()
                break
            except BaseException as error:
                interrupt = error
        for failure in (interrupt, *(job.failure for job in jobs)):
            if failure is not None:
                raise failure


def _forget_helpers() -> None:
    """After a fork the child has none of the threads."""
    global _helpers
    _helpers = Helpers()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_helpers)
