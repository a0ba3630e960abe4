"""How the work of a step is cut up: into tasks that threads take in order, without waiting for each other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from lars_array.kernels.compiled.loops import MEASURE, OWN, PIECE, WHOLE, WRITE

__all__ = ["ROOM_FROM", "tasks"]

# Elements of parameters, and as many of gradients, that all threads together hold in their common cache. Measured on
# ResNet-50's layers, two cores with 32 MiB in common.
CACHE = 1 << 21

SMALL = PIECE  # elements up to which layers share a task
MOST_ROWS = 256  # of one task: what a layer costs beside its elements is little, but not nothing
MOST_PARTS = 1024  # of one layer
LONG = 8  # pieces of a part: processors look ahead along addresses, and each part is begun without that. Measured.
ROOM_FROM = 5  # pieces: smaller layers are never shared, and need no room for partial sums


def tasks(sizes: Any, what: int, threads: int) -> np.ndarray:
    """Return what is to be done, in the order in which it is to be begun.

    Parameters
    ----------
    sizes : sequence of int, or integer array
        Elements of each layer, in descending order: the smallest are done last, so that all threads end together.
    what : int
        `MEASURE`, `WRITE`, or both of them. Then one thread does both to a whole layer, while it is in cache; layers
        too large for that are shared.
    threads : int
        How many threads there may be.

    Returns
    -------
    int64 array of shape (tasks, 5)
        What to do, the first row and the one after the last, and the first piece and the one after the last, which is
        `WHOLE` for all pieces; or `OWN`, and how many pieces a part has that the thread chooses by itself.
    """
    both = what == MEASURE | WRITE
    whole = max(CACHE // threads if both else 0, (ROOM_FROM - 1) * PIECE)
    found: list[tuple[int, int, int, int, int]] = []
    for row, stop in _runs(sizes):
        if sizes[row] <= whole:
            found.append((what, row, stop, 0, WHOLE))
            continue
        step, parts = _parts(-(-sizes[row] // PIECE), threads)
        if what & MEASURE:
            found += [(MEASURE, row, stop, *part) for part in parts]
        if what & WRITE:
            found += [(WRITE, row, stop, *((OWN, step) if both else part)) for part in parts]
    # What was measured last is in cache, and is written first.
    return np.array(found[::-1] if what == WRITE else found, np.int64).reshape(-1, 5)


def _runs(sizes: Any) -> Iterator[tuple[int, int]]:
    """Yield the rows that go together: one alone, or several small ones."""
    start = total = 0
    for row, size in enumerate(sizes):
        if row > start and (total + size > SMALL or row - start == MOST_ROWS):
            yield start, row
            start, total = row, 0
        total += size
    if start < len(sizes):
        yield start, len(sizes)


def _parts(pieces: int, threads: int) -> tuple[int, list[tuple[int, int]]]:
    """Return how many pieces a part has, and the first and the one after the last of each part.

    Parts are long, but if there are pieces enough each thread has two of them or more.
    """
    step = max(1, min(LONG, pieces // (2 * threads)), -(-pieces // MOST_PARTS))
    return step, [(first, min(first + step, pieces)) for first in range(0, pieces, step)]
