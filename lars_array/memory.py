"""Who shares memory with whom: what is written in place may be nobody else's."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
from array_api_compat import is_cupy_array, is_numpy_array, is_writeable_array

from lars_array.arrays import is_distant
from lars_array.buffers import Rows

__all__ = ["Spans", "bounds", "check_writable"]


def check_writable(name: str, p: Any) -> None:
    """Refuse a parameter that can't be updated in place.

    Parameters
    ----------
    name : str
        The parameter's name, for messages.
    p : array
        The parameter.

    Raises
    ------
    TypeError
        If its kind of array can't be written to, or would take it amiss.
    ValueError
        If it is read-only, or several of its elements lie in one place.
    """
    if isinstance(p, np.ma.MaskedArray):
        raise TypeError(f"parameter {name!r} must be a plain array; got a masked one")
    if getattr(p, "requires_grad", False):
        raise TypeError(f"parameter {name!r} must not require gradients of its own; give its detach()")
    if is_numpy_array(p) and not p.flags.writeable:
        raise ValueError(f"parameter {name!r} must be writable; got a read-only array")
    if not is_writeable_array(p):
        kind = type(p).__name__
        raise TypeError(
            f"parameter {name!r} must be writable; {kind} is not, use lars_array.init and lars_array.update"
        )
    view = _host_view(p)
    if view is not None and _overlaps_itself(view):
        strides = f"{view.strides!r} for shape {view.shape!r}"
        raise ValueError(f"parameter {name!r} must not overlap itself; got strides {strides}")


def _overlaps_itself(p: Any) -> bool:
    """Return whether elements may share bytes: a stride does not clear what the smaller ones span."""
    spanned = p.itemsize
    for stride, length in sorted((abs(stride), length) for stride, length in zip(p.strides, p.shape, strict=True)):
        if length > 1:
            if stride < spanned:
                return bool(p.size)
            spanned += stride * (length - 1)
    return False


class Spans:
    """The stretches of memory that parameters and what is kept for them lie in, to be asked who is there.

    Arrays whose addresses aren't known, those of torch on a GPU say, are told apart by identity only.

    Parameters
    ----------
    names : sequence of str
        The names of the parameters.
    params : sequence of arrays
        The parameters. No two of them overlap.
    buffers : Rows, optional
        Their momentum buffers.
    masters : Rows, optional
        Their master copies.

    Raises
    ------
    ValueError
        If two arrays do overlap.
    """

    KINDS = "parameter", "the momentum buffer of", "the master copy of"

    def __init__(
        self, names: Sequence[str], params: Sequence[Any], buffers: Rows | None = None, masters: Rows | None = None
    ) -> None:
        self._names, self._params = names, params
        kept = (self.KINDS[1], buffers or Rows(0)), (self.KINDS[2], masters or Rows(0))
        self._kept = [(what, rows, *stretch) for what, rows in kept for stretch in rows.stretches()]
        # Tables, not objects: a model may have many thousand arrays, and this is asked at every step.
        table = np.zeros((len(params) + len(self._kept), 3), np.int64)
        unseen: dict[int, int] = {}
        for i, array in enumerate(chain(params, (array for *_, array in self._kept))):
            view = _host_view(array)
            if view is not None and view.size:
                table[i] = (*_bounds(view), i)
            else:  # neither is there anything to see of an empty array
                if id(array) in unseen:
                    raise ValueError(self._given_twice(i, unseen[id(array)]))
                unseen[id(array)] = i
        self._unseen = unseen
        table = table[table[:, 1] > 0]
        table = table[np.argsort(table[:, 0], kind="stable")]
        self._starts, self._index = table[:, 0].copy(), table[:, 2].astype(np.int32)
        self._reach = np.concatenate([[0], np.maximum.accumulate(table[:, 1])])
        for k in np.flatnonzero(self._starts < self._reach[:-1]).tolist():
            index = int(self._index[k])
            other = self._find(_host_view(self._array(index)), int(self._starts[k]), k)
            if other is None:
                continue
            if self._array(index) is self._array(other):
                raise ValueError(self._given_twice(index, other))
            raise ValueError(f"parameters must not overlap in memory; {self._label(index)} and {self._label(other)} do")

    def owner(self, array: Any) -> str | None:
        """Return the name of an array that shares memory with `array`, or None."""
        if id(array) in self._unseen:
            return self._label(self._unseen[id(array)])
        view = _host_view(array)
        if view is None or not view.size:
            return None
        low, high = _bounds(view)
        index = self._find(view, low, int(np.searchsorted(self._starts, high)))
        return None if index is None else self._label(index, high - 1)

    def are_clear(self, starts: Any, ends: Any) -> bool:
        """Return whether it is certain that nobody is in any of these stretches of addresses, integer arrays."""
        return bool((self._reach[self._starts.searchsorted(ends)] <= starts).all())

    def _find(self, view: Any, low: int, before: int) -> int | None:
        """Look through the spans that begin before the given one and reach beyond `low`, where `view` begins."""
        for k in range(before - 1, -1, -1):
            if self._reach[k + 1] <= low:
                return None
            index = int(self._index[k])
            mine = _host_view(self._array(index))
            if _bounds(mine)[1] > low and np.shares_memory(mine, view):
                return index
        return None

    def _array(self, i: int) -> Any:
        count = len(self._params)
        return self._params[i] if i < count else self._kept[i - count][-1]

    def _given_twice(self, i: int, other: int) -> str:
        return f"every parameter must be given once; {self._label(i)} and {self._label(other)} are the same array"

    def _label(self, i: int, address: int = 0) -> str:
        count = len(self._params)
        if i < count:
            return f"{self.KINDS[0]} {self._names[i]!r}"
        what, rows, row, array = self._kept[i - count]
        return f"{what} {self._names[rows.row_at(array, address) if row is None else row]!r}"


class _Shadow:
    """An array of CuPy in NumPy's terms. NumPy does arithmetic on its addresses, which are no memory of the host."""

    def __init__(self, array: Any) -> None:
        self.__array_interface__ = {
            "data": (array.data.ptr, False),
            "shape": array.shape,
            "strides": array.strides,
            "typestr": f"|V{array.itemsize}",
            "version": 3,
        }


def bounds(arrays: Sequence[Any]) -> Any:
    """Return where arrays begin and end, of shape (arrays, 2), or None where that can't be seen of all."""
    views = [_host_view(array) for array in arrays]
    return None if any(view is None for view in views) else np.array(list(map(_bounds, views)), np.int64)


def _bounds(view: Any) -> tuple[int, int]:
    if view.flags.c_contiguous:
        start = view.__array_interface__["data"][0]
        return start, start + view.nbytes
    return np.lib.array_utils.byte_bounds(view)


def _host_view(array: Any) -> Any:
    """Return a NumPy view of `array`, or None where there is none; it may only be asked where it lies."""
    if isinstance(array, np.ndarray):
        return array
    if is_cupy_array(array):
        return np.asarray(_Shadow(array))
    if is_distant(array):  # and to ask for an export might be to wait
        return None
    try:
        return np.from_dlpack(array)
    except Exception:  # what can't be exported, on whatever grounds, can't be compared
        return None
