"""The headers of NumPy arrays, read by compiled code: in Python, one attribute of 10,000 arrays costs a millisecond.

An object begins with `object.__basicsize__` bytes, the last of them the pointer to its type. In an array the pointer to
its data follows, the number of its axes, pointers to lengths, strides, owner and dtype, and flags: the beginning of
PyArrayObject_fields in numpy/ndarraytypes.h. In a list its length follows, and the pointer to its items.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from lars_array._arrays import ArraySpecs, span
from lars_array.kernels.compiled.intrinsics import array_at, at_first, kept_on_disk

__all__ = ["HeaderSpecs", "addresses", "problem"]

_HEAD = object.__basicsize__
_HALF = 0xFFFFFFFF  # a C int, in the lower half of eight bytes
_FLAGS = 0x0100 | 0x0400  # aligned and writeable; the other flags follow from the strides
_FIXED = 3  # leading numbers of a spec: axes, dtype, flags; then lengths and strides


@kept_on_disk
def _read(objects: int, head: int, kind: int, specs: Any, index: Any, found: Any) -> int:
    """Write the addresses of arrays, and return how many match their spec before the first that doesn't."""
    like = np.empty(0, np.int64)
    items = array_at(array_at(objects + head + 8, 1, like)[0], len(index), like)
    for i in range(len(index)):
        header, spec = array_at(items[i] + head - 8, 8, like), specs[index[i]]
        if header[0] != kind:  # the header of another type has another layout
            return i
        axes = header[2] & _HALF
        if axes != spec[0] or header[6] != spec[1] or header[7] & _FLAGS != spec[2]:
            return i
        lengths, strides = array_at(header[3], axes, like), array_at(header[4], axes, like)
        for k in range(axes):
            if lengths[k] != spec[_FIXED + k] or strides[k] != spec[_FIXED + axes + k]:
                return i
        found[i] = header[1]
    return len(index)


@kept_on_disk
def _begin(objects: int, head: int, places: Any) -> None:
    """Write the addresses of arrays."""
    like = np.empty(0, np.int64)
    items = array_at(array_at(objects + head + 8, 1, like)[0], len(places), like)
    for i in range(len(places)):
        places[i] = array_at(items[i] + head, 1, like)[0]


def addresses(arrays: Sequence[Any]) -> Any:
    """Return the addresses of NumPy arrays."""
    listed = _listed(arrays)
    places = np.empty(len(listed), np.int64)
    at_first(_begin, id(listed), _HEAD, places)
    return places


def _listed(arrays: Sequence[Any]) -> list[Any]:
    return arrays if type(arrays) is list else list(arrays)


class HeaderSpecs(ArraySpecs):
    """`ArraySpecs` of NumPy arrays, compared in compiled code."""

    def __init__(self, arrays: Sequence[Any]) -> None:
        known: dict[tuple[Any, ...], int] = {}
        found = ((id(x.dtype), x.dtype, x.shape, x.strides, x.flags.aligned, x.flags.writeable) for x in arrays)
        self._index = np.fromiter((known.setdefault(spec, len(known)) for spec in found), np.int32, len(arrays))
        spans = [span(shape, strides, dtype.itemsize) for _, dtype, shape, strides, *_ in known]
        self._spans_of_known = np.array(spans, np.int64)
        self._known = list(known)  # keeps the dtypes alive, whose addresses identify them
        self._table = np.zeros((len(known), _FIXED + 2 * max((len(spec[2]) for spec in known), default=0)), np.int64)
        for row, (dtype_id, _, shape, strides, aligned, writeable) in zip(self._table, known, strict=True):
            numbers = len(shape), dtype_id, 0x0100 * aligned | 0x0400 * writeable, *shape, *strides
            row[: len(numbers)] = numbers

    @property
    def spans(self) -> Any:
        """See `ArraySpecs`."""
        return self._spans_of_known[self._index]

    def at(self, index: Sequence[int]) -> HeaderSpecs:
        """See `ArraySpecs.at`."""
        specs = copy.copy(self)
        specs._index = self._index[index]
        return specs

    def form(self, i: int) -> tuple[Any, Any]:
        """See `ArraySpecs.form`."""
        _, dtype, shape, *_ = self._known[self._index[i]]
        return dtype, shape

    def same(self, i: int, array: Any) -> bool:
        """See `ArraySpecs.same`."""
        _, *known = self._known[self._index[i]]
        flags = array.flags
        same: bool = known == [array.dtype, array.shape, array.strides, flags.aligned, flags.writeable]
        return same

    def addresses(self, arrays: Sequence[Any]) -> Any:
        """See `ArraySpecs.addresses`."""
        listed, found = _listed(arrays), np.empty(len(arrays), np.int64)
        if len(listed) != len(self._index):
            return None
        count = at_first(_read, id(listed), _HEAD, id(np.ndarray), self._table, self._index, found)
        return found if count == len(found) else None


def problem() -> str | None:
    """Return why arrays can't be read here: their headers may differ from what this module expects."""
    if sys.implementation.name != "cpython" or sys.maxsize < 1 << 32:
        return f"it reads the arrays of CPython of 64 bits, not of {sys.implementation.name}"
    x, y = np.empty((3, 5), np.float32)[:, ::2], np.zeros(2)
    places = [a.__array_interface__["data"][0] for a in (x, y)]
    y.flags.writeable = False
    others = [x, y[None]], [x, y.view(np.int64)], [x, x], [x.T, y], [x, y.copy()]
    specs = HeaderSpecs([x, y])
    if addresses([x, y]).tolist() == places and specs.addresses([x, y]) is not None:
        if specs.addresses([x, y]).tolist() == places and all(specs.addresses(pair) is None for pair in others):
            return None
    return "the arrays of this NumPy are built differently"
