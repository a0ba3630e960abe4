"""The sums of one step, added over all processes, and all that these have to agree on.

A step that one process refuses or skips is refused or skipped by all, and nobody waits for one that has given up: what
decides it travels with the sums. A table of L layers has L rows of sums, then a number for each layer that counts its
pieces, three in a row, and two rows more: [processes, refusals, found_inf] and [squares of gradients, whole layers that
are not finite, digest of the hyper-parameters].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np

from lars_array._arrays import asarray, is_on_accelerator, to_floats
from lars_array._messages import shown
from lars_array.core import resolve, sum_over_parts
from lars_array.hyperparams import row_values
from lars_array.state.shards import BITS, RefusedElsewhereError, Shards, digest

__all__ = ["Exchange", "SkippedError"]

# In the number that counts the pieces of a layer: a piece with a gradient, and one without that is not empty.
PRESENT, MISSING = 1.0, 2.0**20


class SkippedError(Exception):
    """A step is skipped on all processes."""


class Exchange:
    """The sums of a step over all processes, for the rows that have a gradient here.

    Parameters
    ----------
    shards : sequence of Shards
        The layers that are shared.
    numbers : sequence of int
        The number of each row of the step among all rows of the model.
    joined : sequence of sequences of int
        The rows of the step that are parts of one layer.
    """

    def __init__(self, shards: Sequence[Shards], numbers: Any, joined: Sequence[Sequence[int]]) -> None:
        self.xp, self._like, self._joined = shards[0].xp, shards[0].like, joined
        numbers = np.array(numbers, np.int64)
        counted = np.logical_and.reduce([shard.counted | (shard.rows < 0) for shard in shards])[numbers]
        whole = np.logical_and.reduce([shard.rows < 0 for shard in shards])[numbers]
        self._weights = asarray(counted.tolist(), self.xp.float64, like=self._like, xp=self.xp)
        self._counted = None if counted.all() else asarray(counted[:, None].tolist(), like=self._like, xp=self.xp)
        self._whole = asarray(whole.tolist(), self.xp.bool, like=self._like, xp=self.xp) if whole.any() else None
        self._parts: list[tuple[Shards, Any, Any, Any, Any]] = []
        for shard in shards:
            rows = shard.rows[numbers]
            own = np.flatnonzero(rows >= 0)
            gather = np.full(len(shard.layers), len(numbers))  # a row of zeros, for layers without a gradient here
            gather[rows[own]] = own
            unseen = asarray((gather == len(numbers)).tolist(), self.xp.bool, like=self._like, xp=self.xp)
            place = np.arange(len(numbers))
            place[own] = len(numbers) + rows[own]
            index = (asarray(x.tolist(), self.xp.int64, like=self._like, xp=self.xp) for x in (gather, place))
            self._parts.append((shard, *index, _piece_counts(shard, numbers), unseen))
        self._digest: tuple[Any, int] = None, 0
        self.refused: Any = None  # on a device, whether a process refused the step
        self.found_inf: Any = None  # on a device, the sum of all
        self.elsewhere = ""  # what is not finite, but not here
        self._policy, self._found = "propagate", 0.0
        self._count, self._left, self._last = 1, 1, (None, None)

    def prepare(self, groups: Sequence[Mapping[str, Any]], found_inf: Any) -> Exchange:
        """Take over the hyper-parameters of this step, and its `found_inf` as a number or an array on the device."""
        if self._digest[0] is not groups:
            self._digest = groups, _digest_of(groups)
            policies = {group["nonfinite"] for group in groups}
            self._policy = next(x for x in ("raise", "skip", "propagate") if x in policies)
            self._count = _count_of_sums(groups)
        self._left = self._count
        self._found, self.elsewhere = 0.0 if found_inf is None else found_inf, ""
        self.refused = self.found_inf = None
        return self

    def __call__(self, S: Any, factors: Any) -> tuple[Any, Any]:
        """Add the sums over all processes.

        Parameters
        ----------
        S : array of shape (rows, 3)
            The sums of the pieces that are here.
        factors : array of shape (rows,)
            `rescale_grad` of each row.

        Returns
        -------
        tuple (S, squares)
            The sums of whole layers; and the square of the norm of all gradients of the model, rescaled.

        Raises
        ------
        RefusedElsewhereError, RuntimeError, ValueError, NonFiniteError, SkippedError
            On all processes, if one of them refuses or skips the step. On a device nothing is raised: see `refused`.
        """
        xp, self._last = self.xp, (S, factors)
        self._left -= 1
        S = S if self._counted is None else xp.where(self._counted, S, 0.0)
        squares = xp.where(self._weights > 0, factors**2 * S[:, 1], 0.0)
        here = xp.zeros_like(self._like[0]) if self._whole is None else xp.sum(xp.where(self._whole, squares, 0.0))
        bad = here * 0.0
        if self._whole is not None:
            bad = xp.sum(xp.astype(self._whole & ~xp.all(xp.isfinite(S), axis=1), xp.float64))
        S, total = sum_over_parts(S, self._joined, xp), here
        for k, (shard, gather, place, counts, unseen) in enumerate(self._parts):
            shard.agree()
            is_own = self._counted_of(k)
            own = total if shard.of_norms else xp.sum(squares if is_own is None else xp.where(is_own, squares, 0.0))
            numbers = [1.0, 0.0, self._found, own, bad, float(self._digest[1])]
            header = xp.stack([asarray(x, xp.float64, like=self._like, xp=xp) for x in numbers])
            zero = asarray([[0.0] * 3], xp.float64, like=self._like, xp=xp)
            body = xp.take(xp.concat([S, zero], axis=0), gather, axis=0)
            table = xp.concat([body, counts, xp.reshape(header, (2, 3))], axis=0)
            shard.add(table)
            self._decide(shard, table, unseen)
            total = table[-1, 0] if shard.of_norms else total + table[-1, 0]
            S = xp.take(xp.concat([S, table[: len(shard.layers), :]], axis=0), place, axis=0)
        return S, total

    def complete(self) -> None:
        """Add sums as often as other processes do, which may have rules that need them twice."""
        while self._left > 0:
            self(*self._last)

    def _counted_of(self, k: int) -> Any:
        """Return which rows are those of a part; None for all."""
        if len(self._parts) == 1 and self._whole is None:
            return None
        _, _, place, *_ = self._parts[k]
        return place >= self._weights.shape[0]

    def _decide(self, shard: Shards, table: Any, unseen: Any) -> None:
        """Raise on all processes, if one of them refuses or skips the step."""
        xp, size = self.xp, len(shard.layers)
        pieces = xp.reshape(table[size:-2, :], (-1,))[:size]
        missing = pieces >= MISSING
        torn = missing & (pieces - xp.floor(pieces / MISSING) * MISSING >= PRESENT)
        if is_on_accelerator(table):
            self._note(shard, table, xp.any(torn))
            return
        (processes, refusals, found_inf), (_, bad, digest) = (to_floats(table[i, :]) for i in (-2, -1))
        count = shard.processes
        if processes != count:
            raise RuntimeError(f"all_reduce must add over all {count} processes; got a sum over {processes:g}")
        if refusals:
            raise RefusedElsewhereError(f"{refusals:g} of {count} processes refused the step; nothing was changed")
        if digest != count * self._digest[1]:
            raise ValueError(
                "hyper-parameters must be the same on all processes, such as a learning rate that follows a loss; "
                "nothing was changed"
            )
        if found_inf != 0:
            raise SkippedError
        if bool(xp.any(torn)):
            name = shard.layers[int(xp.argmax(xp.astype(torn, xp.int64)))]
            raise ValueError(
                f"the gradient of {shown(name)} must be given by all processes that hold a piece of it, or by none; "
                "nothing was changed"
            )
        if self._policy == "propagate":
            return
        strange = unseen & ~xp.all(xp.isfinite(table[:size, :]), axis=1)
        if bool(xp.any(strange)):
            self.elsewhere = shown(shard.layers[int(xp.argmax(xp.astype(strange, xp.int64)))])
        elif bad:
            self.elsewhere = f"a layer of {bad:g} of {count} processes"
        if self.elsewhere and self._policy == "skip":
            raise SkippedError

    def _note(self, shard: Shards, table: Any, torn: Any) -> None:
        """Note on the device what the host would raise."""
        refused = torn | (table[-2, 0] != shard.processes) | (table[-2, 1] != 0)
        refused = refused | (table[-1, 2] != shard.processes * float(self._digest[1]))
        self.refused = refused if self.refused is None else self.refused | refused
        self.found_inf = table[-2, 2] if self.found_inf is None else self.found_inf + table[-2, 2]


def _piece_counts(shard: Shards, numbers: Any) -> Any:
    """Return the numbers that count the pieces of each layer here, in rows of three."""
    counts = np.zeros(3 * shard.count_rows)
    is_present = np.zeros(len(shard.rows), bool)
    is_present[numbers] = True
    for row in np.flatnonzero((shard.rows >= 0) & shard.filled):
        counts[shard.rows[row]] += PRESENT if is_present[row] else MISSING
    flat = asarray(counts.tolist(), shard.xp.float64, like=shard.like, xp=shard.xp)
    return shard.xp.reshape(flat, (shard.count_rows, 3))


def _count_of_sums(groups: Sequence[Mapping[str, Any]]) -> int:
    """Return how often a step adds sums over processes: twice if the third is of clipped gradients."""
    clips = any(group["max_grad_norm"] is not None for group in groups)
    return 1 + (clips and any(resolve(group["rule"]).norm_of != "gradient" for group in groups))


def _digest_of(groups: Sequence[Mapping[str, Any]]) -> int:
    """Return a number of 40 bits for hyper-parameters; those on a device, which the host can't read, are not in it."""
    known: list[Any] = []
    for group in groups:
        known.append([float(x) if isinstance(x, Real) else None for x in row_values(group)])
        rule = resolve(group["rule"])
        known.append([group["nonfinite"], rule.norm_of, getattr(rule.function, "__qualname__", "")])
    first, second, _ = digest(known)
    return (first << BITS) + second
