"""How the arrays of a layer lie in memory, cut into one-dimensional blocks."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from lars_array.dtypes import compute_dtype

__all__ = ["Pieces", "common_order", "flat_views"]

# The types that are computed on as they are, in the machine's byte order, and those of their real numbers.
_REAL_OF = {np.dtype(kind): kind(0).real.dtype for kind in (np.float64, np.float32, np.complex128, np.complex64)}


BUFFER = 1 << 16  # elements; what is copied anyway is copied in blocks that stay in a core's cache


class Pieces:
    """The arrays of many layers as pieces of a fixed size, which can be worked on in any order.

    Parameters
    ----------
    layers : sequence of sequences of ndarray
        The arrays of each layer, of one shape, the parameters first.
    reads_only : sequence of containers of int, optional
        Which arrays of each layer are only read from; None: all are.
    block : int
        Elements a piece holds at most.

    Attributes
    ----------
    layer : list of int
        The layer of each piece.
    sizes : list of int
        How many elements each piece has.
    """

    def __init__(
        self, layers: Sequence[Sequence[Any]], *, block: int, reads_only: Sequence[Container[int]] | None = None
    ) -> None:
        self.layers, self.block, self.reads_only = layers, block, reads_only
        self.views = [flat_views(arrays) for arrays in layers]
        self.layer: list[int] = []
        self.sizes: list[int] = []
        self._start: list[int] = []
        for i, (arrays, views) in enumerate(zip(layers, self.views, strict=True)):
            # What can't be viewed is one piece: its order in memory is the iterator's business.
            size = arrays[0].size if views is None else views[0].size
            step = max(size, 1) if views is None else block
            for start in range(0, size, step):
                self.layer.append(i)
                self._start.append(start)
                self.sizes.append(min(step, size - start))

    def blocks(self, k: int) -> Iterable[list[Any]]:
        """Return the arrays of piece `k` in blocks: one-dimensional, real, contiguous, of the type computed in.

        Where nothing is written, an array of a wider type than its parameters are computed in keeps that.
        """
        views, start = self.views[self.layer[k]], self._start[k]
        if views is None:
            return self._copied_blocks(self.layer[k])
        return ([view[start : start + self.block] for view in views],)

    def _copied_blocks(self, i: int) -> Iterator[list[Any]]:
        """Any strides, any type: what is written to a block is cast and stored when the next one is asked for."""
        arrays = self.layers[i]
        kind = np.dtype(compute_dtype(arrays[0], np))
        read, write = ([access, "contig", "aligned", "nbo"] for access in ("readonly", "readwrite"))
        reads_only = range(len(arrays)) if self.reads_only is None else self.reads_only[i]
        access: Any = [read if k in reads_only else write for k in range(len(arrays))]
        types = [kind] * len(arrays)
        if self.reads_only is None:
            types = [np.result_type(kind, compute_dtype(x, np)) for x in arrays]
        with np.nditer(
            arrays, ["buffered", "external_loop"], access, types, "K", "same_kind", buffersize=BUFFER
        ) as iterator:
            for blocks in iterator:
                yield [x.view(_REAL_OF[x.dtype]) for x in blocks]


def flat_views(arrays: Sequence[Any]) -> list[Any] | None:
    """Return one-dimensional real views of the arrays in one common order, or None where that takes copying.

    Parameters
    ----------
    arrays : sequence of ndarray
        Arrays of one shape. C order, Fortran order, or any dense layout that all share.

    Returns
    -------
    list of ndarray, or None
        Views of shape (size,), of complex arrays (2 size,). None also for types that are not computed on as they are.
    """
    kind = arrays[0].dtype
    real = _REAL_OF.get(kind)
    if real is None or any(a.dtype != kind or not a.flags.aligned for a in arrays):
        return None
    axes = common_order(arrays)
    if axes is None:
        return None
    flat = [a.transpose(axes).reshape(-1) for a in arrays]
    return flat if real == kind else [a.view(real) for a in flat]


def common_order(arrays: Sequence[Any]) -> Sequence[int] | None:
    """Return the order of the axes in which all arrays, of one shape, are contiguous; None if there is none."""
    if all(a.flags.c_contiguous for a in arrays):
        return range(arrays[0].ndim)
    axes = sorted(range(arrays[0].ndim), key=arrays[0].strides.__getitem__, reverse=True)
    return axes if all(a.transpose(axes).flags.c_contiguous for a in arrays) else None
