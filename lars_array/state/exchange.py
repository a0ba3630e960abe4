"""The sums of one step, added over all processes, and all that these have to agree on.

A step that one process refuses or skips is refused or skipped by all, and nobody waits for one that has given up: what
decides it travels with the sums. A table of L layers has L rows of sums, then a number for each layer that counts its
pieces, three in a row, and two rows more: [processes, refusals, found_inf] and [squares of gradients, whole layers that
are not finite, digest of the hyper-parameters].

Each process knows whether the sums of all layers are finite. Whether coefficients are, which they are where sums and
hyper-parameters are no extremes, only those know that have a row of the layer, of which an empty array is enough.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
from array_api_compat import array_namespace

from lars_array._arrays import asarray, to_floats
from lars_array._messages import shown
from lars_array.core import resolve, sum_over_parts
from lars_array.hyperparams import can_be_read, row_values
from lars_array.nonfinite import NonFiniteError
from lars_array.state.shards import BITS, RefusedElsewhereError, Shards, SkippedError, digest
from lars_array.state.table_layout import TableLayout

__all__ = ["RAISES", "WORTH", "Exchange", "on_host"]

RAISES = 2.0**20
# What a layer that is not finite adds to the number that is sent of them, by the policy of its group.
WORTH = {"propagate": 0.0, "skip": 1.0, "raise": RAISES}


class Exchange:
    """The sums of a step over all processes, for the rows that have a gradient here; all arithmetic is on the host.

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
        self._numbers = numbers = np.array(numbers, np.int64)
        self.layouts = [TableLayout(shard, numbers) for shard in shards]
        self.counted = np.logical_and.reduce([shard.counted | (shard.rows < 0) for shard in shards])[numbers]
        self.whole = np.flatnonzero(np.logical_and.reduce([shard.rows < 0 for shard in shards])[numbers])
        self.group_of = shards[0].groups[numbers]
        self.joined = [rows for rows in joined if rows[0] in self.whole]  # those of shared layers the table adds
        self.digest, self.clips = 0, False
        self.found: Any = 0.0
        self.policies: list[str] = []
        self._groups: Any = None
        self._count, self.left = 1, 1
        self._last: tuple[Any, Any] = None, None
        self.elsewhere, self._is_skipped = "", False  # what is not finite, and has no row here

    def prepare(self, groups: Sequence[Mapping[str, Any]], found_inf: Any) -> Exchange:
        """Take over the hyper-parameters of this step, and its `found_inf` as a number or an array on the device."""
        if self._groups is not groups:
            self._groups, self.digest = None, _digest_of(groups)
            self.policies = [group["nonfinite"] for group in groups]
            self.clips = any(group["max_grad_norm"] is not None for group in groups)
            reads_third = any(resolve(group["rule"]).norm_of != "gradient" for group in groups)
            self._count = 2 if self.clips and reads_third else 1  # the third sum is of clipped gradients
            self._groups = groups  # last: what was interrupted is done again
        self.left, self.found = self._count, 0.0 if found_inf is None else found_inf
        self.elsewhere, self._is_skipped = "", False
        return self

    def __call__(self, S: Any, factors: Any) -> tuple[Any, Any]:
        """Add the sums over all processes.

        Parameters
        ----------
        S : array of shape (rows, 3)
            The sums of the pieces that are here.
        factors : array of shape (rows,), or None
            `rescale_grad` of each row; needed where gradients are clipped.

        Returns
        -------
        tuple (S, squares)
            The sums of whole layers; and the square of the norm of all gradients of the model, rescaled, or 0 where
            nothing is clipped.

        Raises
        ------
        RefusedElsewhereError, RuntimeError, ValueError, SkippedError
            On all processes, if one of them refuses or skips the step.
        """
        self._last, self.left = (S, factors), self.left - 1
        own = on_host(S)
        sent = own if self.counted.all() else np.where(self.counted[:, None], own, 0.0)
        squares = on_host(factors) ** 2 * sent[:, 1] if self.clips else np.zeros(len(own))
        total = squares[self.whole].sum()
        result, is_skipped = sum_over_parts(own, self.joined, np), False
        bad = self._bad_layers(own)
        added_before: list[tuple[TableLayout, Any]] = []
        for layout in self.layouts:
            shards = layout.shards
            shards.agree()
            table = layout.table(sent)
            table[-2] = 1.0, 0.0, self.found
            own_squares = total if shards.of_norms else squares[layout.own].sum()
            if shards.of_norms:  # processes that hold none of these layers have to know of them too
                bad += sum((self._bad_shared_layers(*before) for before in added_before), 0.0)
            table[-1] = own_squares if self.clips else 0.0, bad, self.digest
            added = shards.table(table)
            shards.add(added)
            table = on_host(added)
            try:
                self._decide(layout, table)
            except SkippedError:
                is_skipped, self.found = True, 1.0  # processes that share other layers skip it as well
            added_before.append((layout, table))
            shards.is_awaited = self.left > 0 and not is_skipped
            if not shards.are_copies_checked:
                self._check_copies(layout, own, table)
            total = table[-1, 0] if shards.of_norms else total + table[-1, 0]
            result = layout.sums(table, result)
        if is_skipped:
            raise SkippedError
        if self.clips and np.isnan(total):  # and with it the steps of all layers that are clipped
            for group in self._groups:
                if group["max_grad_norm"] is not None:
                    self._prevent(group["nonfinite"], "the norm of all gradients")
        return _as(result, S), _as(np.asarray(total), S)

    def _check_copies(self, layout: TableLayout, S: Any, table: Any) -> None:
        """Raise, at the first step, if processes that should hold the same piece hold others."""
        shards = layout.shards
        shards.are_copies_checked = True
        everywhere = shards.table(layout.table(S / shards.copies[self._numbers][:, None]))
        shards.all_reduce(everywhere)
        sums = on_host(everywhere)[: layout.size]
        is_same = np.isclose(sums, table[: layout.size], rtol=1e-6, atol=0, equal_nan=True)
        if not is_same.all():
            name = shown(shards.layers[(~is_same).any(axis=1).argmax()])
            raise ValueError(f"{name} must be the same on processes that hold copies of it; nothing was changed")

    def complete(self) -> None:
        """Add sums as often as other processes do, which may have rules that need them twice."""
        while self.left > 0:
            self(*self._last)

    def check_finite(self) -> bool:
        """Return whether layers without a row here have the step skipped; raise if they have it refused."""
        if self.elsewhere:
            raise NonFiniteError(f"{self.elsewhere} is not finite on another process; nothing was changed")
        return self._is_skipped

    def _prevent(self, policy: str, what: str) -> None:
        """Note that something without a row here is not finite."""
        self._is_skipped = self._is_skipped or policy == "skip"
        if policy == "raise":
            self.elsewhere = self.elsewhere or what

    def _bad_layers(self, S: Any) -> float:
        """Return the number of whole layers that are not finite, as `RAISES` and ones."""
        if not len(self.whole) or np.isfinite(S[self.whole]).all():
            return 0.0
        return sum(WORTH[self.policies[self.group_of[i]]] for i in self.whole if not np.isfinite(S[i]).all())

    def _bad_shared_layers(self, layout: TableLayout, table: Any) -> float:
        """Return the number of layers in a table that are not finite, as `_bad_layers` does."""
        found = layout.strange_layers(table, np.arange(layout.size))
        return sum((WORTH[self.policies[group]] for _, group in found), 0.0)

    def _decide(self, layout: TableLayout, table: Any) -> None:
        """Raise on all processes, if one of them refuses or skips the step."""
        count = layout.shards.processes
        processes, refusals, found_inf, _, bad, digest = table[-2:].ravel().tolist()
        if processes != count:
            raise RuntimeError(f"all_reduce must add over all {count} processes; got a sum over {processes:g}")
        if refusals:
            raise RefusedElsewhereError(f"{refusals:g} of {count} processes refused the step; nothing was changed")
        if digest != count * self.digest:
            raise ValueError(
                "hyper-parameters must be the same on all processes, such as a learning rate that follows a loss; "
                "nothing was changed"
            )
        if found_inf != 0:
            raise SkippedError
        layout.check_pieces(table)
        if set(self.policies) == {"propagate"}:
            return
        for layer, group in layout.strange_layers(table, layout.unseen) if len(layout.unseen) else ():
            self._prevent(self.policies[group], shown(layout.shards.layers[layer]))
        if bad > 0:
            self._prevent("raise" if bad >= RAISES else "skip", "a whole layer")


def on_host(x: Any) -> Any:
    """Return an array of any library as NumPy's, in float64."""
    if isinstance(x, np.ndarray):
        return x
    flat = to_floats(array_namespace(x).reshape(x, (-1,)))
    return np.array(flat).reshape(tuple(x.shape))


def _as(x: Any, like: Any) -> Any:
    """Return a NumPy array as one of the library and type of another."""
    return x if isinstance(like, np.ndarray) else asarray(x, like.dtype, like=like, xp=array_namespace(like))


def _digest_of(groups: Sequence[Mapping[str, Any]]) -> int:
    """Return a number of 40 bits for hyper-parameters; those on a device, which the host can't read, are not in it."""
    known: list[Any] = []
    for group in groups:
        known.append([float(x) if isinstance(x, Real) or can_be_read(x) else None for x in row_values(group)])
        rule = resolve(group["rule"])
        known.append([group["nonfinite"], rule.norm_of, getattr(rule.function, "__qualname__", "")])
    first, second, _ = digest(known)
    return (first << BITS) + second
