"""What is a layer: usually a parameter, but several can be one together, and a stacked one can be many.

Sums and coefficients have a row for each slice of a parameter along its leading `layer_axes`, which of most parameters
is the whole. Rows that are one layer by `layer_of` are given the sums of all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import product
from math import prod
from typing import Any, NamedTuple

from lars_array.arrays import asarray

__all__ = ["LayerOf", "Stack", "joined_rows", "labels_of", "row_labels", "stack_of", "stacks_of", "together"]

LayerOf = Mapping[str, Any] | Callable[[str], Any] | None


class Stack(NamedTuple):
    """A parameter as it was given, the leading axes along which its slices are layers, and its rows.

    Most are stacks of one: `lead` is () then.
    """

    name: str
    param: Any
    lead: tuple[int, ...]
    start: int
    rows: int

    def names(self) -> list[str]:
        """Return the names of its rows, "w[0]" and so on."""
        if not self.lead:
            return [self.name]
        return [f"{self.name}[{', '.join(map(str, place))}]" for place in product(*map(range, self.lead))]

    def slices(self, array: Any) -> list[Any]:
        """Return an array of its shape in slices, one a row: views, where the library has views. None is None."""
        if array is None or not self.lead:
            return [array] * self.rows
        return [array[(*place, ...)] for place in product(*map(range, self.lead))]

    def coefficients(self, C: Any, *, xp: Any) -> Any:
        """Return its own from those of all rows, as `core.apply` takes them."""
        if not self.lead:
            return C[self.start, :]
        return xp.reshape(C[self.start : self.start + self.rows, :], (*self.lead, 6))


def stack_of(name: str, param: Any, layer_axes: int, start: int) -> Stack:
    """Return a parameter as a stack, the first row of which is `start`.

    Raises
    ------
    ValueError
        If it has fewer axes than `layer_axes`.
    """
    if layer_axes > param.ndim:
        raise ValueError(f"layer_axes must be at most the {param.ndim} axes of {name!r}; got {layer_axes!r}")
    lead = tuple(int(length) for length in param.shape[:layer_axes])
    if not prod(lead):
        lead = ()  # an empty parameter is one layer, of nothing
    return Stack(name, param, lead, start, prod(lead))


def stacks_of(names: Sequence[str], params: Sequence[Any], layer_axes: Sequence[int]) -> list[Stack]:
    """Return parameters as stacks, the rows of one after those of the other; see `stack_of`."""
    stacks: list[Stack] = []
    start = 0
    for name, p, axes in zip(names, params, layer_axes, strict=True):
        stacks.append(stack_of(name, p, axes, start))
        start += stacks[-1].rows
    return stacks


def labels_of(layer_of: LayerOf, names: Sequence[str]) -> list[Hashable]:
    """Return the layer that each parameter is a part of, None for one that is a layer by itself.

    Raises
    ------
    TypeError
        If `layer_of` is neither a mapping nor a function, or a layer's label can't be compared.
    ValueError
        If it knows a name that no parameter has.
    """
    if layer_of is None:
        return [None] * len(names)
    if isinstance(layer_of, Mapping):
        unknown = layer_of.keys() - set(names)
        if unknown:
            raise ValueError(f"layer_of must hold names of parameters; got {min(unknown, key=str)!r}")
        labels = [layer_of.get(name) for name in names]
    elif callable(layer_of):
        labels = [layer_of(name) for name in names]
    else:
        raise TypeError(f"layer_of must be a mapping or a function from names to layers; got {layer_of!r}")
    for label in labels:
        if not isinstance(label, Hashable):
            raise TypeError(f"layer_of must give names of layers, or None; got {label!r}")
    return labels


def row_labels(labels: Sequence[Hashable], stacks: Sequence[Stack]) -> list[Hashable]:
    """Return which layer each row is a part of: of stacks of one label, the slices of one place are a layer.

    Raises
    ------
    ValueError
        If stacks of one label are not of one length.
    """
    known: dict[Hashable, Stack] = {}
    rows: list[Hashable] = []
    for label, stack in zip(labels, stacks, strict=True):
        other = known.setdefault(label, stack)
        if label is not None and other.lead != stack.lead:
            leads = f"{other.name!r} has {other.lead!r} and {stack.name!r} has {stack.lead!r}"
            raise ValueError(f"what is one layer must be stacked alike; in {label!r} {leads}")
        rows += [None if label is None else (label, row) for row in range(stack.rows)]
    return rows


def joined_rows(labels: Sequence[Hashable]) -> list[list[int]]:
    """Return the rows of each layer that has several, from the `row_labels`."""
    rows: dict[Hashable, list[int]] = {}
    for row, label in enumerate(labels):
        if label is not None:
            rows.setdefault(label, []).append(row)
    return [found for found in rows.values() if len(found) > 1]


def together(S: Any, joined: Sequence[Sequence[int]], *, xp: Any) -> Any:
    """Return the sums with the sum over the rows of a layer in each of them.

    Parameters
    ----------
    S : array of shape (rows, 3)
        What `core.sums` returned.
    joined : sequence of sequences of int
        The rows of each layer that has several.
    xp : Array API namespace
        Namespace of the arrays.

    Returns
    -------
    array of shape (rows, 3)
        S itself where there is no such layer.
    """
    if not joined:
        return S
    place = list(range(S.shape[0]))
    sums = []
    for k, rows in enumerate(joined, S.shape[0]):
        sums.append(xp.sum(xp.take(S, asarray(list(rows), like=S, xp=xp), axis=0), axis=0, keepdims=True))
        for row in rows:
            place[row] = k
    return xp.take(xp.concat([S, *sums], axis=0), asarray(place, like=S, xp=xp), axis=0)
