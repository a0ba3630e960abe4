"""Where the rows of a step stand in the table that is added over processes, and what it says of their pieces."""

from __future__ import annotations

from typing import Any

import numpy as np

from lars_array._messages import shown
from lars_array.state.shards import Shards

__all__ = ["MISSING", "NUMBER", "TableLayout"]

# In the number that counts the pieces of a layer: a piece with a gradient, one without that is not empty, and the
# numbers of the groups of the first kind. Exact for 16,383 pieces.
PRESENT, MISSING, NUMBER = 1.0, 2.0**14, 2.0**28


class TableLayout:
    """Where the rows of a step stand in a table.

    Parameters
    ----------
    shards : Shards
        The layers of the table.
    numbers : int array
        The number of each row of the step among all rows of the model.
    """

    def __init__(self, shards: Shards, numbers: Any) -> None:
        layer_of, self.size = shards.rows[numbers], len(shards.layers)
        self.shards, self.rows = shards, len(numbers)
        self.own = np.flatnonzero(layer_of >= 0)
        self.layer = layer_of[self.own]
        self.unseen = np.setdiff1d(np.arange(self.size), self.layer)
        self.is_plain = np.array_equal(layer_of, np.arange(self.size))
        self._is_single = len(np.unique(self.layer)) == len(self.layer)
        counts = np.zeros(3 * (shards.table_rows - self.size - 2))
        is_present = np.zeros(len(shards.rows), bool)
        is_present[numbers] = True
        held = np.flatnonzero((shards.rows >= 0) & shards.filled)
        worth = np.where(is_present[held], PRESENT + NUMBER * shards.groups[held], MISSING)
        np.add.at(counts, shards.rows[held], worth)
        self.counts = counts.reshape(-1, 3)
        self.group = np.full(self.size, -1)  # of each layer, where it is known here
        self.group[shards.rows[held]] = shards.groups[held]
        self._agreed = b""

    def table(self, S: Any) -> Any:
        """Return a new table with the sums of the rows, and a header that is still to be written."""
        table = np.empty((self.shards.table_rows, 3))
        body = table[: self.size]
        if self.is_plain:
            body[...] = S
        elif self._is_single:
            body[...] = 0
            body[self.layer] = S[self.own]
        else:
            for column in range(3):
                body[:, column] = np.bincount(self.layer, S[self.own, column], self.size)
        table[self.size : -2] = self.counts
        return table

    def sums(self, table: Any, S: Any) -> Any:
        """Return the sums of all rows: those of whole layers as they are in S, the others from the table."""
        if self.is_plain:
            return table[: self.size]
        S = S.copy()
        S[self.own] = table[self.layer]
        return S

    def check_pieces(self, table: Any) -> None:
        """Raise ValueError unless all pieces of each layer, or none, have a gradient, and are in one group."""
        numbers = table[self.size : -2]
        now = numbers.tobytes()
        if now == self._agreed:
            return
        present, missing, groups = self.counted(numbers)
        torn = (missing > 0) & (present > 0)
        if torn.any():
            raise ValueError(
                f"the gradient of {shown(self.shards.layers[torn.argmax()])} must be given by all processes that hold "
                "a piece of it, or by none; nothing was changed"
            )
        # A process that holds nothing of a layer sees other groups by a mean that is no number of a group.
        strange = (present > 0) & (groups % np.maximum(present, 1) != 0)
        strange |= (self.group >= 0) & (present > 0) & (groups != present * self.group)
        if strange.any():
            raise ValueError(
                f"{shown(self.shards.layers[strange.argmax()])} must be in the same parameter group on all processes; "
                "nothing was changed"
            )
        self._agreed = now

    def counted(self, numbers: Any) -> tuple[Any, Any, Any]:
        """Return for each layer its pieces with a gradient, those without, and the sum of the numbers of groups."""
        flat = numbers.reshape(-1)[: self.size]
        groups, rest = np.divmod(flat, NUMBER)
        missing, present = np.divmod(rest, MISSING)
        return present, missing, groups

    def strange_layers(self, table: Any, layers: Any) -> list[tuple[int, int]]:
        """Return those of `layers` with sums that are not finite, each with the number of its group."""
        bad = layers[~np.isfinite(table[layers]).all(axis=1)]
        if not len(bad):
            return []
        present, _, groups = self.counted(table[self.size : -2])
        return [(int(layer), int(groups[layer] / max(present[layer], 1))) for layer in bad]
