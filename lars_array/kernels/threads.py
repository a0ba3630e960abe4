"""Threads that wait for work, and how a step is shared among them.

`concurrent.futures` would save most of this file at half a percent of a step, but its locks are released by Python code,
which an interrupt can skip: Ctrl+C at a bad moment, and the next step waits forever. Locks here are released in C.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Sequence
from queue import SimpleQueue

import numpy as np

__all__ = ["run", "run_on_threads", "thread_count"]

WORTH_IT = 1 << 20  # elements; below, sharing work costs more than it saves
MOST = 4  # for NumPy, which holds the interpreter's lock between its loops: more threads only queue for it


def thread_count(most: int | None = None) -> int:
    """Return how many threads a step may use: ``LARS_ARRAY_THREADS``, or the machine's cores up to `most`.

    Parameters
    ----------
    most : int, optional
        Beyond which more threads do not help the caller.

    Returns
    -------
    int
        At least 1.

    Raises
    ------
    ValueError
        If the environment variable is no positive integer.
    """
    given = os.environ.get("LARS_ARRAY_THREADS")
    if not given:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return cores if most is None else min(cores, most)
    if not given.isdecimal() or int(given) < 1:
        raise ValueError(f"LARS_ARRAY_THREADS must be a positive integer; got {given!r}")
    return int(given)


def run(work: Callable[[int], None], sizes: Sequence[int], *, backwards: bool = False) -> None:
    """Call ``work(k)`` for each k, on several threads if that pays.

    Parameters
    ----------
    work : callable
        Must not raise, and not depend on the order of calls.
    sizes : sequence of int
        How many elements each call handles.
    backwards : bool
        Whether each thread starts at its end: the last pass has left that in cache.
    """
    count = thread_count(MOST) if sum(sizes) >= WORTH_IT else 1
    parts = iter(_split(sizes, count))

    def work_off() -> None:
        with np.errstate(all="ignore"):  # a thread's own; no warning may become an error half way
            for part in parts:
                for k in reversed(part) if backwards else part:
                    work(k)

    run_on_threads(work_off, count)


def _split(sizes: Sequence[int], count: int) -> list[range]:
    """Cut the indices into at most `count` ranges of about the same size."""
    if count == 1:
        return [range(len(sizes))]
    cuts, total, seen = [0], sum(sizes), 0
    for k, size in enumerate(sizes):
        if seen * count >= len(cuts) * total and len(cuts) < count:
            cuts.append(k)
        seen += size
    return [range(start, stop) for start, stop in zip(cuts, [*cuts[1:], len(sizes)], strict=True)]


class Job:
    """Work that is offered to other threads: one does it, or the owner takes it back.

    The owner may ask again and gets the same answer, since an interrupt may come before the answer is used. `failure`
    is the exception that the work has raised.
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
        if not self._is_for("thread"):
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


class ThreadPool:
    """Daemon threads that take jobs from one queue."""

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


_pool = ThreadPool()


def run_on_threads(work: Callable[[], object], count: int) -> None:
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
            _pool.offer(jobs)
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


def _forget_threads() -> None:
    """After a fork the child has none of the threads."""
    global _pool
    _pool = ThreadPool()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)
