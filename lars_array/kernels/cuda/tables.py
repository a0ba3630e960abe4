"""The tables of the CUDA kernels: the rows of a step cut into pieces, the programs of their rules, and results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from lars_array._arrays import COMPUTE
from lars_array.core import NORM_OF, Rule
from lars_array.kernels.base import KernelArrays
from lars_array.kernels.cuda.one_launch import OneLaunch, is_wanted
from lars_array.kernels.cuda.source import ARRAY, GROUP, MODEL, PIECE, POINTERS, ROW, SLOTS, pair_name
from lars_array.kernels.tape import INPUTS, record
from lars_array.nonfinite import POLICIES

__all__ = ["DeviceTables"]

PIECE_LENGTH = 1 << 14  # elements that one block works on
MOST_PIECES = 1 << 12  # of one array: their sums are added by a few threads
WIDTH = 4  # elements: where a piece begins there may begin a vector

_LIMITS = {kind: float(np.finfo(kind).max) for kind in ("float32", "float64")}


class Segment(NamedTuple):
    """Pieces of one launch: those of arrays of the same element types of parameters and gradients."""

    types: tuple[str, str]
    first: int
    pieces: int


class HostTables(NamedTuple):
    """Rows cut into pieces.

    Parameters
    ----------
    order : integer array of shape (rows,)
        The row of each entry of `arrays`: sorted by types, and then so that the parts of a layer are neighbours.
    arrays, pieces : structured arrays
        For the device; addresses are missing.
    rows : structured array of shape (rows,)
        The pieces of each row; all else is missing. Rows that form one layer have the pieces of all of them.
    segments : list of Segment
        All launches of a stage: at least one, which has no pieces if there are none.
    """

    order: Any
    arrays: Any
    pieces: Any
    rows: Any
    segments: list[Segment]


def piece_lengths(sizes: Any) -> Any:
    """Return the elements in each piece of arrays, but for the last piece: from the sizes of the arrays alone."""
    lengths = np.maximum(PIECE_LENGTH, -(-sizes // MOST_PIECES))
    return -(-lengths // WIDTH) * WIDTH


def split(sizes: Any, types: Sequence[tuple[str, str]], joined: Sequence[Sequence[int]] = ()) -> HostTables:
    """Cut rows into pieces.

    Parameters
    ----------
    sizes : int64 array of shape (rows,)
        Real numbers in each.
    types : sequence of tuple (str, str)
        Element types of parameters and gradient of each.
    joined : sequence of sequences of int
        The rows of each layer that has several, of the same types.

    Returns
    -------
    HostTables
        The tables.
    """
    kinds = sorted(set(types))
    kind = np.array([kinds.index(pair) for pair in types], np.int64)
    leader = np.arange(len(sizes))
    for index in joined:
        leader[index] = min(index)
    order = np.lexsort((leader, kind))
    lengths = piece_lengths(sizes)
    counts = (-(-sizes // lengths))[order]
    starts = np.cumsum(counts) - counts
    arrays, rows = np.zeros(len(sizes), ARRAY), np.zeros(len(sizes), ROW)
    arrays["size"], arrays["piece"], arrays["row"] = sizes[order], lengths[order], order
    pieces = np.zeros(int(counts.sum()), PIECE)
    pieces["array"] = np.repeat(np.arange(len(sizes)), counts)
    pieces["index"] = np.arange(len(pieces)) - np.repeat(starts, counts)
    rows["first_piece"][order], rows["pieces"][order] = starts, counts
    for index in joined:
        rows["first_piece"][index] = rows["first_piece"][index].min()
        rows["pieces"][index] = rows["pieces"][index].sum()
    totals = np.bincount(kind[order], counts, len(kinds)).astype(int)
    firsts = (np.cumsum(totals) - totals).tolist()
    segments = list(map(Segment, kinds, firsts, totals.tolist()))
    return HostTables(order, arrays, pieces, rows, [x for x in segments if x.pieces] or segments[:1])


class Programs(NamedTuple):
    """Rules for the device: a structured array of groups, and the operations and constants of all their tapes."""

    groups: Any
    operations: Any
    constants: Any


def programs(rules: Sequence[Rule], policies: Sequence[str]) -> Programs | None:
    """Return the programs of groups with these rules and `nonfinite`; None if a rule has no tape, or one too long."""
    tapes: list[Any] = [record(rule) for rule in rules]
    if any(x is None or len(INPUTS) + len(x.constants) + len(x.operations) > SLOTS for x in tapes):
        return None
    groups = np.zeros(len(rules), GROUP)
    groups["norm_of"] = [NORM_OF.index(rule.norm_of) for rule in rules]
    groups["policy"] = [POLICIES.index(policy) for policy in policies]
    groups["outputs"] = [tape.outputs for tape in tapes]
    unique = list(dict.fromkeys(tapes))
    index = [unique.index(tape) for tape in tapes]
    operations, constants = [x.operations for x in unique], [x.constants for x in unique]
    for name, parts in (("operation", operations), ("constant", constants)):
        lengths = np.array(list(map(len, parts)))
        groups[f"last_{name}"] = np.cumsum(lengths)[index]
        groups[f"first_{name}"] = groups[f"last_{name}"] - lengths[index]
    return Programs(groups, np.concatenate(operations).astype(np.int32), np.concatenate(constants))


class PointerTable:
    """A table of addresses on a device, which the host writes without waiting.

    Parameters
    ----------
    device : Device
        See `lars_array.kernels.cuda.device`.
    order : integer array of shape (rows,)
        For each entry of the table, the row whose address it is.

    Attributes
    ----------
    array : uint64 array of shape (rows,)
        The table.
    """

    def __init__(self, device: Any, order: Any) -> None:
        count = len(order)
        self._written: bytes | None = bytes(8 * count)
        self.array = device.zeros(count, np.uint64)
        # They are arguments of launches: no memory of the host is read later.
        room = POINTERS["values"].shape[0]
        pointers = np.zeros(-(-count // room), POINTERS)
        self._chunks: list[tuple[Any, Any, Callable[[], None]]] = []
        for k, first in enumerate(range(0, count, room)):
            index = order[first : first + room]
            pointers[k]["first"], pointers[k]["count"] = first, len(index)
            arguments = np.uint64(device.address(self.array)), pointers[k : k + 1]
            launch = device.launcher("write_pointers", 1, *arguments)
            self._chunks.append((index, pointers["values"][k, : len(index)].view(np.int64), launch))

    def write(self, addresses: Any, *, always: bool = False) -> None:
        """Write the address of each row, int64, if one has changed, or `always`: although they seem to be there."""
        now = addresses.tobytes()
        if not always and now == self._written:
            return
        self._written = None  # until all are there
        for index, values, launch in self._chunks:
            addresses.take(index, out=values, mode="clip")  # the default mode would copy once more
            launch()
        self._written = now


class DeviceTables:
    """Tables on a device, and the structure of their addresses that is the argument of every launch.

    Parameters
    ----------
    device : Device
        See `lars_array.kernels.cuda.device`.
    arrays : KernelArrays
        The arrays of all rows.
    types : sequence of tuple (str, str)
        Element types of parameters and gradient of each row.
    rows : DeviceRows, optional
        Groups, parameters and layers of the rows, for launches that decide on a step.

    Attributes
    ----------
    model : structured array of one element
        The argument of launches.
    grads : PointerTable
        The addresses of gradients, by row.
    S, C, gamma : arrays of shape (rows, 3), (rows, 6) and (rows,)
        The results of the last launches.
    one_launch : OneLaunch or None
        The launch for steps that allow it, where that is asked for and the arrays allow it.
    """

    def __init__(self, device: Any, arrays: KernelArrays, types: Sequence[tuple[str, str]], rows: Any = None) -> None:
        self._device, count = device, len(types)
        sizes = np.array([p.size * (2 if p.dtype.kind == "c" else 1) for p in arrays.params], np.int64)
        host = split(sizes, types, () if rows is None else rows.joined)
        for name, column in (("p", arrays.params), ("v", arrays.buffers), ("master", arrays.masters)):
            host.arrays[name] = np.array([0 if x is None else device.address(x) for x in column], np.uint64)[host.order]
        host.rows["limit"] = [_LIMITS[COMPUTE[p]] for p, _ in types]
        narrowed = [g == "float64" and COMPUTE[p] == "float32" for p, g in types]
        host.rows["square_limit"] = [_LIMITS["float32"] ** 2 if narrow else np.inf for narrow in narrowed]
        if rows is not None:
            host.rows["group"], host.rows["param"] = rows.group_of, rows.param_of
            host.rows["number"], host.rows["keeps"] = rows.number, rows.keeps
        in_one = is_wanted() and rows is not None and len(host.segments) == 1 and len(host.pieces) > 0
        device.compile(types, one_launch=in_one)
        self.S, self.C, self.gamma = (device.zeros(shape, np.float64) for shape in ((count, 3), (count, 6), count))
        self.grads = PointerTable(device, host.order)
        flags = device.zeros(2, np.int32)
        self.model = np.zeros(1, MODEL)
        self._fields: dict[str, Any] = {}  # of `model` that were set, with their arrays
        self.set(S=self.S, C=self.C, gamma=self.gamma, grads=self.grads.array)
        self.set(arrays=device.put(host.arrays), rows=device.put(host.rows), pieces=device.put(host.pieces))
        self.set(partial=device.zeros((len(host.pieces), 3), np.float64), norm=device.zeros(1, np.float64))
        self.set(prevented=flags[:1], offender=flags[1:])
        self.set(row_count=count, piece_count=len(host.pieces), decides=rows is not None)
        first = host.segments[0]
        self._launches: dict[str, list[Callable[[], None]]] = {
            "sums": [
                device.launcher(pair_name("sums", *x.types), max(x.pieces, 1), self.model, x.first)
                for x in host.segments
            ],
            "gradient_norm": [device.launcher("gradient_norm", 1, self.model)],
            "coefficients": [device.launcher("coefficients", -(-count // device.rows), self.model)],
            "apply": [
                device.launcher(
                    pair_name("apply", *x.types), max(x.pieces, 1), self.model, x.first, x.pieces, int(x is first)
                )
                for x in reversed(host.segments)  # first the memory that `sums` leaves in the cache
            ],
        }
        self.one_launch = OneLaunch(device, host, self.model) if in_one else None
        self._loaded: Any = None
        self._can_run = False

    def set(self, **fields: Any) -> None:
        """Set fields of `model`: to a number, the address of an array, which the array must keep, or 0 for None."""
        for name, value in fields.items():
            if self._fields.get(name, self) is not value:
                self._fields.pop(name, None)  # until it is there: what comes in between is done again
                self.model[name] = self._device.address(value) if hasattr(value, "shape") else value or 0
                self._fields[name] = value

    def launch(self, *stages: str) -> None:
        """Queue the launches of stages: "sums", "gradient_norm", "coefficients" or "apply"."""
        for stage in stages:
            for launch in self._launches[stage]:
                launch()

    def load(self, rules: Sequence[Rule], policies: Sequence[str]) -> bool:
        """Put rules and policies on the device, where they have changed, and return whether they can run there."""
        if self._loaded is not None and rules is self._loaded[1] and policies is self._loaded[2]:
            return self._can_run
        wanted = [(id(rule.function), rule.norm_of, policy) for rule, policy in zip(rules, policies, strict=True)]
        is_new = self._loaded is None or wanted != self._loaded[0]
        self._loaded = None  # until all is there
        if is_new:
            found = programs(rules, policies)
            if found is not None:
                tables = {name: self._device.put(table) for name, table in found._asdict().items()}
                self.set(**tables)
            self._can_run = found is not None
        self._loaded = wanted, rules, policies  # rules live as long as their ids are compared
        return self._can_run
