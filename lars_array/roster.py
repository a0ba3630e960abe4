"""The parameters of an optimizer, and what is kept for each of them from step to step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from array_api_compat import array_namespace, device

from lars_array.arrays import check_buffer, check_master
from lars_array.buffers import Rows, new_buffers
from lars_array.memory import Spans, check_writable
from lars_array.parameters import Group, all_names
from lars_array.rows import LayerOf, Stack, labels_of, row_labels, stack_of
from lars_array.stacks import sliced_gradients, whole

__all__ = ["KEPT", "Kept", "Roster"]

# What may be kept for a parameter, and what it must be.
KEPT: dict[str, Callable[[str, Any, Any], None]] = {"momentum_buffer": check_buffer, "master": check_master}


class Kept:
    """An array for each parameter that has one, a momentum buffer or a master.

    Attributes
    ----------
    rows : Rows
        One a row, or None. Those of slices of one parameter are views of one array.
    wholes : dict of int to array
        That array, by position of the parameter.
    """

    def __init__(self) -> None:
        self.rows = Rows(0)
        self.wholes: dict[int, Any] = {}

    def extended(self, count: int) -> Kept:
        """Return a copy, with `count` rows more."""
        twin = Kept()
        twin.rows, twin.wholes = self.rows.extended(count), dict(self.wholes)
        return twin

    def put(self, i: int, stack: Stack, array: Any) -> None:
        """Keep `array`, or nothing, for the parameter at position `i`."""
        self.rows.put(range(stack.start, stack.start + stack.rows), stack.slices(array))
        self.wholes.pop(i, None)
        if stack.lead and array is not None:
            self.wholes[i] = array

    def bring_together(self, stacks: Mapping[int, Stack]) -> None:
        """Put slices that lie anywhere, as new ones do, into one array for each of the stacked parameters."""
        for i, stack in stacks.items():
            if self.rows[stack.start] is None:
                self.wholes.pop(i, None)
            elif i not in self.wholes:
                self.put(i, stack, whole(stack, [self.rows[stack.start + k] for k in range(stack.rows)]))


class Roster:
    """Parameters in the order of their groups. Steps work on their *rows*: parameters, or slices of stacked ones.

    Parameters
    ----------
    layer_of : mapping, callable or None
        See `lars_array.LARS`.

    Attributes
    ----------
    given, arrays : sequences
        The names of the parameters, and the parameters.
    stacks : dict of int to Stack
        Those whose slices are rows, by position.
    starts : sequence of int
        The first row of each parameter.
    names, params, labels : sequences
        Of each row, see `lars_array.layers.Layers`. Those of the parameters themselves where none is stacked; no labels
        where no layer has several rows.
    group_of : int32 array of shape (rows,)
        The group of each.
    buffers, masters : Kept
        What is kept.
    previous_lr : ndarray of shape (rows,)
        The learning rate of a row's last step, 0 before the first.
    """

    def __init__(self, layer_of: LayerOf) -> None:
        self.layer_of = layer_of
        self.given: Sequence[str] = []
        self.arrays: list[Any] = []
        self.stacks: dict[int, Stack] = {}
        self.starts: Sequence[int] = range(0)
        self.names: Sequence[str] = []
        self.params: list[Any] = []
        self.group_of = np.zeros(0, np.int32)
        self.labels: Sequence[Hashable] = ()
        self.buffers, self.masters = Kept(), Kept()
        self.previous_lr = np.zeros(0)

    def joined_by(self, groups: Sequence[Group], layer_axes: Sequence[int], first: int) -> Roster:
        """Return this roster with the parameters of further groups.

        Parameters
        ----------
        groups : sequence of Group
            The groups.
        layer_axes : sequence of int
            How many leading axes tell their layers apart, one a group.
        first : int
            The number of the first of them.

        Returns
        -------
        Roster
            A new one, which keeps nothing yet; this one stays what it is.

        Raises
        ------
        ValueError, TypeError
            For names that are taken, and parameters that can't be written to, overlap, or can't be one layer.
        """
        longer = copy.copy(self)
        longer.given = all_names([*filter(len, [self.given]), *(group.names for group in groups)])
        longer.arrays = [*self.arrays, *(p for group in groups for p in group.arrays)]
        longer.stacks = dict(self.stacks)
        counts = [len(group.arrays) for group in groups]
        count, ends = len(longer.arrays), [len(self.names)]
        if any(layer_axes) or self.stacks:
            starts = list(self.starts)
            for group, axes in zip(groups, layer_axes, strict=True):
                end = ends[-1]
                for name, p in zip(group.names, group.arrays, strict=True):
                    stack = stack_of(name, p, axes, end)
                    if stack.lead:
                        longer.stacks[len(starts)] = stack
                    starts.append(end)
                    end += stack.rows
                ends.append(end)
            counts = np.diff(ends).tolist()
        numbers = range(first, first + len(groups))
        longer.group_of = np.concatenate([self.group_of, np.repeat(np.array(numbers, np.int32), counts)])
        longer.starts = starts if longer.stacks else range(count)
        longer.names, longer.params = longer.given, longer.arrays
        if longer.stacks:
            longer.names = [name for i in range(count) for name in longer.stack(i).names()]
            longer.params = [row for i, p in enumerate(longer.arrays) for row in longer.stack(i).slices(p)]
        if self.layer_of is not None:
            labels = labels_of(self.layer_of, longer.given)
            longer.labels = row_labels(labels, [longer.stack(i) for i in range(count)])
        for name, p in zip(longer.names, longer.params, strict=True):
            check_writable(name, p)
            _check_same_place(p, longer.params[0], name, longer.names[0])
        Spans(longer.names, longer.params)
        return longer

    def inherit(self, shorter: Roster) -> None:
        """Keep what `shorter` does, which has a part of the parameters, the first of them."""
        added = len(self.names) - len(shorter.names)
        self.buffers, self.masters = shorter.buffers.extended(added), shorter.masters.extended(added)
        self.previous_lr = np.concatenate([shorter.previous_lr, np.zeros(added)])

    def stack(self, i: int) -> Stack:
        """Return the parameter at position `i` with its rows, one where it is not stacked."""
        return self.stacks.get(i) or Stack(self.given[i], self.arrays[i], (), self.starts[i], 1)

    def rehome(self) -> None:
        """Make rows views of the parameters and of what is kept for them, which they are not after pickling."""
        self.stacks = {i: stack._replace(param=self.arrays[i]) for i, stack in self.stacks.items()}
        self.params = self.rows_of(self.arrays)
        for kept in (self.buffers, self.masters):
            for i, array in list(kept.wholes.items()):
                kept.put(i, self.stacks[i], array)

    def spans(self) -> Spans:
        """Return where all lies that is written to."""
        return Spans(self.names, self.params, self.buffers.rows, self.masters.rows)

    def gradients(self, grads: list[Any]) -> list[Any]:
        """Return the gradients of all rows from those of the parameters."""
        if not self.stacks:
            return grads
        return sliced_gradients([self.stack(i) for i in range(len(grads))], grads, self.params)

    def rows_of(self, arrays: list[Any]) -> list[Any]:
        """Return arrays of the parameters' shapes, or None, by rows."""
        return [row for i, x in enumerate(arrays) for row in self.stack(i).slices(x)] if self.stacks else arrays

    def move(self, index: Sequence[int], rows: Sequence[Any], arrays: Sequence[Any]) -> None:
        """Know that the rows at `index` are other arrays now, and the parameters those in `arrays` that aren't None."""
        if len(index) == len(self.params):
            self.params[:] = rows
        else:
            for i, row in zip(index, rows, strict=True):
                self.params[i] = row
        if self.stacks:
            self.arrays = [p if x is None else x for p, x in zip(self.arrays, arrays, strict=True)]
            self.stacks = {i: stack._replace(param=self.arrays[i]) for i, stack in self.stacks.items()}

    def take_over(self, index: Sequence[int], buffers: Rows, masters: Rows) -> None:
        """Keep what a step of the rows at `index` has made."""
        for kept, rows in ((self.buffers, buffers), (self.masters, masters)):
            if isinstance(index, range):
                kept.rows = rows
            else:
                kept.rows.put(index, rows)

    def bring_together(self) -> None:
        """Have what is kept of the slices of a parameter lie in one array."""
        for kept in (self.buffers, self.masters):
            kept.bring_together(self.stacks)

    def views(self, buffers: Rows, previous_lr: Sequence[float] | None) -> dict[str, dict[str, Any]]:
        """Return what is kept by name of parameter, the arrays themselves; see `lars_array.LARS.state_views`.

        Parameters
        ----------
        buffers : Rows
            The momentum buffers of the rows, None for those that are not used yet.
        previous_lr : sequence of float, optional
            Those of the rows. None: they are left out.
        """
        state: dict[str, dict[str, Any]] = {}
        for i, (name, row) in enumerate(zip(self.given, self.starts, strict=True)):
            own = state[name] = {} if previous_lr is None else {"previous_lr": previous_lr[row]}
            for key, rows, wholes in (
                ("momentum_buffer", buffers, self.buffers.wholes),
                ("master", self.masters.rows, self.masters.wholes),
            ):
                array = rows[row]
                if array is not None:
                    own[key] = wholes.get(i, array)
        return state

    def attach(self, state: Mapping[str, Mapping[str, Any]], *, copied: bool = False) -> None:
        """Keep the arrays in `state` from now on, and nothing but them for the parameters that it names.

        Parameters
        ----------
        state : mapping
            By name, see `views`.
        copied : bool
            Whether new arrays are kept, which lie together, with the numbers of those in `state`.

        Raises
        ------
        ValueError, TypeError
            If a name is unknown, or an array does not fit; then nothing was changed.
        """
        place = {name: i for i, name in enumerate(self.given)}
        kept_by = {"momentum_buffer": self.buffers.extended(0), "master": self.masters.extended(0)}
        previous_lr = self.previous_lr.copy()
        for name, own in state.items():
            if name not in place:
                raise ValueError(f"state must be of parameters named {self.given!r}; got the name {name!r}")
            i = place[name]
            stack = self.stack(i)
            for key, check in KEPT.items():
                if own.get(key) is not None:
                    check(name, own[key], stack.param)
                    if not copied:
                        check_writable(f"{key} of {name}", own[key])
                kept_by[key].put(i, stack, None if copied else own.get(key))
            previous_lr[stack.start : stack.start + stack.rows] = float(own.get("previous_lr", 0.0))
        if copied:
            for key, kept in kept_by.items():
                self._put_copies(kept, {place[name]: own[key] for name, own in state.items() if key in own})
        Spans(self.names, self.params, *(kept.rows for kept in kept_by.values()))
        self.buffers, self.masters = kept_by["momentum_buffer"], kept_by["master"]
        self.previous_lr = previous_lr

    def _put_copies(self, kept: Kept, arrays: Mapping[int, Any]) -> None:
        """Keep copies of arrays for the parameters at their positions."""
        given = {i: array for i, array in arrays.items() if array is not None}
        made = new_buffers([self.arrays[i] for i in given], array_namespace(self.arrays[0]))
        for mine, array in zip(made, given.values(), strict=True):
            mine[...] = array
        if not self.stacks:
            kept.rows.put(list(given), made)
            return
        for i, mine in zip(given, made, strict=True):
            kept.put(i, self.stack(i), mine)


def _check_same_place(p: Any, other: Any, name: str, other_name: str) -> None:
    if type(p) is not type(other) and array_namespace(p) is not array_namespace(other):
        kinds = f"{type(p).__name__} and {type(other).__name__}"
        raise TypeError(f"parameters must be arrays of one library; {name!r} and {other_name!r} are {kinds}")
    if device(p) != device(other):
        places = f"{device(p)!r} and {device(other)!r}"
        raise ValueError(f"parameters must lie on one device; {name!r} and {other_name!r} lie on {places}")
