"""Threads that wait for work, and lend a hand with a step.

`concurrent.futures` would do, but takes a tenth of a millisecond for it, where a step of ResNet-50 takes ten.
"""

from __future__ import annotations

import os
import sys
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
        assert self._work is not None
        try:
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
        # Of several threads that ask at the same time, all are given what the first has set.
        return self._takers.setdefault("first", taker) == taker


class Helpers:
    """Threads that take jobs from one queue. They don't keep the interpreter from ending."""

    def __init__(self) -> None:
        self.queue: SimpleQueue[Job] = SimpleQueue()
        self.count = 0
        self._lock = threading.RLock()  # a signal handler may come between that takes a step

    def offer(self, jobs: Sequence[Job]) -> None:
        """Have the jobs done, each by another thread, as far as threads are to be had."""
        if self.count < len(jobs):
            self._start(len(jobs))
        for job in jobs[: self.count]:  # with nobody to fetch them they would pile up
            self.queue.put(job)

    def _start(self, count: int) -> None:
        with self._lock:
            while self.count < count and not sys.is_finalizing():  # else a thread is waited for that never begins
                try:
                    threading.Thread(target=self._work_off, name=f"lars-array-{self.count}", daemon=True).start()
                except RuntimeError:  # none is to be had
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

    Raises
    ------
    BaseException
        An interrupt that has come meanwhile, else what a helper has raised, else what ``work`` has raised here.
    """
    jobs = [Job(work) for _ in range(count - 1)]
    interrupt: BaseException | None = None
    try:
        if jobs:
            _helpers.offer(jobs)
        work()
    finally:
        # An interrupt has to wait too: helpers write to what the caller sees. It comes at calls and where loops end, so
        # there is none of these between the two `try`. A second one at the same moment does not wait; but what helpers
        # work on they also hold.
        while True:
            try:
                for job in jobs:
                    job.wait()
                break
            except BaseException as error:
                interrupt = error
        failures = [x for x in (interrupt, *(job.failure for job in jobs)) if x is not None]
        for job in jobs:
            job.failure = None  # it leads to the frames that it has passed, and they would lead back to it
        if failures:
            try:
                raise failures[0]
            finally:
                failures, interrupt = [], None


def _forget_helpers() -> None:
    """After a fork the child has none of the threads."""
    global _helpers
    _helpers = Helpers()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_helpers)
