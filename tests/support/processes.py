"""Threads that play the processes of a program, with a sum over them as `all_reduce`.

Ranks run the same function at the same time. One that ends without taking part in a sum that others wait for makes
these fail at once, and nothing waits longer than `SECONDS`: a test can fail, not hang.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from array_api_compat import array_namespace
from assertions import to_numpy

SECONDS = 20.0


class LeftAloneError(Exception):
    """A rank waits for others that have ended, or don't come."""


class Sum:
    """A sum over some ranks, `all_reduce` of each of them: in the order of the ranks, the same bits for all.

    Parameters
    ----------
    members : sequence of int
        The ranks.
    changed : threading.Condition
        Notified when a rank comes or ends.
    ended : set of int
        The ranks that have ended.
    """

    def __init__(self, members: Sequence[int], changed: threading.Condition, ended: set[int]) -> None:
        self.members, self._changed, self._ended = list(members), changed, ended
        self.calls = dict.fromkeys(members, 0)
        self.shapes: list[tuple[int, ...]] = []  # of each call
        self._tables: list[dict[int, Any]] = []
        self._totals: list[Any] = []

    def add(self, rank: int, table: Any) -> None:
        """Add a table over all members, in place."""
        own = np.array(to_numpy(table))
        with self._changed:
            number, self.calls[rank] = self.calls[rank], self.calls[rank] + 1
            if number == len(self._tables):
                self._tables.append({})
                self._totals.append(None)
                self.shapes.append(own.shape)
            assert own.dtype == np.float64, f"a table of {own.dtype} was sent"
            tables = self._tables[number]
            tables[rank] = own
            if len(tables) == len(self.members):
                self._totals[number] = self._total([tables[member] for member in self.members])
                tables.clear()
                self._changed.notify_all()
            self._wait(number, tables)
            total = self._totals[number]
        if isinstance(total, Exception):
            raise total
        table[...] = total if isinstance(table, np.ndarray) else _like(table, total)

    def _total(self, tables: list[Any]) -> Any:
        shapes = {x.shape for x in tables}
        if len(shapes) > 1:
            return AssertionError(f"tables of different sizes were sent: {sorted(shapes)}")
        with np.errstate(all="ignore"):
            return np.sum(tables, axis=0)

    def _wait(self, number: int, tables: dict[int, Any]) -> None:
        def is_over() -> bool:
            gone = any(member in self._ended and member not in tables for member in self.members)
            return self._totals[number] is not None or gone

        if not self._changed.wait_for(is_over, SECONDS) or self._totals[number] is None:
            lacking = [member for member in self.members if member not in tables]
            raise LeftAloneError(f"the ranks {lacking} take no part in sum {number}")


class Ranks:
    """The ranks of one program."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._changed = threading.Condition()
        self._ended: set[int] = set()
        self._sums: dict[tuple[int, ...], Sum] = {}

    def sum_over(self, members: Sequence[int] | None = None) -> Sum:
        """Return the sum over some ranks, by default over all."""
        key = tuple(range(self.count) if members is None else members)
        return self._sums.setdefault(key, Sum(key, self._changed, self._ended))

    @property
    def calls(self) -> int:
        """How often each rank has taken part in the sum over all; raises where that differs."""
        found = set(self.sum_over().calls.values())
        assert len(found) == 1, f"calls by rank: {self.sum_over().calls}"
        return found.pop()

    def all_reduce(self, rank: int, members: Sequence[int] | None = None) -> Callable[[Any], None]:
        """Return the `all_reduce` of a rank; each call makes another function."""
        own = self.sum_over(members)

        def all_reduce(table: Any) -> None:
            own.add(rank, table)

        return all_reduce

    def outcomes(self, work: Callable[[int], Any]) -> list[Any]:
        """Call ``work(rank)`` on all ranks at once; return what each returns or raises."""
        outcomes: list[Any] = [None] * self.count

        def call(rank: int) -> None:
            try:
                outcomes[rank] = work(rank)
            except BaseException as error:
                outcomes[rank] = error
            finally:
                with self._changed:
                    self._ended.add(rank)
                    self._changed.notify_all()

        self._ended.clear()
        threads = [threading.Thread(target=call, args=(rank,), daemon=True) for rank in range(self.count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return outcomes

    def run(self, work: Callable[[int], Any]) -> list[Any]:
        """Call ``work(rank)`` on all ranks at once; return the results, or raise the first error that is a cause."""
        outcomes = self.outcomes(work)
        errors = [x for x in outcomes if isinstance(x, BaseException)]
        errors.sort(key=lambda error: isinstance(error, LeftAloneError))
        if errors:
            raise errors[0]
        return outcomes


def _like(table: Any, total: Any) -> Any:
    """Return NumPy's array as one of the library and on the device of `table`."""
    return array_namespace(table).asarray(total, device=table.device)
