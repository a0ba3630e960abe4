"""The NumPy kernel: memory is walked in blocks that stay in cache, and written in place.

Blocks have a fixed size and their sums are added in a fixed order: results do not depend on the number of threads.

Squares of float32 numbers are added in float32 in rows of 128, and the rows in float64: that runs at the speed of
memory, where casting every element runs at a quarter of it. If the result shows that this was not good enough, squares
beyond float32's range or a difference of nearly equal terms, the block is done again in float64. So sums are good to
1e-7 whatever a block holds.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from math import prod
from typing import Any

import numpy as np

from lars_array._arrays import compute_dtype
from lars_array.kernels.base import Gradients, KernelArrays, Writing, common_order
from lars_array.kernels.threads import run, threads_for

__all__ = ["Kernel"]

READ_BLOCK = 1 << 20  # elements of one partial sum
WRITE_BLOCK = 1 << 18  # elements: smaller ones lose more by waiting for the interpreter's lock than they gain
COPIED_BLOCK = 1 << 16  # elements; arrays that are copied anyway are copied in blocks that stay in a core's cache

ROW = 128  # squares that are added in float32
SMALL = 1024  # elements up to which casting costs less than the calls that avoid it
BLOCK = 1 << 16  # elements; terms and scratch stay in a core's cache
WIDE = 8192  # elements; BLAS would start threads of its own beyond 10,000
LEAST = 1e-25  # a block of 2**18 float32 squares loses at most 2**18 * 1.2e-38 = 3e-33 below the range of float32
LEFT = 1 / 16  # terms of which this fraction is left have lost too much in float32

# The types that are computed in as they are, in the machine's byte order, and those of their real numbers.
_REAL_OF = {np.dtype(kind): kind(0).real.dtype for kind in (np.float64, np.float32, np.complex128, np.complex64)}


class Kernel(Writing):
    """See `lars_array.kernels`."""

    DESCRIPTION = "NumPy arrays, in place, in cache-sized blocks"

    def __init__(self, arrays: KernelArrays, xp: Any = np) -> None:
        self._trained, self._copies, self._buffers = arrays.trained, arrays.copies, arrays.buffers

    @staticmethod
    def unsupported_reason(params: Sequence[Any]) -> str | None:
        """Return None for NumPy arrays, else why not."""
        strange = next((type(p).__name__ for p in params if not isinstance(p, np.ndarray)), None)
        return None if strange is None else f"it takes NumPy arrays only, not {strange}"

    @staticmethod
    def fallback() -> Any:
        """Return None: it takes all layouts."""
        return None

    def sums(self, grads: Gradients, operand: Any = None) -> Any:
        """Return `core.sums`."""
        count = len(self._trained)
        weights = None if operand is None else [[0.0] * count if x is None else x.tolist() for x in operand]
        buffers = self._buffers
        reads_buffer = [weights is not None and weights[2][i] != 0 and v is not None for i, v in enumerate(buffers)]
        arrays = zip(self._trained, grads.arrays, buffers, reads_buffer, strict=True)
        pieces = _Pieces([[p, g, v] if reads else [p, g] for p, g, v, reads in arrays], READ_BLOCK)
        partial = np.zeros((len(pieces.sizes), 3))

        def third_sum(i: int, blocks: list[Any], p_squares: float, g_squares: float) -> float:
            if weights is None:
                return g_squares
            gamma, w, h = (x[i] for x in weights)
            if w == 0 and gamma != 0 and not reads_buffer[i]:  # 0 times a sum that overflows is nan
                return float(gamma**2 * g_squares)
            squares = w**2 * p_squares + gamma**2 * g_squares
            return _sum_of_squares_of(blocks, [w, gamma, h][: len(blocks)], squares)

        def measure(k: int) -> None:
            for blocks in pieces.blocks(k):
                p_squares, g_squares = _sum_of_squares(blocks[0]), _sum_of_squares(blocks[1])
                partial[k] += p_squares, g_squares, third_sum(pieces.layer[k], blocks, p_squares, g_squares)

        run(measure, pieces.sizes)
        S = np.zeros((count, 3))
        np.add.at(S, pieces.layer, partial)
        return S

    def writer(self, grads: Gradients, C: Any, taken: Any = None) -> Callable[[], None]:
        """See `Writing`; memory is walked backwards: `sums` has left the end of it in cache."""
        arrays = zip(self._trained, grads.arrays, self._buffers, self._copies, strict=True)
        layers = [[p, g, *(x for x in rest if x is not None)] for p, g, *rest in arrays]
        pieces = _Pieces(layers, WRITE_BLOCK)
        count = threads_for(pieces.sizes)
        rows, spaces = C.tolist(), [_Space(pieces, k) for k in range(count)]

        def write(k: int) -> None:
            i, space = pieces.layer[k], spaces.pop()
            for p, g, *rest in pieces.written_blocks(k, space):
                _apply(p, g, None if self._buffers[i] is None else rest[0], rows[i], space)
                if self._copies[i] is not None:
                    np.copyto(rest[-1], p)
            spaces.append(space)

        return partial(run, write, pieces.sizes, count=count, backwards=True)


def _apply(p: Any, g: Any, v: Any, c: Sequence[float], space: _Space) -> None:
    """Do `core.difference` and the subtraction, one operation at a time in existing memory.

    Terms of weight zero are left out, but the gradient is read at least once, so that a NaN in it is not lost.
    """
    m, alpha, beta, kappa, lam, mu = map(p.dtype.type, c)
    total = space.array(0, p.size, p.dtype)
    if v is not None:
        np.multiply(v, m, out=v)
        _add(v, total, alpha, g)
        if beta:
            _add(v, total, beta, p)
        np.multiply(v, kappa, out=total)
    else:
        lam, mu = lam + kappa * alpha, mu + kappa * beta
        np.multiply(g, lam, out=total)
        lam = 0
    for weight, x in ((lam, g), (mu, p)):
        if weight:
            _add(total, space.array(1, p.size, p.dtype), weight, x)
    np.subtract(p, total, out=p)


def _add(total: Any, part: Any, weight: Any, x: Any) -> None:
    np.multiply(x, weight, out=part)
    np.add(total, part, out=total)


# ---------------------------------------------------------------------------------------------------- sums of squares


def _sum_of_squares(x: Any) -> float:
    """Return the sum over x² of a contiguous block; nan or inf if and only if x, of float32, holds one."""
    if x.size <= SMALL:
        wide = x.astype(np.float64, copy=False)
        return float(np.dot(wide, wide))
    whole = x.size // ROW * ROW
    rows = x[:whole].reshape(-1, ROW)
    total = float(np.add.reduce(np.vecdot(rows, rows), dtype=np.float64)) + float(np.vecdot(x[whole:], x[whole:]))
    if x.dtype == np.float32 and not LEAST <= total < np.inf:
        return _sum_wide([x], [1.0])
    return total


def _sum_of_squares_of(terms: list[Any], weights: list[float], squares: float) -> float:
    """Return the sum over (Σ weights[i] terms[i])², given Σ (weights[i] terms[i])² of the first two terms."""
    kind = terms[0].dtype
    if any(term.itemsize > kind.itemsize for term in terms):
        return _sum_wide(terms, weights)
    result = 0.0
    for start in range(0, terms[0].size, BLOCK):
        total, *others = (term[start : start + BLOCK] for term in terms)
        total = np.multiply(total, kind.type(weights[0]), out=_scratch(total.size, kind, 0))
        for other, weight in zip(others, weights[1:], strict=True):
            total += np.multiply(other, kind.type(weight), out=_scratch(other.size, kind, 1))
        result += _sum_of_squares(total)
    if kind == np.float32 and not max(LEFT * squares, LEAST) <= result < np.inf:
        return _sum_wide(terms, weights)
    return result


def _sum_wide(terms: list[Any], weights: list[float]) -> float:
    """Return the sum over (Σ weights[i] terms[i])², in float64 throughout."""
    result = 0.0
    for start in range(0, terms[0].size, WIDE):
        total = weights[0] * terms[0][start : start + WIDE].astype(np.float64)
        for term, weight in zip(terms[1:], weights[1:], strict=True):
            total += weight * term[start : start + WIDE].astype(np.float64)
        result += float(np.dot(total, total))
    return result


# ------------------------------------------------------------------------------------------------------------- blocks


class _Pieces:
    """The arrays of many layers, of each the parameters first, in pieces that can be processed in any order."""

    def __init__(self, layers: Sequence[Sequence[Any]], block: int) -> None:
        self._layers, self._block = layers, block
        self._views = [_flat_views(arrays) for arrays in layers]
        self.layer: list[int] = []
        self.sizes: list[int] = []
        self._start: list[int] = []
        for i, (arrays, views) in enumerate(zip(layers, self._views, strict=True)):
            # Arrays that can't be viewed are one piece: the iterator decides in which order it copies them.
            size = arrays[0].size if views is None else views[0].size
            step = max(size, 1) if views is None else block
            for start in range(0, size, step):
                self.layer.append(i)
                self._start.append(start)
                self.sizes.append(min(step, size - start))

    def blocks(self, k: int) -> Iterable[list[Any]]:
        """Return blocks of the arrays of piece `k`: flat, real, contiguous, of the type computed in or wider."""
        views, start = self._views[self.layer[k]], self._start[k]
        if views is None:
            return _copied_blocks(self._layers[self.layer[k]])
        return ([view[start : start + self._block] for view in views],)

    def written_blocks(self, k: int, space: _Space) -> Iterable[list[Any]]:
        """Return the arrays of piece `k` in blocks to be written, all but the second, of the type computed in."""
        if self._views[self.layer[k]] is None:
            return _stored_blocks(self._layers[self.layer[k]], space)
        return self.blocks(k)

    def space(self) -> tuple[int, int]:
        """Return the bytes of the largest block, and of the largest that is copied."""
        layers = list(zip(self._layers, self._views, strict=True))
        viewed = [min(views[0].size, self._block) * views[0].itemsize for _, views in layers if views is not None]
        copied = [_copied_bytes(arrays[0]) for arrays, views in layers if views is None]
        return max([*viewed, *copied], default=0), max(copied, default=0)


class _Space:
    """Memory that one thread writes a step with, made before anything is written; a thread keeps it between steps.

    Parameters
    ----------
    pieces : _Pieces
        What is to be written.
    number : int
        Of those that this thread has asked for, of which a step uses several.
    """

    def __init__(self, pieces: _Pieces, number: int) -> None:
        largest, copied = pieces.space()
        self._rows = [_scratch(largest if k < 2 else copied, np.dtype(np.uint8), (number, k)) for k in range(6)]

    def array(self, k: int, size: int, dtype: Any) -> Any:
        """Return an uninitialised array, the same memory for the same `k`: two to compute with, four for copies."""
        return self._rows[k][: size * dtype.itemsize].view(dtype)


def _copied_bytes(p: Any) -> int:
    return int(min(p.size, COPIED_BLOCK) * np.dtype(compute_dtype(p, np)).itemsize)


def _copied_blocks(arrays: Sequence[Any]) -> Iterator[list[Any]]:
    """Yield blocks of arrays of any strides and types."""
    kind = np.dtype(compute_dtype(arrays[0], np))
    arrays = list(map(np.atleast_1d, arrays))  # views; NumPy before 2.3 buffers nothing of arrays without an axis
    access: Any = [["readonly", "contig", "aligned", "nbo"]] * len(arrays)
    types = [np.result_type(kind, compute_dtype(x, np)) for x in arrays]
    with np.nditer(
        arrays, ["buffered", "external_loop"], access, types, "K", "same_kind", buffersize=COPIED_BLOCK
    ) as iterator:
        for blocks in iterator:
            yield [x.view(_REAL_OF[x.dtype]) for x in blocks]


def _stored_blocks(arrays: Sequence[Any], space: _Space) -> Iterator[list[Any]]:
    """Yield blocks of arrays of any strides and types; what is changed in one is stored when the next is asked for."""
    kind = np.dtype(compute_dtype(arrays[0], np))
    strides = [abs(x) for x in arrays[0].strides]
    axes = sorted(range(len(strides)), key=strides.__getitem__, reverse=True)
    arrays = [np.atleast_1d(x.transpose(axes)) for x in arrays]
    for index in _parts(arrays[0].shape, COPIED_BLOCK):
        parts = [x[index] for x in arrays]
        blocks = [space.array(2 + k, part.size, kind) for k, part in enumerate(parts)]
        for part, block in zip(parts, blocks, strict=True):
            np.copyto(block.reshape(part.shape), part, casting="same_kind")
        yield [block.view(_REAL_OF[kind]) for block in blocks]
        for k, (part, block) in enumerate(zip(parts, blocks, strict=True)):
            if k != 1:
                np.copyto(part, block.reshape(part.shape), casting="same_kind")


def _parts(shape: Sequence[int], most: int) -> Iterator[tuple[Any, ...]]:
    """Yield indices of parts of an array, each of at most `most` elements."""
    if prod(shape) <= most:
        yield (...,)
    elif rows := most // prod(shape[1:]):
        yield from ((slice(start, start + rows),) for start in range(0, shape[0], rows))
    else:
        yield from ((i, *rest) for i in range(shape[0]) for rest in _parts(shape[1:], most))


def _flat_views(arrays: Sequence[Any]) -> list[Any] | None:
    """Return flat real views of arrays of one shape in one common order, or None where that takes copying."""
    kind = arrays[0].dtype
    real = _REAL_OF.get(kind)
    if real is None or any(a.dtype != kind or not a.flags.aligned for a in arrays):
        return None
    axes = common_order(arrays)
    if axes is None:
        return None
    flat = [a.transpose(axes).reshape(-1) for a in arrays]
    return flat if real == kind else [a.view(real) for a in flat]


_kept = threading.local()


def _scratch(size: int, dtype: Any, slot: Any) -> Any:
    """Return an uninitialised array that this thread may use until it asks for the same slot again."""
    arrays: dict[Any, Any] = _kept.__dict__
    if (dtype, slot) not in arrays or arrays[dtype, slot].size < size:
        arrays[dtype, slot] = np.empty(size, dtype)
    return arrays[dtype, slot][:size]
