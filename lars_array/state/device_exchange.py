"""Sums over all processes on a device: the host queues them without waiting, and the device notes what they forbid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lars_array._arrays import asarray, is_array, is_on_accelerator
from lars_array.state.exchange import RAISES, WORTH, Exchange, on_host
from lars_array.state.shards import Shards
from lars_array.state.table_layout import MISSING, NUMBER, TableLayout

__all__ = ["DeviceExchange", "exchange_of"]


class DeviceExchange(Exchange):
    """The sums of a step over all processes, see `Exchange`.

    Everything but the hyper-parameters is on the device from the start: a CUDA graph can't read the host.

    Attributes
    ----------
    refused : bool array of shape ()
        Whether a process has refused this step, did not take part, or takes part in another way.
    found : array of shape ()
        Not 0 where the step is to be skipped.
    raises, skips : bool arrays of shape ()
        Whether a layer without a row here is not finite, and that is an error, or a reason to skip the step.
    """

    def __init__(self, shards: Sequence[Shards], numbers: Any, joined: Sequence[Sequence[int]]) -> None:
        super().__init__(shards, numbers, joined)
        self.xp, self._like = shards[0].xp, shards[0].like
        self.rows = len(numbers)
        self._tables = [_DeviceLayout(layout, self._put) for layout in self.layouts]
        self._sent = None if self.counted.all() else self._put(self.counted[:, None])
        is_whole = np.isin(np.arange(self.rows), self.whole)
        self._whole = self._put(is_whole) if is_whole.any() else None
        self._sources = self._put(self._sources_of_rows())
        self._digest, self._constants = self._put(np.zeros(1)), self._put(np.array([0.0, 1.0]))
        self._policies: tuple[Any, ...] = (None,)
        self._given: Any = 0.0

    def _put(self, x: Any) -> Any:
        flat = asarray(x.ravel().tolist(), getattr(self.xp, x.dtype.name), like=self._like, xp=self.xp)
        return self.xp.reshape(flat, x.shape)

    def _sources_of_rows(self) -> Any:
        """Return the rows that each row is the sum of: in all sums one below the other, the last of them zeros."""
        starts = self.rows + np.cumsum([0, *(layout.size for layout in self.layouts)])
        parts = [[i] for i in range(self.rows)]
        for index in self.joined:
            for i in index:
                parts[i] = list(index)
        for start, layout in zip(starts.tolist(), self.layouts):
            for i, layer in zip(layout.own.tolist(), layout.layer.tolist()):
                parts[i] = [start + layer]
        return _padded(parts, int(starts[-1]))

    def prepare(self, groups: Sequence[Mapping[str, Any]], found_inf: Any) -> DeviceExchange:
        """Take over the hyper-parameters of this step, and its `found_inf` as a number or an array on the device."""
        super().prepare(groups, found_inf)
        self._given = self.found
        self._digest[0:1] = float(self.digest)  # in every step: a graph that is replayed writes its own
        key = self.policies, [group["max_grad_norm"] is None for group in groups]
        if key != self._policies[0]:
            codes = np.array([WORTH[policy] for policy in self.policies])
            clip = np.array([0.0 if group["max_grad_norm"] is None else 1.0 for group in groups])
            of_groups, of_rows = self._put(codes), self._put(codes[self.group_of])
            self._policies = key, of_groups, of_rows, self._put(np.array([codes @ clip]))
        zero = self._constants[0]
        self.refused = self.raises = self.skips = zero != zero
        self.found = self._as_float(self._given)
        return self

    def _as_float(self, found: Any) -> Any:
        if is_array(found):
            return self.xp.astype(self.xp.reshape(found, ()), self.xp.float64)
        return self._constants[1 if found else 0]

    def __call__(self, S: Any, factors: Any) -> tuple[Any, Any]:
        """Add the sums over all processes; as `Exchange`, but that nothing is raised, but noted on the device."""
        xp, zero = self.xp, self._constants[0]
        self._last, self.left = (S, factors), self.left - 1
        if self.rows:
            S = xp.astype(S, xp.float64, copy=False)
        else:
            S = xp.reshape(self._constants[:0], (0, 3))
        sent = S if self._sent is None else xp.where(self._sent, S, 0.0)
        squares = factors**2 * sent[:, 1] if self.clips and self.rows else None
        own = zero if squares is None or self._whole is None else xp.sum(xp.where(self._whole, squares, 0.0))
        total, bad, found = own, self._bad(S), self._as_float(self._given)
        sources, zeros = [S], xp.reshape(xp.stack([zero, zero, zero]), (1, 3))
        for table in self._tables:
            shards = table.layout.shards
            shards.agree()
            own = total if shards.of_norms else zero
            if squares is not None and not shards.of_norms:
                own = xp.sum(xp.where(table.is_own, squares, 0.0))
            header = xp.stack([self._constants[1], zero, found, own, bad, self._digest[0]])
            added = xp.concat([table.body(sent, zeros, xp), table.counts, xp.reshape(header, (2, 3))], axis=0)
            shards.add(added)
            shards.is_awaited = self.left > 0
            if not shards.are_copies_checked:  # in the first step, for which the host waits anyway
                self._check_copies(table.layout, on_host(S), on_host(added))
            self._note(table, added)
            total = added[-1, 0] if shards.of_norms else total + added[-1, 0]
            sources.append(added[: table.layout.size, :])
        if self.clips:
            self._prevent_by(xp.where(xp.isnan(total), self._policies[3][0], 0.0))
        return _summed(xp.concat([*sources, zeros], axis=0), self._sources, xp), total

    def check_finite(self) -> bool:
        """Return False: the device decides."""
        return False

    def _bad(self, S: Any) -> Any:
        """Return the number of whole layers that are not finite, see `Exchange`."""
        if self._whole is None:
            return self._constants[0]
        xp = self.xp
        is_bad = self._whole & ~xp.all(xp.isfinite(S), axis=1)
        return xp.sum(xp.where(is_bad, self._policies[2], 0.0))

    def _note(self, table: _DeviceLayout, added: Any) -> None:
        """Note what the host would raise."""
        xp, layout, count = self.xp, table.layout, table.layout.shards.processes
        present, missing, groups = table.counted(added, xp)
        torn = (missing > 0) & (present > 0)
        strange = table.is_known & (present > 0) & (groups != present * table.group)
        refused = (added[-2, 0] != count) | (added[-2, 1] != 0) | (added[-1, 2] != count * self._digest[0])
        self.refused = self.refused | refused | xp.any(torn | strange)
        self.found = self.found + added[-2, 2]
        self._prevent_by(added[-1, 1])
        if table.unseen is None:
            return
        group = xp.astype(groups / xp.where(present > 0, present, 1.0), xp.int64)
        most = len(self.policies) - 1
        group = xp.where(group > most, most, group)  # of a sum that was not completed, which is refused
        bad = table.unseen & ~xp.all(xp.isfinite(added[: layout.size, :]), axis=1)
        self._prevent_by(xp.sum(xp.where(bad, xp.take(self._policies[1], group), 0.0)))

    def _prevent_by(self, number: Any) -> None:
        """Note the policies of layers that are not finite, as `RAISES` and ones."""
        self.raises = self.raises | (number >= RAISES)
        self.skips = self.skips | ((number > 0) & (number < RAISES))


def exchange_of(shards: Sequence[Shards], numbers: Any, joined: Sequence[Sequence[int]], *, like: Any) -> Exchange:
    """Return the sums over all processes for rows of the library and on the device of `like`; see `Exchange`."""
    return (DeviceExchange if is_on_accelerator(like) else Exchange)(shards, numbers, joined)


class _DeviceLayout:
    """A `TableLayout` as arrays on a device."""

    def __init__(self, layout: TableLayout, put: Any) -> None:
        self.layout = layout
        rows = layout.rows
        parts: list[list[int]] = [[] for _ in range(layout.size)]
        for i, layer in zip(layout.own.tolist(), layout.layer.tolist()):
            parts[layer].append(i)
        self._sources = put(_padded(parts, rows))
        self.is_own = put(np.isin(np.arange(rows), layout.own))
        self.counts = put(layout.counts)
        self.is_known, self.group = put(layout.group >= 0), put(layout.group.astype(np.float64))
        unseen = np.isin(np.arange(layout.size), layout.unseen)
        self.unseen = put(unseen) if unseen.any() else None

    def body(self, S: Any, zeros: Any, xp: Any) -> Any:
        """Return the sums of all layers."""
        return _summed(xp.concat([S, zeros], axis=0), self._sources, xp)

    def counted(self, table: Any, xp: Any) -> tuple[Any, Any, Any]:
        """Return `TableLayout.counted`."""
        flat = xp.reshape(table[self.layout.size : -2, :], (-1,))[: self.layout.size]
        groups = xp.floor(flat / NUMBER)
        rest = flat - NUMBER * groups
        missing = xp.floor(rest / MISSING)
        return rest - MISSING * missing, missing, groups


def _padded(parts: Sequence[Sequence[int]], nothing: int) -> Any:
    """Return the indices of each part as a row of an array, which is filled up with `nothing`."""
    width = max(1, *map(len, parts)) if parts else 1
    return np.array([[*part, *[nothing] * (width - len(part))] for part in parts], np.int64).reshape(-1, width)


def _summed(S: Any, sources: Any, xp: Any) -> Any:
    """Return for each row of `sources` the sum of the rows of S that it names."""
    count, width = sources.shape
    taken = xp.take(S, xp.reshape(sources, (-1,)), axis=0)
    return taken if width == 1 else xp.sum(xp.reshape(taken, (count, width, 3)), axis=1)
