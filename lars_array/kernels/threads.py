"""How many threads a step has, and how work that releases the interpreter's lock is shared among them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import numpy as np

from lars_array.kernels.helpers import together

__all__ = ["run", "thread_count"]

WORTH_IT = 1 << 20  # elements; below, handing work over costs more than it saves
MOST = 4  # for NumPy, which holds the interpreter's lock between its loops: more threads only queue for it


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
