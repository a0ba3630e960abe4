"""Worker processes that each train one run at a time and exit with the main process, however it ends."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing.connection import wait
from multiprocessing.synchronize import Event
from types import FrameType, TracebackType

from lars_array.demo.data import Digits
from lars_array.demo.experiment import Outcome, Run, train, trust_ratios


class Workers:
    """A pool of processes, used in a ``with`` statement.

    Parameters
    ----------
    digits : Digits
        The data of all runs.
    count : int, optional
        Number of processes; by default one per processor, at most 8.
    """

    def __init__(self, digits: Digits, count: int | None = None) -> None:
        context = multiprocessing.get_context("spawn")  # The same on every platform.
        self._stop = context.Event()
        self._pool = ProcessPoolExecutor(count or min(_processors(), 8), context, _start, (digits, self._stop))

    def map(self, runs: Iterable[Run], done: Callable[[Run], None]) -> dict[Run, Outcome]:
        """Train all of `runs`.

        Parameters
        ----------
        runs : iterable of Run
            Equal runs are trained once.
        done : callable
            Called with every run as it ends.

        Returns
        -------
        dict of Run to Outcome
            In the order of `runs`, regardless of the order in which they ended.
        """
        unique = list(dict.fromkeys(runs))
        with _ctrl_c_held_back():  # Submitting starts the processes; only this process handles Ctrl-C, and stops them.
            # The longest runs first, so that none of them ends last.
            futures = {self._pool.submit(_train, run): run for run in sorted(unique, key=lambda run: run.batch_size)}
        outcomes = {}
        for future in as_completed(futures):
            outcomes[futures[future]] = future.result()
            done(futures[future])
        return {run: outcomes[run] for run in unique}

    def trust_ratios(self, run: Run) -> dict[str, list[float]]:
        """Train `run` in a worker and return the trust ratios of its layers at every step."""
        with _ctrl_c_held_back():
            future = self._pool.submit(_trust_ratios, run)
        return future.result()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with _ctrl_c_held_back():  # A second one must not interrupt this. It is quick: every run ends at its next step.
            self._stop.set()
            self._pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _ctrl_c_held_back() -> Iterator[None]:
    """Defer Ctrl-C to the end of the block. Processes started in the block never receive it: they inherit the mask."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "pthread_sigmask"):
        yield
        return
    held: list[tuple[int, FrameType | None]] = []
    handler = signal.signal(signal.SIGINT, lambda number, frame: held.append((number, frame)))
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        signal.signal(signal.SIGINT, handler)
        if held and callable(handler):
            handler(*held[0])


def _processors() -> int:
    """Return the number of processors available to this process."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# ---------------------------------------------------------------------------------------------- in a worker process

_digits: Digits
_stop: Event


def _start(digits: Digits, stop: Event) -> None:
    from threadpoolctl import threadpool_limits

    global _digits, _stop
    _digits, _stop = digits, stop
    threadpool_limits(1)  # One process per processor: additional BLAS threads would only compete with them.
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _train(run: Run) -> Outcome:
    return train(run, _digits, _stop.is_set)


def _trust_ratios(run: Run) -> dict[str, list[float]]:
    return trust_ratios(run, _digits, _stop.is_set)
