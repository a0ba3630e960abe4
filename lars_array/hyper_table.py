"""The hyper-parameters of all groups as one array on a device, where what changes is written number by number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

from lars_array.arrays import asarray
from lars_array.dtypes import accumulation_dtype
from lars_array.hyper import BOOLEANS, GIVEN, Hyper, given

__all__ = ["HyperTable"]


class HyperTable:
    """Rows of numbers, one a group, in the order of `lars_array.hyper.GIVEN`; booleans are 0 and 1.

    A number that has changed is written by the device itself, and so is one that lies there already: the host neither
    waits nor sends memory of its own, which a CUDA graph would read again when it is replayed.

    Parameters
    ----------
    like : array
        An array on the device.
    xp : Array API namespace
        Its namespace.

    Attributes
    ----------
    array : array of shape (groups, fields)
        In the type that sums are accumulated in. It stays the same array, None before the first `refresh`.
    """

    def __init__(self, like: Any, xp: Any) -> None:
        self.like, self.xp = like, xp
        self.array: Any = None
        self._known: list[list[Any]] = []
        self._in_graphs: set[tuple[int, int]] = set()  # what replays write: nobody here knows what stands there

    def refresh(self, groups: Sequence[Mapping[str, Any]], *, captured: bool = False) -> None:
        """Have the table hold these hyper-parameters, complete and checked, one mapping a group.

        What is `captured` is not written now, but by each replay of a graph.
        """
        rows = [given(group) for group in groups]
        if self.array is None:
            numbers = [[float(value) if isinstance(value, Real) else 0.0 for value in row] for row in rows]
            self.array = asarray(numbers, accumulation_dtype(self.xp), like=self.like, xp=self.xp)
            self._known = numbers
        for row, (values, known) in enumerate(zip(rows, self._known, strict=True)):
            for column, value in enumerate(values):
                if isinstance(value, Real):
                    value = float(value)
                    if value == known[column] and (row, column) not in self._in_graphs:
                        continue
                if captured:
                    self._in_graphs.add((row, column))
                # A slice, not an element: torch fills the one and brings the other from the host.
                self.array[row : row + 1, column : column + 1] = value
                known[column] = value if isinstance(value, float) else None

    def vectors(self, group_of: Any, first: Any, previous_lr: Any) -> Hyper:
        """Spread the hyper-parameters over layers, as `lars_array.hyper.vectors` does.

        Parameters
        ----------
        group_of : integer array of shape (layers,)
            The index of each layer's group; it lies on the device, and so do the next two.
        first, previous_lr : arrays of shape (layers,)
            As in `Hyper`.

        Returns
        -------
        Hyper
            Arrays of shape (layers,).
        """
        spread = self.xp.take(self.array, group_of, axis=0)
        columns = {name: spread[:, k] for k, name in enumerate(GIVEN)}
        columns |= {name: columns[name] != 0 for name in BOOLEANS}
        return Hyper(**columns, first=first, previous_lr=previous_lr)
