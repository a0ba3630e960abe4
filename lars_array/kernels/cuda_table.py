"""The tables of the CUDA kernels: which arrays there are, how they are cut up, and what is done for each layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from lars_array.hyper import NONFINITE
from lars_array.kernels.cuda_source import ARRAY, GROUP, PIECE, ROW, SLOTS
from lars_array.registry import NORM_OF, Rule
from lars_array.tape import INPUTS, Tape

__all__ = ["Programs", "Segment", "Table", "piece_lengths", "programs"]

PIECE_LENGTH = 1 << 14  # elements that one block visits
MOST_PIECES = 1 << 12  # of one array: their sums are added by a few threads
WIDTH = 4  # elements: where a piece begins there may begin a vector


def piece_lengths(sizes: Any) -> Any:
    """Return how many elements each piece of arrays of these sizes has, but for the last; all else does not matter."""
    lengths = np.maximum(PIECE_LENGTH, -(-sizes // MOST_PIECES))
    return -(-lengths // WIDTH) * WIDTH


class Segment(NamedTuple):
    """Pieces that one launch visits: those of arrays of the same element types of parameters and gradients."""

    types: tuple[str, str]
    first: int
    pieces: int


class Table:
    """What is known of the arrays of a model.

    Parameters
    ----------
    sizes : int64 array of shape (layers,)
        Real numbers in each.
    places : uint64 array of shape (layers, 2)
        Addresses of momentum buffer or 0, and master weights or 0.
    types : sequence of tuple (str, str)
        Element types of parameters and gradient of each.
    limits, most : arrays of shape (layers,)
        As `lars_array.nonfinite.largest` and `most_squares` have them; inf where the second says nothing.
    joined : sequence of sequences of int
        Arrays that are one layer, see `lars_array.rows`.

    Attributes
    ----------
    order : integer array of shape (layers,)
        The layer of each entry of `arrays`: those of the same types stand together, and of these those of one layer.
    arrays, pieces : structured arrays
        As the device has them.
    rows : structured array of shape (layers,)
        The same, in the order of the layers; group, place and `keeps` are still to be filled in.
    joined_rows : structured array of shape (layers,), or None
        The same, where arrays of one layer have the pieces of all of them. None where these are of several types.
    segments : list of Segment
        All pieces.
    """

    def __init__(
        self,
        sizes: Any,
        places: Any,
        types: Sequence[tuple[str, str]],
        limits: Any,
        most: Any = np.inf,
        joined: Sequence[Sequence[int]] = (),
    ) -> None:
        kinds = sorted(set(types))
        kind = np.array([kinds.index(pair) for pair in types], np.int64)
        leader = np.arange(len(sizes))
        for rows in joined:
            leader[rows] = min(rows)
        self.order = np.lexsort((leader, kind))
        lengths = piece_lengths(sizes)
        counts = (-(-sizes // lengths))[self.order]
        starts = np.cumsum(counts) - counts
        self.arrays = np.zeros(len(sizes), ARRAY)
        for column, name in enumerate(("v", "master")):
            self.arrays[name] = places[self.order, column]
        self.arrays["size"], self.arrays["piece"] = sizes[self.order], lengths[self.order]
        self.arrays["row"] = self.order
        self.pieces = np.zeros(int(counts.sum()), PIECE)
        self.pieces["array"] = np.repeat(np.arange(len(sizes)), counts)
        self.pieces["index"] = np.arange(len(self.pieces)) - np.repeat(starts, counts)
        self.rows = np.zeros(len(sizes), ROW)
        self.rows["limit"], self.rows["most"] = limits, most
        self.rows["first_piece"][self.order], self.rows["pieces"][self.order] = starts, counts
        self.joined_rows: Any = self.rows
        if joined:
            self.joined_rows = self.rows.copy()
            for rows in joined:
                self.joined_rows["first_piece"][rows] = self.rows["first_piece"][rows].min()
                self.joined_rows["pieces"][rows] = self.rows["pieces"][rows].sum()
            if any(len(set(kind[rows])) > 1 for rows in joined):
                self.joined_rows = None
        of_kind = np.bincount(kind[self.order], counts, len(kinds)).astype(int).tolist()
        ends = np.cumsum(of_kind).tolist()
        self.segments = [Segment(pair, end - n, n) for pair, end, n in zip(kinds, ends, of_kind, strict=True)]


class Programs(NamedTuple):
    """Tapes as the device takes them, with what groups are: structured array, and all operations and constants."""

    groups: Any
    operations: Any
    constants: Any


def programs(rules: Sequence[Rule], tapes: Sequence[Tape | None], policies: Sequence[str]) -> Programs | None:
    """Return the groups, and the tapes one after the other, each once.

    Parameters
    ----------
    rules, tapes, policies : sequences
        The rule of each group, its tape, and its `nonfinite`.

    Returns
    -------
    Programs or None
        None where a rule has no tape, or one that is too long.
    """
    groups = np.zeros(len(rules), GROUP)
    groups["norm_of"] = [NORM_OF.index(rule.norm_of) for rule in rules]
    groups["policy"] = [NONFINITE.index(policy) for policy in policies]
    known: dict[int, tuple[int, int, int, int]] = {}
    operations: list[Any] = [np.zeros((0, 4), np.int32)]
    constants: list[Any] = [np.zeros(0)]
    for k, tape in enumerate(tapes):
        if tape is None or len(INPUTS) + len(tape.constants) + len(tape.operations) > SLOTS:
            return None
        if id(tape) not in known:
            first_operation, first_constant = (sum(map(len, x)) for x in (operations, constants))
            operations.append(tape.operations.astype(np.int32))
            constants.append(tape.constants)
            last_operation, last_constant = first_operation + len(tape.operations), first_constant + len(tape.constants)
            known[id(tape)] = first_operation, last_operation, first_constant, last_constant
        extent = known[id(tape)]
        names = ("first_operation", "last_operation", "first_constant", "last_constant")
        for name, number in zip(names, extent, strict=True):
            groups[name][k] = number
        groups["outputs"][k] = tape.outputs
    return Programs(groups, np.concatenate(operations), np.concatenate(constants))
