"""Momentum buffers: new ones lie together in one stretch of memory, which the system hands out in large pages."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from lars_array.dtypes import compute_dtype

__all__ = ["Rows", "Slab", "aligned_zeros", "new_buffers"]

ALIGNMENT = 64  # bytes: a line of cache, and what other libraries ask of memory that they are to take over
LARGE = 4096  # bytes: what is smaller lies closer, with as little room between as the allocator of C leaves
CLOSE = 16

_NOTHING, _ALONE = -1, -2


class Slab(NamedTuple):
    """Arrays of one shape and order, in one flat stretch of memory together with others: `rows` of them in all."""

    memory: Any
    rows: int
    shape: tuple[int, ...]
    order: Literal["C", "F"]

    def view(self, start: int) -> Any:
        """Return the array that begins at an element."""
        return np.ndarray(self.shape, self.memory.dtype, self.memory, start * self.memory.itemsize, order=self.order)


class Rows(Sequence[Any]):
    """An array for each of many parameters, or None. Views of slabs are made when they are asked for.

    An array of NumPy takes more than a hundred bytes beside its numbers, as much as a small parameter itself.

    Parameters
    ----------
    count : int
        How many; None each.
    """

    def __init__(self, count: int) -> None:
        # The slab of each, and its first element there; or that there is nothing, or an array alone, to be looked up.
        self._slab_of: Any = np.broadcast_to(np.int32(_NOTHING), count)  # takes no memory until it is written to
        self._starts: Any = np.broadcast_to(np.int64(0), count)
        self._slabs: list[Slab] = []
        self._alone: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self._slab_of)

    def __getitem__(self, i: Any) -> Any:
        slab = self._slab_of[i]
        if slab >= 0:
            return self._slabs[slab].view(int(self._starts[i]))
        return self._alone[int(i)] if slab == _ALONE else None

    def __setitem__(self, i: int, array: Any) -> None:
        self._make_writable()
        self._alone.pop(i, None)
        self._slab_of[i] = _NOTHING
        if array is not None:
            self._slab_of[i] = _ALONE
            self._alone[i] = array

    def present(self) -> Any:
        """Return where there is an array, a bool array of shape (rows,)."""
        return self._slab_of != _NOTHING

    def at(self, index: Any, *, where: Any = True) -> Rows:
        """Return the rows at `index`, of these only those `where` a bool array is true."""
        twin = Rows(len(index))
        index = np.asarray(index, np.int64)
        here = self.present()[index] & where
        if here.any():
            twin._slabs = list(self._slabs)
            twin._slab_of = np.where(here, self._slab_of[index], np.int32(_NOTHING))
            twin._starts = self._starts[index]
            twin._alone = {i: self._alone[int(index[i])] for i in np.flatnonzero(twin._slab_of == _ALONE).tolist()}
        return twin

    def extended(self, count: int) -> Rows:
        """Return these rows and `count` more, None each."""
        twin = Rows(len(self) + count)
        twin.put(range(len(self)), self)
        return twin

    def put(self, index: Any, arrays: Sequence[Any]) -> None:
        """Have these arrays at `index`."""
        if not isinstance(arrays, Rows):
            for i, array in zip(index, arrays, strict=True):
                self[int(i)] = array
            return
        index = np.asarray(index, np.int64)
        if not (arrays.present().any() or self.present()[index].any()):
            return
        self._make_writable()
        for i in self._alone.keys() & index.tolist():
            del self._alone[i]
        shift = np.where(arrays._slab_of >= 0, np.int32(len(self._slabs)), np.int32(0))
        self._slab_of[index], self._starts[index] = arrays._slab_of + shift, arrays._starts
        self._slabs = [*self._slabs, *arrays._slabs]
        self._alone |= {int(index[i]): array for i, array in arrays._alone.items()}
        self._forget_unused()

    def places(self, addresses: Callable[[Sequence[Any]], Any]) -> Any:
        """Return where the data of all begin, 0 for None, given a function that tells it of arrays of NumPy."""
        begin = np.array([*addresses([slab.memory for slab in self._slabs]), 0, 0], np.int64)
        widths = np.array([*(slab.memory.itemsize for slab in self._slabs), 0, 0], np.int64)
        found = begin[self._slab_of] + widths[self._slab_of] * self._starts
        if self._alone:
            found[list(self._alone)] = addresses(list(self._alone.values()))
        return found

    def stretches(self) -> Iterator[tuple[int | None, Any]]:
        """Yield all memory there is, as arrays, each with its row; None where it is that of many."""
        yield from self._alone.items()
        for slab in {id(slab.memory): slab for slab in self._slabs}.values():
            rows = self._rows_in(slab.memory)
            if len(rows) == slab.rows:
                yield None, slab.memory
            else:  # the rest may be somebody else's
                yield from ((i, self[i]) for i in rows.tolist())

    def row_at(self, memory: Any, address: int) -> int:
        """Return whose array begins at, or last before, an address in memory of many."""
        rows = self._rows_in(memory)[::-1]  # of those that begin at one place, all but the last are empty
        starts = self._starts[rows] * memory.itemsize + memory.__array_interface__["data"][0]
        return int(rows[np.argmax(np.where(starts <= address, starts, -1))])

    def _rows_in(self, memory: Any) -> Any:
        mine = np.array([*(slab.memory is memory for slab in self._slabs), False, False])
        return np.flatnonzero(mine[self._slab_of])

    def _make_writable(self) -> None:
        if not self._slab_of.flags.writeable:
            self._slab_of, self._starts = self._slab_of.copy(), self._starts.copy()

    def _forget_unused(self) -> None:
        used = np.bincount(self._slab_of[self._slab_of >= 0], minlength=len(self._slabs)) > 0
        self._slabs = [slab for slab, is_used in zip(self._slabs, used) if is_used]
        new = np.array([*(np.cumsum(used) - 1), _ALONE, _NOTHING], np.int32)
        self._slab_of = new[self._slab_of]


def new_buffers(params: Sequence[Any], xp: Any) -> Rows:
    """Return a momentum buffer of zeros for each of `params`, which is not modified.

    Parameters
    ----------
    params : sequence of arrays
        Parameters of one library.
    xp : Array API namespace
        Its namespace.

    Returns
    -------
    Rows
        Each of the shape of its parameter, in the same order in memory, and of the type that is computed in.
    """
    buffers = Rows(len(params))
    dense: dict[Any, list[int]] = {}
    for i, p in enumerate(params):
        if isinstance(p, np.ndarray) and p.flags.forc:
            dense.setdefault(compute_dtype(p, xp), []).append(i)
        else:
            buffers[i] = xp.zeros_like(p, dtype=compute_dtype(p, xp))
    for kind, layers in dense.items():
        buffers.put(layers, _together([params[i] for i in layers], np.dtype(kind)))
    return buffers


def _together(params: Sequence[Any], kind: Any) -> Rows:
    """Return zeros of the type `kind` for dense arrays, in one slab."""
    sizes = np.fromiter((p.size for p in params), np.int64, len(params))
    small = sizes * kind.itemsize < LARGE
    step = np.where(small, CLOSE, ALIGNMENT) // kind.itemsize
    sizes = -(-sizes // step) * step
    order = np.argsort(small, kind="stable")  # the large ones first
    starts = np.zeros_like(sizes)
    starts[order[1:]] = np.cumsum(sizes[order[:-1]])
    memory = aligned_zeros(int(sizes.sum()), kind)
    known: dict[tuple[Any, ...], int] = {}
    rows = Rows(len(params))
    forms = ((p.shape, "C" if p.flags.c_contiguous else "F") for p in params)
    rows._slab_of = np.fromiter((known.setdefault(form, len(known)) for form in forms), np.int32, len(params))
    rows._starts, rows._slabs = starts, [Slab(memory, len(params), *form) for form in known]
    return rows


def aligned_zeros(size: int, kind: Any) -> Any:
    """Return a NumPy array of `size` zeros of the dtype `kind` that begins where a line of cache does."""
    bytes_ = np.zeros(size * kind.itemsize + ALIGNMENT, np.uint8)
    offset = -bytes_.__array_interface__["data"][0] % ALIGNMENT
    return bytes_[offset : offset + size * kind.itemsize].view(kind)
