"""A pool of threads, and how a step is divided among them.

`concurrent.futures` would save most of this file at half a percent of a step, but its locks are released by Python
code, which an interrupt can skip: Ctrl+C at a bad moment, and the next step waits forever. These are released in C.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any

import numpy as np

from lars_array._interrupts import uninterrupted
from lars_array._messages import shown
from lars_array.kernels.lent import lent_threads

__all__ = ["run", "run_on_threads", "thread_count", "threads_for"]

WORTH_IT = 1 << 20  # elements; below, dividing the work costs more than it saves
MOST = 4  # for NumPy, which holds the interpreter's lock between its loops: further threads only queue for it


def thread_count(most: int | None = None) -> int:
    """Return how many threads a step may use: ``LARS_ARRAY_THREADS``, or the machine's cores up to `most`.

    Parameters
    ----------
    most : int, optional
        Upper bound for the number of cores; the environment variable may exceed it.

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
        raise ValueError(f"LARS_ARRAY_THREADS must be a positive integer; got {shown(given)}")
    return int(given)


def threads_for(sizes: Sequence[int]) -> int:
    """Return how many threads `run` uses for calls over so many elements."""
    return thread_count(MOST) if sum(sizes) >= WORTH_IT else 1


def run(
    work: Callable[[int], None], sizes: Sequence[int], *, count: int | None = None, backwards: bool = False
) -> None:
    """Call ``work(k)`` for each k, on several threads if there is enough work.

    Parameters
    ----------
    work : callable
        Must not raise, and not depend on the order of calls.
    sizes : sequence of int
        The number of elements of each call.
    count : int, optional
        How many threads; by default what `threads_for` returns.
    backwards : bool
        Whether each thread starts at the end of its range, which the previous pass has left in cache.
    """
    count = threads_for(sizes) if count is None else count
    parts = iter(_split(sizes, count))

    def work_off() -> None:
        with np.errstate(all="ignore"):  # per thread; a warning must not become an error halfway through a step
            for part in parts:
                for k in reversed(part) if backwards else part:
                    work(k)

    run_on_threads(work_off, count)


def _split(sizes: Sequence[int], count: int) -> list[range]:
    """Split the indices into at most `count` ranges of about the same total size."""
    if count == 1:
        return [range(len(sizes))]
    cuts, total, seen = [0], sum(sizes), 0
    for k, size in enumerate(sizes):
        if seen * count >= len(cuts) * total and len(cuts) < count:
            cuts.append(k)
        seen += size
    return [range(start, stop) for start, stop in zip(cuts, [*cuts[1:], len(sizes)], strict=True)]


class Job:
    """A call that another thread makes, unless the owner cancels it first.

    The decision is final and can be queried repeatedly. `failure` is the exception that the call raised.
    """

    def __init__(self, work: Callable[[], object]) -> None:
        self.failure: BaseException | None = None
        self._work: Callable[[], object] | None = work
        self._takers: dict[str, str] = {}
        self._is_done = False
        self._done = threading.Lock()
        self._done.acquire()

    def do(self) -> None:
        """Make the call, unless it was cancelled."""
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
        """Cancel the call if it has not begun, else wait until it has ended."""
        if self._is_for("owner"):
            self._work = None  # the job may stay in the queue, and must not keep memory alive there
        elif not self._is_done:
            self._done.acquire()

    def _is_for(self, taker: str) -> bool:
        # setdefault is atomic: of several threads, all read the value that the first one has set.
        return self._takers.setdefault("first", taker) == taker


class ThreadPool:
    """Daemon threads that take jobs from one queue."""

    def __init__(self) -> None:
        self.queue: SimpleQueue[Job] = SimpleQueue()
        self.count = 0
        self._lock = threading.RLock()  # the handler of a signal that does not wait may take a step, too

    def offer(self, jobs: Sequence[Job]) -> None:
        """Queue the jobs, one for each thread that could be started."""
        if self.count < len(jobs):
            self._start(len(jobs))
        for job in jobs[: self.count]:  # without threads to take them, jobs would pile up in the queue
            self.queue.put(job)

    def _start(self, count: int) -> None:
        with self._lock:
            while self.count < count and not sys.is_finalizing():  # start() would wait forever for the thread
                try:
                    threading.Thread(target=self._work_off, name=f"lars-array-{self.count}", daemon=True).start()
                except RuntimeError:  # the system has no thread left
                    return
                self.count += 1

    def _work_off(self) -> None:
        queue = self.queue
        while True:
            queue.get().do()


_pool = ThreadPool()


def run_on_threads(work: Callable[[], object], count: int) -> None:
    """Call ``work()`` on this thread and on up to ``count - 1`` others, and return when all calls have ended.

    Parameters
    ----------
    work : callable
        Processes the remaining work, concurrently with other calls; does nothing if none remains.
    count : int
        The number of threads to use; fewer if the pool's threads are busy.

    Raises
    ------
    BaseException
        An exception of another thread, else that of ``work`` on this one.
    """
    if count == 1:
        work()
        return
    environment = _floating_point_environment()

    def work_alike() -> None:
        own = _floating_point_environment()
        if environment is not None:
            _library.fesetenv(environment)
        try:
            work()
        finally:
            if own is not None:
                _library.fesetenv(own)

    with uninterrupted():  # an interrupt too must wait for the other threads, which write to the caller's arrays
        lent = lent_threads.get()
        if lent is not None and lent(work_alike, count):
            return
        jobs = [Job(work_alike) for _ in range(count - 1)]
        try:
            _pool.offer(jobs)
            work()
        finally:
            for job in jobs:
                job.wait()
            failures = [job.failure for job in jobs if job.failure is not None]
            for job in jobs:
                job.failure = None  # its traceback refers to frames that refer to it: a reference cycle
            if failures:
                try:
                    raise failures[0]
                finally:
                    failures = []


# Whether a thread flushes subnormal numbers to zero, as other libraries have it do, and how it rounds.
try:
    _library: Any = ctypes.CDLL(None)
    _library.fegetenv, _library.fesetenv  # noqa: B018
except (AttributeError, OSError, TypeError):  # not in the C library of this system
    _library = None


def _floating_point_environment() -> Any:
    """Return that of this thread, for `fesetenv`; None where it is unknown."""
    if _library is None:
        return None
    environment = ctypes.create_string_buffer(256)  # of fenv_t, which is 32 bytes on x86-64 and 8 on arm64
    _library.fegetenv(environment)
    return environment


def _forget_threads() -> None:
    """Replace the pool after a fork, which the threads do not survive."""
    global _pool
    _pool = ThreadPool()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)
