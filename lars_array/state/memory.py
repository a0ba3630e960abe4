"""Memory that a step writes to: it must be writable, and shared with nothing else."""

from __future__ import annotations

from array import array as numbers
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
from array_api_compat import is_cupy_array, is_numpy_array, is_writeable_array

from lars_array._arrays import array_at, is_on_accelerator

__all__ = ["MemoryRanges", "check_writable"]


def check_writable(name: str, p: Any) -> None:
    """Raise unless a parameter can be updated in place.

    Parameters
    ----------
    name : str
        The parameter's name, for messages.
    p : array
        The parameter.

    Raises
    ------
    TypeError
        If arrays of this library are immutable, or must not be modified behind their owner's back.
    ValueError
        If it is read-only, or several of its elements share memory.
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
    """Return whether elements may share bytes: whether a stride is smaller than the span of the smaller ones."""
    spanned = p.itemsize
    for stride, length in sorted((abs(stride), length) for stride, length in zip(p.strides, p.shape, strict=True)):
        if length > 1:
            if stride < spanned:
                return bool(p.size)
            spanned += stride * (length - 1)
    return False


class MemoryRanges:
    """The address ranges of parameters, momentum buffers and master copies.

    Arrays whose addresses are unknown, such as torch tensors on a GPU, are compared by identity only.

    Parameters
    ----------
    names : sequence of str
        The names of the parameters.
    params, buffers, masters : sequences of arrays
        One entry a parameter; None where there is none.

    Raises
    ------
    ValueError
        If two of the arrays overlap.
    """

    def __init__(
        self, names: Sequence[str], params: Sequence[Any], buffers: Sequence[Any] = (), masters: Sequence[Any] = ()
    ) -> None:
        self._names, self._arrays = names, (params, buffers, masters)
        # A table, not objects: a model may have many thousand arrays, and every step searches it.
        table = numbers("q")
        unseen: dict[int, int] = {}
        for i, array in enumerate(chain(params, buffers, masters)):
            view = None if array is None else _host_view(array)
            if view is not None and view.size:
                table.extend((*_bounds(view), i))
            elif array is not None:  # an empty array has no range either
                if id(array) in unseen:
                    raise ValueError(self._given_twice(i, unseen[id(array)]))
                unseen[id(array)] = i
        self._unseen = unseen
        ranges = np.array(table, np.int64).reshape(-1, 3)
        ranges = ranges[np.argsort(ranges[:, 0], kind="stable")]
        self._starts, self._index = ranges[:, 0].copy(), ranges[:, 2].astype(np.int32)
        self._reach = np.concatenate([[0], np.maximum.accumulate(ranges[:, 1])])
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
        return None if index is None else self._label(index)

    def are_clear(self, starts: Any, ends: Any) -> bool:
        """Return whether no array lies in any of these address ranges, integer arrays; False if that is not certain."""
        return bool((self._reach[self._starts.searchsorted(ends)] <= starts).all())

    def _find(self, view: Any, low: int, before: int) -> int | None:
        """Search the ranges that begin before the given one and reach beyond `low`, the start of `view`."""
        for k in range(before - 1, -1, -1):
            if self._reach[k + 1] <= low:
                return None
            index = int(self._index[k])
            mine = _host_view(self._array(index))
            if _bounds(mine)[1] > low and np.shares_memory(mine, view):
                return index
        return None

    def _array(self, i: int) -> Any:
        params, buffers, masters = self._arrays
        for arrays in (params, buffers):
            if i < len(arrays):
                return arrays[i]
            i -= len(arrays)
        return masters[i]

    def _label(self, i: int) -> str:
        for arrays, kind in zip(self._arrays, ("parameter", "the momentum buffer of", "the master copy of")):
            if i < len(arrays):
                return f"{kind} {self._names[i]!r}"
            i -= len(arrays)
        raise IndexError(i)

    def _given_twice(self, i: int, other: int) -> str:
        return f"every parameter must be given once; {self._label(i)} and {self._label(other)} are the same array"


def _bounds(view: Any) -> tuple[int, int]:
    if view.flags.c_contiguous:
        start = view.__array_interface__["data"][0]
        return start, start + view.nbytes
    return np.lib.array_utils.byte_bounds(view)


def _host_view(array: Any) -> Any:
    """Return a NumPy view of `array` to compare addresses with, or None where there is none."""
    if isinstance(array, np.ndarray):
        return array
    if is_cupy_array(array):
        # NumPy compares addresses, and never reads the memory, which is not the host's.
        return array_at(array.data.ptr, array.shape, f"V{array.itemsize}", array.strides)
    if is_on_accelerator(array):  # exporting it could synchronize the device
        return None
    try:
        return np.from_dlpack(array)
    except Exception:  # arrays that can't be exported can't be compared
        return None
