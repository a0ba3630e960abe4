"""Arrays of NumPy as they stand in memory, for compiled code to read: a question to 10,000 takes Python a millisecond.

An object begins with `object.__basicsize__` bytes, the last of them the pointer to its type. In an array the pointer to
its data follows, the number of its axes, pointers to lengths, strides, owner and dtype, and flags: the beginning of
PyArrayObject_fields in numpy/ndarraytypes.h. In a list its length follows, and the pointer to its items.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from lars_array.kernels.intrinsics import array_at, at_first, kept_on_disk
from lars_array.looks import Looks

__all__ = ["HeaderLooks", "addresses", "problem"]

_HEAD = object.__basicsize__
_HALF = 0xFFFFFFFF  # an int is the lower half of its eight bytes
_FLAGS = 0x0100 | 0x0400  # aligned, writeable; whether it is dense follows from the strides
_FIXED = 3  # of a look: axes, dtype, flags; then lengths and strides


@kept_on_disk
def _read(objects: int, head: int, kind: int, looks: Any, which: Any, places: Any) -> int:
    """Write where the data of arrays begin, and return how many are as they should be before the first that isn't."""
    like = np.empty(0, np.int64)
    items = array_at(array_at(objects + head + 8, 1, like)[0], len(which), like)
    for i in range(len(which)):
        found, look = array_at(items[i] + head - 8, 8, like), looks[which[i]]
        if found[0] != kind:  # nothing else is known of it
            return i
        axes = found[2] & _HALF
        if axes != look[0] or found[6] != look[1] or found[7] & _FLAGS != look[2]:
            return i
        lengths, strides = array_at(found[3], axes, like), array_at(found[4], axes, like)
        for k in range(axes):
            if lengths[k] != look[_FIXED + k] or strides[k] != look[_FIXED + axes + k]:
                return i
        places[i] = found[1]
    return len(which)


@kept_on_disk
def _begin(objects: int, head: int, places: Any) -> None:
    like = np.empty(0, np.int64)
    items = array_at(array_at(objects + head + 8, 1, like)[0], len(places), like)
    for i in range(len(places)):
        places[i] = array_at(items[i] + head, 1, like)[0]


def addresses(arrays: Sequence[Any]) -> Any:
    """Return where the data of arrays of NumPy begin."""
    listed = _listed(arrays)
    places = np.empty(len(listed), np.int64)
    at_first(_begin, id(listed), _HEAD, places)
    return places


def _listed(arrays: Sequence[Any]) -> list[Any]:
    return arrays if type(arrays) is list else list(arrays)


class HeaderLooks(Looks):
    """`Looks` of arrays of NumPy, compared in compiled code."""

    def __init__(self, arrays: Sequence[Any]) -> None:
        super().__init__(arrays, addresses)
        most = max((len(look.shape) for look in self.known), default=0)
        self._table = np.zeros((len(self.known), _FIXED + 2 * most), np.int64)
        for row, look in zip(self._table, self.known, strict=True):
            flags = 0x0100 * look.aligned | 0x0400 * look.writeable
            numbers = len(look.shape), id(look.dtype), flags, *look.shape, *look.strides
            row[: len(numbers)] = numbers

    def places(self, arrays: Sequence[Any]) -> Any:
        """See `Looks.places`."""
        listed, found = _listed(arrays), np.empty(len(arrays), np.int64)
        if len(listed) != len(self.which):
            return None
        count = at_first(_read, id(listed), _HEAD, id(np.ndarray), self._table, self.which, found)
        return found if count == len(found) else None


def problem() -> str | None:
    """Return why arrays can't be read here: they may not be what this module takes them for."""
    if sys.implementation.name != "cpython" or sys.maxsize < 1 << 32:
        return f"it reads the arrays of CPython of 64 bits, not of {sys.implementation.name}"
    x, y = np.empty((3, 5), np.float32)[:, ::2], np.zeros(2)
    places = [a.__array_interface__["data"][0] for a in (x, y)]
    y.flags.writeable = False
    others = [x, y[None]], [x, y.view(np.int64)], [x, x], [x.T, y], [x, y.copy()]
    looks = HeaderLooks([x, y])
    if addresses([x, y]).tolist() == places and looks.places([x, y]) is not None:
        if looks.places([x, y]).tolist() == places and all(looks.places(pair) is None for pair in others):
            return None
    return "the arrays of this NumPy are built differently"
