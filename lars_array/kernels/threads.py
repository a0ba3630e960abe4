"""A few threads for work that releases the interpreter's lock."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

__all__ = ["run", "thread_count", "together"]

WORTH_IT = 1 << 20  # elements; below, handing work over costs more than it saves
MOST = 4  # for NumPy, which holds the interpreter's lock between its loops: more threads only queue for it

_pool: ThreadPoolExecutor | None = None


def thread_count(most: int | None = None) -> int:
    """Return how many threads a step may use: ``LARS_ARRAY_THREADS``, or the machine's cores up to `most`.

    Parameters
    ----------
    most : int, optional
        Beyond which more threads are no use to the caller.

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
        Whether each thread starts at its end: what the last pass left in cache is used first.
    """
    count = thread_count(MOST) if sum(sizes) >= WORTH_IT else 1
    parts = iter(_split(sizes, count))

    def work_off() -> None:
        with np.errstate(all="ignore"):  # a thread's own; nothing may stop half way
            for part in parts:
                for k in reversed(part) if backwards else part:
                    work(k)

    together(work_off, count)


def together(work: Callable[[], object], count: int) -> None:
    """Call ``work()`` here and on up to ``count - 1`` more threads, if they come in time, and return when all is done.

    Parameters
    ----------
    work : callable
        Does what is left to do, whoever else does so at the same time; called when nothing is left it does nothing.
    count : int
        How many threads it is worth.
    """
    helpers: list[Future[object]] = []
    calls = [work]  # what a thread that comes late finds in the queue must not keep memory alive
    try:
        for _ in range(count - 1):
            try:
                helpers.append(_workers().submit(lambda: calls[0]()))
            except RuntimeError:  # no thread is to be had, at exit say: then this one does it all
                break
        work()
    finally:
        _wait_for(helpers)
        calls.clear()


def _wait_for(helpers: Sequence[Future[object]]) -> None:
    """Return when no helper is at work. An interrupt has to wait too: they work on memory that the caller may free."""
    interrupt: BaseException | None = None
    for helper in helpers:
        while not (helper.cancel() or helper.done()):
            try:
                helper.exception()
            except BaseException as error:
                interrupt = error
    failures = [interrupt, *(helper.exception() for helper in helpers if not helper.cancelled())]
    for failure in failures:
        if failure is not None:
            raise failure


def _split(sizes: Sequence[int], count: int) -> list[range]:
    """Cut the indices into at most `count` runs of about the same size."""
    if count == 1:
        return [range(len(sizes))]
    cuts, total, seen = [0], sum(sizes), 0
    for k, size in enumerate(sizes):
        if seen * count >= len(cuts) * total and len(cuts) < count:
            cuts.append(k)
        seen += size
    return [range(start, stop) for start, stop in zip(cuts, [*cuts[1:], len(sizes)], strict=True)]


def _workers() -> ThreadPoolExecutor:
    global _pool
    if _pool is None:
        from concurrent.futures import ThreadPoolExecutor  # costs a tenth of NumPy's own import

        _pool = ThreadPoolExecutor(max_workers=max(thread_count() - 1, 1), thread_name_prefix="lars-array")
    return _pool


def _forget_pool() -> None:
    """After a fork the child has the pool but none of its threads."""
    global _pool
    _pool = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)
