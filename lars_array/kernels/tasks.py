"""How the work of a step is cut up: into tasks that threads take in order, without waiting for each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from lars_array.kernels.machine import MEASURE, PIECE, WHOLE, WRITE

__all__ = ["tasks"]

SMALL = PIECE  # elements up to which layers share a task
MOST_ROWS = 256  # of one task: what a layer costs beside its elements is little, but not nothing
PART = 4  # pieces in a task of a layer that several threads work on
# Elements beyond which one thread can't hold a layer's parameters and gradients in a cache of 32 MiB.
LARGE = 1 << 22

Task = tuple[int, int, int, int, int]


def tasks(sizes: Sequence[int], what: int, threads: int) -> np.ndarray:
    """Return what is to be done, in the order in which it is to be begun.

    Parameters
    ----------
    sizes : sequence of int
        Elements of each layer, in descending order: the smallest are done last, so that all threads end together.
    what : int
        `MEASURE`, `WRITE`, or both of them. Then one thread does both to a whole layer while it is in its cache, but
        for layers too large for that.
    threads : int
        How many threads there may be.

    Returns
    -------
    int64 array of shape (tasks, 5)
        What to do, the first row and the one after the last, and the first piece and the one after the last, which is
        `WHOLE` for all pieces.
    """
    whole = PART * PIECE
    if what == MEASURE | WRITE:
        whole = max(whole, LARGE if threads == 1 else min(LARGE, sum(sizes) // (4 * threads)))
    found: list[Task] = []
    for row, stop in _runs(sizes, whole):
        if sizes[row] <= whole:
            found.append((what, row, stop, 0, WHOLE))
            continue
        pieces = -(-sizes[row] // PIECE)
        parts = [(first, min(first + PART, pieces)) for first in range(0, pieces, PART)]
        for each in (MEASURE, WRITE):
            if what & each:
                found += [(each, row, stop, *part) for part in (parts if each == MEASURE else reversed(parts))]
    # What was measured last is in cache, and is written first.
    return np.array(found[::-1] if what == WRITE else found, np.int64).reshape(-1, 5)


def _runs(sizes: Sequence[int], whole: int) -> Iterator[tuple[int, int]]:
    """Yield the rows that go together: one alone, or several small ones."""
    start = total = 0
    for row, size in enumerate(sizes):
        if row > start and (total + size > SMALL or row - start == MOST_ROWS):
            yield start, row
            start, total = row, 0
        total += size
    if start < len(sizes):
        yield start, len(sizes)
