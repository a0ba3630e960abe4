"""Layers that are spread over processes: which there are, and who adds up their sums.

Each process holds a piece of a layer, which may be empty.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from array_api_compat import is_jax_array

from lars_array._arrays import asarray, to_floats
from lars_array._messages import listed, shown
from lars_array.layers import LayerRows

__all__ = [
    "AllReduce",
    "RefusedElsewhereError",
    "Shards",
    "SkippedError",
    "checked_all_reduce",
    "digest",
    "names_of_layers",
    "refusals_are_told",
    "shards_of",
]

AllReduce = Callable[[Any], None]

BITS = 20  # of each part of a digest: sums of squares over 8,191 processes are exact


class RefusedElsewhereError(RuntimeError):
    """Another process refused a step, and nothing was changed on any."""


class SkippedError(Exception):
    """A step is skipped on all processes."""


class Shards:
    """The layers whose sums one `all_reduce` adds over processes.

    Parameters
    ----------
    all_reduce : callable
        Adds a float64 array over all processes, in place.
    layers : sequence of str
        Their names, the same on all processes.
    rows : int array of shape (rows,)
        The layer of each row of the model, -1 for rows that are not shared by this `all_reduce`.
    filled, counted : bool arrays of shape (rows,)
        Whether this process holds anything of a row; and whether it is this process that counts it, where several hold
        the same.
    copies : int array of shape (rows,)
        How many processes hold the same piece of a row.
    groups : int array of shape (rows,)
        The parameter group of each row.
    like : array
        An array of the library and on the device of the tables that are sent.
    xp : Array API namespace
        Its namespace.
    of_norms : bool
        Whether it is the norms of gradients that are added, over processes that hold different layers.

    Attributes
    ----------
    processes : int
        How many they are; 0 before they have agreed on the layers.
    is_awaited : bool
        Whether the other processes wait for a table from this one.
    """

    def __init__(
        self,
        all_reduce: AllReduce,
        layers: Sequence[str],
        rows: Any,
        filled: Any,
        counted: Any,
        copies: Any,
        groups: Any,
        like: Any,
        xp: Any,
        *,
        of_norms: bool = False,
    ) -> None:
        self.of_norms = of_norms
        self.all_reduce, self.layers, self.rows, self.filled, self.counted = all_reduce, layers, rows, filled, counted
        self.groups, self.copies, self.are_copies_checked = groups, copies, not (copies > 1).any()
        # What can't be written in place is sent as a NumPy array.
        self.xp = np if is_jax_array(like) else xp
        self.like = np.zeros(1) if is_jax_array(like) else asarray([0.0], xp.float64, like=like, xp=xp)
        self.processes = 0
        self.is_awaited = False

    def agree(self) -> None:
        """Compare the layers with those of the other processes, in a message whose size does not depend on them.

        Raises
        ------
        ValueError
            On all processes, if their layers differ.
        RuntimeError
            If `all_reduce` has a size, and does not add over so many processes.
        """
        if self.processes:
            return
        parts = digest(self.layers)
        # n Σd² = (Σd)² only where all d are the same.
        table = self.table(np.array([[1.0, d, d * d] for d in parts]))
        self.add(table)
        count, total, squares = np.array([to_floats(table[i, :]) for i in range(len(parts))]).T
        size = getattr(self.all_reduce, "size", None)
        if size is not None and (count != size).any():
            raise RuntimeError(f"all_reduce must add over its {size} processes; got a sum over {count[0]:g}")
        if (count * squares != total**2).any():
            first = listed(map(shown, self.layers[:5]))
            raise ValueError(
                f"the layers must be the same on all {count[0]:g} processes, in the same order; here they are "
                f"{len(self.layers)}, the first {first}"
            )
        self.processes = int(count[0])
        self.is_awaited = True

    def refuse(self) -> None:
        """Tell the other processes that this one refuses the step; the host does not wait for their answer."""
        self.agree()
        table = np.zeros((self.table_rows, 3))
        table[-2] = 1.0, 1.0, 0.0
        self.add(self.table(table))

    @property
    def table_rows(self) -> int:
        """How many rows the table of a step has: see `lars_array.state.exchange`."""
        return len(self.layers) + -(-len(self.layers) // 3) + 2

    def table(self, values: Any) -> Any:
        """Return a NumPy array as one that `all_reduce` takes."""
        return values if self.xp is np else asarray(values, self.xp.float64, like=self.like, xp=self.xp)

    def add(self, table: Any) -> None:
        """Add a table over all processes, in place."""
        self.is_awaited = False  # after an error of `all_reduce`, too: it may not work any more
        self.all_reduce(table)


def shards_of(
    rows: LayerRows,
    keys: Sequence[str | None],
    all_reduce: Sequence[AllReduce | None],
    layers: Callable[[AllReduce], Sequence[str] | None],
    norm_reduce: AllReduce | None = None,
    *,
    filled: Sequence[bool],
    counted: Sequence[bool],
    copies: Sequence[int],
    groups: Sequence[int],
    like: Any,
    xp: Any,
) -> list[Shards]:
    """Return the layers of parameters by the function that adds up their sums.

    Parameters
    ----------
    rows : LayerRows
        The rows of all parameters.
    keys : sequence of str or None
        The name of the layer of each row; None for the one row of a piece of a stacked parameter that has no slices.
    all_reduce : sequence of callables or None
        One a parameter; None where its layers are whole here.
    layers : callable
        Returns the names of all layers for an `all_reduce`, also of those that this process holds nothing of; None for
        those in `keys`.
    norm_reduce : callable, optional
        Adds the norms of gradients over processes that hold different layers.
    filled, counted, copies, groups : sequences
        One a parameter, see `Shards`.
    like, xp : array and its namespace
        See `Shards`.

    Raises
    ------
    ValueError
        If `layers` lacks a layer, or parts of a layer are shared in different ways.
    """
    of_rows, shared = rows.spread(all_reduce), []
    known: dict[str, AllReduce | None] = {}
    for key, function in zip(keys, of_rows, strict=True):
        if key is not None and known.setdefault(key, function) is not function:
            raise ValueError(f"all parts of a layer must have the same all_reduce; those of {shown(key)} differ")
    is_filled, is_counted = (np.array(rows.spread(x), bool) for x in (filled, counted))
    copies_of, group_of = (np.array(rows.spread(x), np.int64) for x in (copies, groups))
    of_each = is_filled, is_counted, copies_of, group_of
    for function in {id(x): x for x in all_reduce if x is not None}.values():
        own = [key if x is function else None for key, x in zip(keys, of_rows, strict=True)]
        names = list(dict.fromkeys(layers(function) or [key for key in own if key is not None]))
        place = {name: i for i, name in enumerate(names)}
        lacking = next((key for key in own if key is not None and key not in place), None)
        if lacking is not None:
            raise ValueError(f"layers must name all layers of all processes; it lacks {shown(lacking)}")
        index = np.array([-1 if key is None else place[key] for key in own], np.int64)
        shared.append(Shards(function, names, index, *of_each, like, xp))
    if norm_reduce is not None:
        nowhere = np.full(len(keys), -1)
        shared.append(Shards(norm_reduce, [], nowhere, *of_each, like, xp, of_norms=True))
    return shared


def checked_all_reduce(all_reduce: Any) -> Any:
    """Return the `all_reduce` of a call; raise TypeError unless it is a function or None."""
    if not (all_reduce is None or callable(all_reduce)):
        raise TypeError(f"all_reduce must be a function that adds an array over processes; got {shown(all_reduce)}")
    return all_reduce


def names_of_layers(layers: Any) -> tuple[str, ...] | None:
    """Return the `layers` of a call; raise TypeError unless they are names."""
    if layers is None:
        return None
    found = [layers] if isinstance(layers, str) or not isinstance(layers, Iterable) else list(layers)
    if isinstance(layers, str) or not all(isinstance(name, str) for name in found):
        raise TypeError(f"layers must be a list of names; got {shown(layers)}")
    if len(set(found)) < len(found):
        raise ValueError(f"layers must name each layer once; {len(set(found))} of {len(found)} names differ")
    return tuple(found)


@contextmanager
def refusals_are_told(shards: Sequence[Shards]) -> Iterator[None]:
    """Tell the other processes of an error here, so that they refuse the step as well and don't wait for this one."""
    for shard in shards:
        shard.is_awaited = True
    try:
        yield
    except Exception as error:
        for shard in shards:
            if shard.is_awaited:
                try:
                    shard.refuse()
                except Exception as failure:
                    error.add_note(f"the other processes could not be told: {failure}")
        raise


def digest(values: Any) -> list[int]:
    """Return three numbers of 20 bits that differ where the representations of values do."""
    from hashlib import sha256  # which importing lars_array need not wait for

    number = int.from_bytes(sha256(repr(values).encode()).digest()[:8], "big")
    return [(number >> (BITS * i)) % (1 << BITS) for i in range(3)]
