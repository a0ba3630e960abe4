"""Memory that a step writes to: it must be writable, and shared with nothing else."""

from __future__ import annotations

import copy
from array import array as numbers
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import numpy as np
from array_api_compat import is_cupy_array, is_jax_array, is_numpy_array, is_writeable_array

from lars_array._arrays import array_at, is_on_accelerator
from lars_array._messages import shown

__all__ = ["MemoryRanges", "check_writable"]

MOST_STRIDES = 8  # that are tried to tell arrays apart
MOST_WORK: Any = 1 << 20  # of NumPy's exact comparison


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
        raise TypeError(f"parameter {shown(name)} must be a plain array; got a masked one")
    if getattr(p, "requires_grad", False):
        raise TypeError(f"parameter {shown(name)} must not require gradients; use lars_torch.LARS, or detach()")
    if is_numpy_array(p) and not p.flags.writeable:
        raise ValueError(f"parameter {shown(name)} must be writable; got a read-only array")
    if not is_writeable_array(p):
        way = "use lars_jax, or lars_array.init" if is_jax_array(p) else "use lars_array.init"
        kind = f"{type(p).__name__} is not, {way} and lars_array.update"
        raise TypeError(f"parameter {shown(name)} must be writable; {kind}")
    view = _host_view(p)
    if view is not None and _overlaps_itself(view):
        strides = f"{shown(view.strides)} for shape {shown(view.shape)}"
        raise ValueError(f"parameter {shown(name)} must not overlap itself; got strides {strides}")


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
        self._names, self._count = names, len(params)
        self._arrays: Callable[[], Any] = lambda: (params, buffers, masters)
        self._unseen: dict[int, int] = {}
        bounds = numbers("q")  # not objects: a model may have many thousand arrays
        for i, array in enumerate(chain(params, buffers, masters)):
            view = None if array is None else _host_view(array)
            if view is not None and view.size:
                bounds.extend((*_bounds(view), i))
            elif array is not None:  # an empty array has no range either
                if id(array) in self._unseen:
                    raise ValueError(self._given_twice(i, self._unseen[id(array)]))
                self._unseen[id(array)] = i
        self._sort(np.array(bounds, np.int64).reshape(-1, 3))

    def moved(self, arrays: Callable[[], Any], starts: Any, ends: Any) -> MemoryRanges:
        """Return these ranges elsewhere: of all parameters, then buffers, then masters; `arrays` is for messages."""
        ranges = copy.copy(self)
        ranges._arrays = arrays
        ranges._sort(np.stack([starts[self._index], ends[self._index], self._index], axis=1))
        return ranges

    def _sort(self, bounds: Any) -> None:
        """Keep ranges, of shape (ranges, 3): first byte, the one after the last, and number; raise if they overlap."""
        bounds = bounds[np.argsort(bounds[:, 0], kind="stable")]
        self._starts, self._ends, self._index = bounds[:, 0].copy(), bounds[:, 1].copy(), bounds[:, 2].astype(np.int32)
        self._reach = np.concatenate([[0], np.maximum.accumulate(self._ends)])
        if (self._starts < self._reach[:-1]).any():
            views, index = self._views()
            found = _overlap(views)
            if found is not None:
                other, i = (index[k] for k in found)
                if self._array(i) is self._array(other):
                    raise ValueError(self._given_twice(i, other))
                raise ValueError(f"parameters must not overlap in memory; {self._label(i)} and {self._label(other)} do")

    def _views(self) -> tuple[list[Any], list[int]]:
        """Return the arrays that have ranges, and their numbers."""
        arrays, index = list(chain(*self._arrays())), self._index.tolist()
        return [_host_view(arrays[i]) for i in index], index

    def find(self, arrays: Sequence[Any]) -> tuple[int, str] | None:
        """Return the place of one of other arrays that shares memory with these, and what it shares; else None."""
        for i, array in enumerate(arrays):
            if id(array) in self._unseen:
                return i, self._label(self._unseen[id(array)])
        views = {i: view for i, x in enumerate(arrays) if (view := _host_view(x)) is not None and view.size}
        own, index = self._views()
        found = _overlap(own, list(views.values()))
        return None if found is None else (list(views)[found[1] - len(index)], self._label(index[found[0]]))

    def are_clear(self, starts: Any, ends: Any) -> bool:
        """Return whether no array lies in any of these address ranges, integer arrays; False if that is not certain."""
        return bool((self._reach[self._starts.searchsorted(ends)] <= starts).all())

    def _array(self, i: int) -> Any:
        return list(chain(*self._arrays()))[i]

    def _label(self, i: int) -> str:
        kind = ("parameter", "the momentum buffer of", "the master copy of")[i // self._count]
        return f"{kind} {shown(self._names[i % self._count])}"

    def _given_twice(self, i: int, other: int) -> str:
        return f"every parameter must be given once; {self._label(i)} and {self._label(other)} are the same array"


def _overlap(views: list[Any], others: list[Any] | None = None) -> tuple[int, int] | None:
    """Return two places in ``views + others`` whose arrays share memory, the second in `others` if there are any.

    Arrays whose bounds overlap may lie between each other, as the columns of a table do. Two of them share no memory if
    their addresses have disjoint remainders for some stride; only what no stride separates is compared exactly, which
    may take time that is exponential in the number of axes.
    """
    every = [*views, *(others or ())]
    bounds = np.array([_bounds(view) for view in every], np.int64).reshape(-1, 2)
    of_others = np.arange(len(every)) >= len(views)
    groups = _touching(bounds[:, 0], bounds[:, 1], np.arange(len(every)))
    axes = Counter(abs(x) for k in chain(*groups) for x, n in zip(every[k].strides, every[k].shape) if n > 1 and x)
    for stride, _ in axes.most_common(MOST_STRIDES):
        remaining, groups = groups, []
        for index in remaining:
            lengths = np.array([_length_in(every[k], stride) for k in index])
            starts = (bounds[index, 0] - bounds[index, 0].min()) % stride
            wraps = starts + lengths > stride
            starts[wraps] = 0
            groups += _touching(starts, np.where(wraps, stride, starts + lengths), index)
    for index in groups:
        ordered = index[np.argsort(bounds[index, 0], kind="stable")].tolist()
        for place, k in enumerate(ordered):
            for other in reversed(ordered[:place]):
                if others is not None and of_others[k] == of_others[other]:
                    continue
                if bounds[other, 1] > bounds[k, 0] and _share(every[k], every[other]):
                    return (min(k, other), max(k, other)) if others is not None else (other, k)
    return None


def _touching(starts: Any, ends: Any, index: Any) -> list[Any]:
    """Return groups of the numbers in `index` whose intervals overlap, those of several only."""
    order = np.argsort(starts, kind="stable")
    reach = np.maximum.accumulate(ends[order])
    cuts = np.flatnonzero(starts[order][1:] >= reach[:-1]) + 1
    return [group for group in np.split(index[order], cuts) if len(group) > 1]


def _length_in(view: Any, stride: int) -> int:
    """Return how many bytes an array spans if steps by multiples of `stride` count as none."""
    reach = [abs(x) * (n - 1) for x, n in zip(view.strides, view.shape) if x % stride]
    return int(view.itemsize + sum(reach))


def _share(view: Any, other: Any) -> bool:
    """Return whether two arrays share memory; true if that takes too long to find out."""
    try:
        return np.shares_memory(view, other, max_work=MOST_WORK)
    except np.exceptions.TooHardError:
        return True


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
