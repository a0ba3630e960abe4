"""Definition of a layer: usually one parameter, but several can form one, and a stacked one can contain many.

Sums and coefficients have one *row* for each slice of a parameter along its leading `layer_axes`; most parameters have
no such axes and one row. Rows joined into one layer by `layer_of` share the sums over all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import product
from math import prod
from typing import Any, NamedTuple

from lars_array._messages import shown

__all__ = ["LayerOf", "LayerRows", "LayerSlices", "labels_of", "layer_names"]

LayerOf = Mapping[str, Any] | Callable[[str], Any] | None


class LayerSlices(NamedTuple):
    """The layers of one parameter: the lengths of the leading axes that index layers, or () for one layer."""

    lead: tuple[int, ...]
    start: int
    size: int

    def names(self, name: str, start: Sequence[int] = ()) -> list[str]:
        """Return the names of its rows, "w[0]" and so on; of a piece that starts elsewhere those in the whole."""
        if not self.lead:
            return [name]
        first = start or (0,) * len(self.lead)
        axes = [range(k, k + length) for k, length in zip(first, self.lead)]
        return [f"{name}[{', '.join(map(str, index))}]" for index in product(*axes)]

    def views(self, array: Any) -> list[Any]:
        """Return the slices of an array of the parameter's shape, one per row; None for None."""
        if array is None or not self.lead:
            return [array] * self.size
        return [array[(*index, ...)] for index in product(*map(range, self.lead))]

    def coefficients(self, C: Any, *, xp: Any) -> Any:
        """Return this parameter's part of the coefficients of all rows, in the shape for `core.apply`."""
        if not self.lead:
            return C[self.start, :]
        return xp.reshape(C[self.start : self.start + self.size, :], (*self.lead, 6))


class LayerRows(NamedTuple):
    """The rows of several parameters.

    Parameters
    ----------
    slices : sequence of LayerSlices
        One per parameter.
    owner : sequence of int
        The index of the parameter of each row.
    joined : sequence of sequences of int
        The rows of each layer that has several.
    """

    slices: Sequence[LayerSlices]
    owner: Sequence[int]
    joined: Sequence[Sequence[int]]

    @classmethod
    def of(
        cls, names: Sequence[str], params: Sequence[Any], layer_axes: Sequence[int], labels: Sequence[Any]
    ) -> LayerRows:
        """Return the rows of parameters, given the number of leading axes and the layer label of each.

        Raises
        ------
        ValueError
            If a parameter has fewer axes, or the parts of a layer have different leading axes.
        """
        slices: list[LayerSlices] = []
        start = 0
        for name, p, axes in zip(names, params, layer_axes, strict=True):
            if axes > p.ndim:
                raise ValueError(f"layer_axes must be at most the {p.ndim} axes of {shown(name)}; got {shown(axes)}")
            lead = tuple(int(length) for length in p.shape[:axes])
            lead = lead if prod(lead) else ()  # an empty parameter is one layer
            slices.append(LayerSlices(lead, start, prod(lead)))
            start += slices[-1].size
        owner = [i for i, own in enumerate(slices) for _ in range(own.size)]
        return cls(slices, owner, _joined_rows(names, labels, slices, layer_axes))

    @property
    def is_stacked(self) -> bool:
        """Whether a parameter has several rows."""
        return len(self.owner) > len(self.slices)

    def names(self, names: Sequence[str]) -> list[str]:
        """Return the names of all rows, from those of the parameters."""
        return [row for own, name in zip(self.slices, names, strict=True) for row in own.names(name)]

    def views(self, arrays: Sequence[Any]) -> Sequence[Any]:
        """Return the slices of all parameters' arrays; the sequence itself where no parameter is sliced."""
        if not self.is_stacked:
            return arrays
        return [view for own, x in zip(self.slices, arrays, strict=True) for view in own.views(x)]

    def spread(self, values: Sequence[Any]) -> list[Any]:
        """Return the parameter's value for each row."""
        return [values[i] for i in self.owner]


def labels_of(layer_of: LayerOf, names: Sequence[str]) -> list[Any]:
    """Return the layer label of each parameter, None for a layer of its own, or a list of labels of its slices.

    Raises
    ------
    TypeError
        If `layer_of` is neither a mapping nor a function, or a label is not hashable.
    ValueError
        If it contains an unknown parameter name.
    """
    if layer_of is None:
        return [None] * len(names)
    if isinstance(layer_of, Mapping):
        unknown = layer_of.keys() - set(names)
        if unknown:
            raise ValueError(f"layer_of must hold names of parameters; got {shown(min(unknown, key=str))}")
        labels = [layer_of.get(name) for name in names]
    elif callable(layer_of):
        labels = [layer_of(name) for name in names]
    else:
        raise TypeError(f"layer_of must be a mapping or a function from names to layers; got {shown(layer_of)}")
    for label in labels:
        if not all(isinstance(x, Hashable) for x in (label if isinstance(label, list) else [label])):
            raise TypeError(f"layer_of must give names of layers, or None; got {shown(label)}")
    return labels


def layer_names(names: Sequence[str], labels: Sequence[Any], slices: Sequence[LayerSlices]) -> list[str | None]:
    """Return the name of the layer of each row: the parameter's, or its label's; None for a piece without slices."""
    found: list[str | None] = []
    meaning: dict[str, Any] = {}
    for name, label, own in zip(names, labels, slices, strict=True):
        if label == []:
            found.append(None)
            continue
        base = name if label is None else label
        texts = list(map(str, base)) if isinstance(base, list) else own.names(str(base))
        for k, text in enumerate(texts):
            layer = (name, k) if label is None else ("", base[k]) if isinstance(base, list) else ("", base, k)
            if meaning.setdefault(text, layer) != layer:
                raise ValueError(f"layers must have different names; two are called {shown(text)}")
        found += texts
    return found


def _joined_rows(
    names: Sequence[str], labels: Sequence[Any], slices: Sequence[LayerSlices], layer_axes: Sequence[int]
) -> list[list[int]]:
    """Return the rows of each layer with several; of stacks with one label, slices of one index form a layer."""
    first: dict[Hashable, int] = {}
    rows: dict[Hashable, list[int]] = {}
    for i, (label, own) in enumerate(zip(labels, slices)):
        if label is None:
            continue
        if isinstance(label, list):  # of a piece of a stacked parameter, each of whose slices has a label
            if not layer_axes[i]:
                raise TypeError(f"layer_of must give names of layers, or None; got {shown(label)}")
            size = own.size if own.lead else 0
            if len(label) != size:
                counts = f"{shown(names[i])} has {size} slices, not {len(label)}"
                raise ValueError(f"layer_of must give one label, or one for each slice; {counts}")
            for k, one in enumerate(label):
                rows.setdefault((one,), []).append(own.start + k)
            continue
        other = first.setdefault(label, i)
        if slices[other].lead != own.lead:
            leads = f"{shown(names[other])} has {shown(slices[other].lead)} and {shown(names[i])} has {shown(own.lead)}"
            raise ValueError(
                f"parameters joined into one layer must have the same leading axes; in {shown(label)} {leads}"
            )
        for k in range(own.size):
            rows.setdefault((label, k), []).append(own.start + k)
    return [found for found in rows.values() if len(found) > 1]
