"""The tasks of a step, which threads take in order and process without waiting for each other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from lars_array.kernels.compiled.loops import MEASURE, OWN, PIECE, WHOLE, WRITE

__all__ = ["ROOM_FROM", "tasks"]

# Elements of parameters, and as many of gradients, that fit into the cache that all threads share. Measured on
# ResNet-50's layers, on two cores with 32 MiB of shared cache.
CACHE = 1 << 21

SMALL = PIECE  # elements up to which layers share a task
MOST_ROWS = 256  # of one task: each layer has a small fixed cost besides its elements
MOST_PARTS = 1024  # of one layer
LONG = 8  # pieces of a part: hardware prefetching restarts with each part. Measured.
ROOM_FROM = 5  # pieces: smaller layers are never shared, so no partial sums are allocated for them


def tasks(sizes: Any, what: int, threads: int) -> np.ndarray:
    """Return the tasks of a step, in the order in which threads start them.

    Parameters
    ----------
    sizes : sequence of int, or integer array
        Elements of each layer, in descending order: the smallest come last, so that all threads end together.
    what : int
        `MEASURE`, `WRITE` or both. With both, one thread measures and writes a whole layer while it is in cache;
        layers too large for that are shared.
    threads : int
        The largest number of threads.

    Returns
    -------
    int64 array of shape (tasks, 5)
        The stages; the first row and the one after the last; the first piece and the one after the last, `WHOLE` for
        all pieces. Or, instead of the pieces, `OWN` and the number of pieces of a part that the thread chooses.
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
    # The layers measured last are in cache, and are written first.
    return np.array(found[::-1] if what == WRITE else found, np.int64).reshape(-1, 5)


def _runs(sizes: Any) -> Iterator[tuple[int, int]]:
    """Yield the range of rows of each task: one row, or several small ones."""
    start = total = 0
    for row, size in enumerate(sizes):
        if row > start and (total + size > SMALL or row - start == MOST_ROWS):
            yield start, row
            start, total = row, 0
        total += size
    if start < len(sizes):
        yield start, len(sizes)


def _parts(pieces: int, threads: int) -> tuple[int, list[tuple[int, int]]]:
    """Return the number of pieces of a part, and the first piece and the one after the last of each part."""
    # Long, but with at least two parts for each thread if there are enough pieces.
    step = max(1, min(LONG, pieces // (2 * threads)), -(-pieces // MOST_PARTS))
    return step, [(first, min(first + step, pieces)) for first in range(0, pieces, step)]
