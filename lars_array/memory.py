"""Who shares memory with whom: what is written in place may be nobody else's."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from itertools import accumulate
from typing import Any

import numpy as np
from array_api_compat import is_numpy_array, is_writeable_array

__all__ = ["Spans", "check_writable"]


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
    """The stretches of memory that arrays lie in, to be asked who is there.

    Arrays whose memory can't be seen from here, those of a GPU say, are told apart by identity only.

    Parameters
    ----------
    arrays : mapping of str to array
        By what messages shall call them. No two of them overlap.

    Raises
    ------
    ValueError
        If two of them do overlap.
    """

    def __init__(self, arrays: Mapping[str, Any]) -> None:
        self._ids: dict[int, str] = {}
        spans = []
        for name, array in arrays.items():
            if id(array) in self._ids:
                twice = f"{name} and {self._ids[id(array)]}"
                raise ValueError(f"every parameter must be given once; {twice} are the same array")
            self._ids[id(array)] = name
            view = _host_view(array)
            if view is not None and view.size:
                spans.append((*_bounds(view), name, view))
        spans.sort(key=lambda span: span[0])
        self._lows = [span[0] for span in spans]
        self._reach = list(accumulate((span[1] for span in spans), max))
        self._spans = spans
        self._starts, self._ends = np.array(self._lows, np.int64), np.array([0, *self._reach], np.int64)
        for k, (low, _, name, view) in enumerate(spans):
            other = self._find(view, low, k)
            if other is not None:
                raise ValueError(f"parameters must not overlap in memory; {name} and {other} do")

    def owner(self, array: Any) -> str | None:
        """Return the name of an array that shares memory with `array`, or None."""
        if id(array) in self._ids:
            return self._ids[id(array)]
        view = _host_view(array)
        if view is None or not view.size:
            return None
        low, high = _bounds(view)
        return self._find(view, low, bisect_left(self._lows, high))

    def are_clear(self, starts: Any, ends: Any) -> bool:
        """Return whether it is certain that nobody is in any of these stretches of addresses, integer arrays."""
        return bool(np.all(self._ends[np.searchsorted(self._starts, ends)] <= starts))

    def _find(self, view: Any, low: int, before: int) -> str | None:
        """Look through the spans that begin before the given one and reach beyond `low`, where `view` begins."""
        for k in range(before - 1, -1, -1):
            if self._reach[k] <= low:
                return None
            if self._spans[k][1] > low and np.shares_memory(self._spans[k][3], view):
                return str(self._spans[k][2])
        return None


def _bounds(view: Any) -> tuple[int, int]:
    if view.flags.c_contiguous:
        start = view.__array_interface__["data"][0]
        return start, start + view.nbytes
    return np.lib.array_utils.byte_bounds(view)


def _host_view(array: Any) -> Any:
    """Return a NumPy view of `array`, or None where there is none."""
    if isinstance(array, np.ndarray):
        return array
    try:
        return np.from_dlpack(array)
    except Exception:  # what can't be exported, on whatever grounds, can't be compared
        return None
