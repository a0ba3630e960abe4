"""Sums of squares of one block, good to 1e-7 whatever the block holds.

Squares of float32 numbers are added in float32 in rows of 128, and the rows in float64: that runs at the speed of
memory, where casting every element runs at a quarter of it. If the result shows that this was not good enough, squares
beyond float32's range or a difference of nearly equal terms, the block is done again in float64.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lars_array.kernels.scratch import scratch

__all__ = ["sum_of_squares", "sum_of_squares_of"]

ROW = 128
SMALL = 1024  # elements up to which casting costs less than the calls that avoid it
BLOCK = 1 << 16  # elements; terms and scratch stay in a core's cache
WIDE = 8192  # elements; BLAS would start threads of its own beyond 10,000

# A block of 2**18 float32 squares loses at most 2**18 * 1.2e-38 = 3e-33 below the range of float32.
LEAST = 1e-25
# Terms of which this fraction is left have lost too much in float32.
LEFT = 1 / 16


def sum_of_squares(x: Any) -> float:
    """Return the sum over x².

    Parameters
    ----------
    x : ndarray of shape (size,)
        Contiguous, float32 or float64.

    Returns
    -------
    float
        nan or inf if and only if x holds one, for float32.
    """
    if x.size <= SMALL:
        wide = x.astype(np.float64, copy=False)
        return float(np.dot(wide, wide))
    whole = x.size // ROW * ROW
    rows = x[:whole].reshape(-1, ROW)
    total = float(np.add.reduce(np.vecdot(rows, rows), dtype=np.float64)) + float(np.vecdot(x[whole:], x[whole:]))
    if x.dtype == np.float32 and not LEAST <= total < np.inf:
        return _sum_wide([x], [1.0])
    return total


def sum_of_squares_of(terms: list[Any], weights: list[float], squares: float) -> float:
    """Return the sum over (weights[0] terms[0] + weights[1] terms[1] + …)².

    Parameters
    ----------
    terms : list of ndarrays of shape (size,)
        Contiguous, float32 or float64, none wider than the first; or else all is done in float64.
    weights : list of float
        One a term.
    squares : float
        The sum over (weights[i] terms[i])² of the first two terms, by which cancellation is told.

    Returns
    -------
    float
        The sum.
    """
    kind = terms[0].dtype
    if any(term.itemsize > kind.itemsize for term in terms):
        return _sum_wide(terms, weights)
    result = 0.0
    for start in range(0, terms[0].size, BLOCK):
        total, *others = (term[start : start + BLOCK] for term in terms)
        total = np.multiply(total, kind.type(weights[0]), out=scratch(total.size, kind, 0))
        for other, weight in zip(others, weights[1:], strict=True):
            total += np.multiply(other, kind.type(weight), out=scratch(other.size, kind, 1))
        result += sum_of_squares(total)
    if kind == np.float32 and not max(LEFT * squares, LEAST) <= result < np.inf:
        return _sum_wide(terms, weights)
    return result


def _sum_wide(terms: list[Any], weights: list[float]) -> float:
    """The same in float64 throughout."""
    result = 0.0
    for start in range(0, terms[0].size, WIDE):
        total = weights[0] * terms[0][start : start + WIDE].astype(np.float64)
        for term, weight in zip(terms[1:], weights[1:], strict=True):
            total += weight * term[start : start + WIDE].astype(np.float64)
        result += float(np.dot(total, total))
    return result
