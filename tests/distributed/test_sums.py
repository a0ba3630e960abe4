"""Sums that fail, or that are none; and layers that several functions share."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from assertions import fingerprint
from pieces import OPTIONS, Pieces, assert_models_close, groups_of, model, trained_whole
from processes import Ranks

from lars_array import LARS, RefusedElsewhereError


def untouched(table: Any) -> None:
    """The sum over one process, or over none that takes part."""


def averaging(pieces: Pieces, rank: int) -> Any:
    add = pieces.ranks.all_reduce(rank)

    def average(table: Any) -> None:
        add(table)
        table /= pieces.count

    return average


@pytest.mark.parametrize("kind", ["nothing", "average"])
def test_a_sum_that_is_none_shows_where_the_number_of_processes_is_known(kind: str) -> None:
    pieces = Pieces()

    def work(rank: int) -> None:
        add = averaging(pieces, rank) if kind == "average" else (lambda table: untouched(table))
        add.size = 3  # type: ignore[attr-defined]
        optimizer = LARS(pieces.params[rank], **OPTIONS, all_reduce=add)
        optimizer.step(pieces.cut(model(1), rank))

    before = fingerprint(pieces.params)
    outcomes = pieces.ranks.outcomes(work)
    message = "all_reduce must add over its 3 processes; got a sum over 1"
    assert [(type(x), str(x)) for x in outcomes] == [(RuntimeError, message)] * 3
    assert fingerprint(pieces.params) == before


def test_one_process_is_as_many_as_its_sum_has() -> None:
    theirs, whole = trained_whole(3)
    p = model(0)
    optimizer = LARS(groups_of(p), **OPTIONS, all_reduce=untouched)
    for seed in (1, 2, 3):
        optimizer.step(model(seed))
    assert_models_close(p, theirs, 1e-12)
    assert optimizer.norms() == whole.norms()


class Broken:
    """A sum that fails in one call, or leaves the table as it is."""

    def __init__(self, add: Any, call: int, *, silently: bool = False) -> None:
        self._add, self._call, self._silently = add, call, silently
        self.calls = 0

    def __call__(self, table: Any) -> None:
        self.calls += 1
        if self.calls != self._call:
            self._add(table)
        elif not self._silently:
            raise ConnectionError("a process was lost")


@pytest.mark.parametrize("call", [1, 2, 3, 4, 5])
def test_what_a_sum_raises_goes_through_and_nothing_was_changed(call: int) -> None:
    """In the comparison of the layers, or in the first or second sum of a step; then steps go on."""
    options = {"max_grad_norm": 0.5, "rule": "optax"}

    def make(params: Any, rank: int, all_reduce: Any) -> LARS:
        return LARS(groups_of(params), **OPTIONS, **options, all_reduce=Broken(all_reduce, call))

    pieces = Pieces(make=make)
    taken = 0
    for _ in range(3):
        before = fingerprint([pieces.params, pieces.optimizers])
        outcomes = pieces.outcomes(lambda r, x, grads: x.step(grads), model(taken + 1))
        if outcomes == [None] * 3:
            taken += 1
            continue
        assert [(type(x), str(x)) for x in outcomes] == [(ConnectionError, "a process was lost")] * 3
        assert not any(hasattr(x, "__notes__") for x in outcomes), "it is not called again"
        assert fingerprint([pieces.params, pieces.optimizers]) == before
    assert taken == 2
    assert_models_close(pieces.joined(), trained_whole(2, **options)[0], 1e-12)


def test_a_sum_that_was_not_completed_is_noticed() -> None:
    """As that of a library whose errors come later: the table is as it was."""

    def make(params: Any, rank: int, all_reduce: Any) -> LARS:
        return LARS(groups_of(params), **OPTIONS, all_reduce=Broken(all_reduce, 3, silently=True))

    pieces = Pieces(make=make)
    pieces.step(model(1))
    before = fingerprint([pieces.params, pieces.optimizers])
    outcomes = pieces.outcomes(lambda r, x, grads: x.step(grads), model(2))
    message = "all_reduce must add over all 3 processes; got a sum over 1"
    assert [(type(x), str(x)) for x in outcomes] == [(RuntimeError, message)] * 3
    assert fingerprint([pieces.params, pieces.optimizers]) == before
    pieces.step(model(2))
    assert_models_close(pieces.joined(), trained_whole(2)[0], 1e-12)


def test_a_refusal_that_can_not_be_told_is_raised_with_a_note() -> None:
    def fail(table: Any) -> None:
        raise ConnectionError("a process was lost")

    optimizer = LARS({"w": np.ones(2)}, **OPTIONS, all_reduce=fail)
    with pytest.raises(ValueError, match="the gradient of 'w' must have the parameter's shape") as caught:
        optimizer.step({"w": np.ones(3)})
    assert caught.value.__notes__ == ["the other processes could not be told: a process was lost"]


def two_functions(members: dict[str, tuple[int, ...]]) -> tuple[Ranks, list[Any], list[LARS]]:
    """Return optimizers of two groups, the layers of which different processes share; an empty group has no others."""
    ranks = Ranks(3)
    params: list[Any] = [
        {n: np.ones(2 + rank if rank in own else 0) for n, own in members.items()} for rank in range(ranks.count)
    ]

    def make(rank: int) -> LARS:
        shared = {n: ranks.all_reduce(rank, own) if rank in own else None for n, own in members.items()}
        groups = [{"params": {n: p}, "all_reduce": shared[n]} for n, p in params[rank].items()]
        return LARS(groups, **OPTIONS, max_grad_norm=0.5, rule="optax")

    return ranks, params, ranks.run(make)


def like(params: Any, value: float = 1.0) -> Any:
    return {name: np.full_like(p, value) for name, p in params.items()}


@pytest.mark.parametrize("rank", range(3))
def test_layers_shared_by_several_functions_are_decided_on_together(rank: int) -> None:
    ranks, params, optimizers = two_functions({"a": (0, 1, 2), "b": (2, 1, 0)})
    before = fingerprint(params)
    found = ranks.outcomes(lambda r: optimizers[r].step(like(params[r]), found_inf=float(r == rank)))
    assert found == [None] * 3 and [x.skipped_steps for x in optimizers] == [1] * 3
    outcomes = ranks.outcomes(lambda r: optimizers[r].step(like(params[r]) if r != rank else None))
    kinds = [TypeError if r == rank else RefusedElsewhereError for r in range(3)]
    assert list(map(type, outcomes)) == kinds
    outcomes = ranks.outcomes(lambda r: optimizers[r].step(like(params[r], np.nan if r == rank else 1.0)))
    assert all("the gradient of 'a'" in str(x) for x in outcomes)
    assert fingerprint(params) == before
    ranks.run(lambda r: optimizers[r].step(like(params[r])))
    theirs = like({"a": np.ones(9), "b": np.ones(9)})
    LARS(theirs, **OPTIONS, max_grad_norm=0.5, rule="optax").step(like(theirs))
    for n, whole in theirs.items():
        np.testing.assert_allclose(np.concatenate([own[n] for own in params]), whole, rtol=1e-12)


def test_a_process_between_two_sums_tells_the_members_of_both() -> None:
    ranks, params, optimizers = two_functions({"a": (0, 1), "b": (1, 2)})
    before = fingerprint(params)
    for count, first in enumerate((1, 0), start=1):
        found = ranks.outcomes(lambda r, first=first: optimizers[r].step(like(params[r]), found_inf=float(r == first)))
        assert found == [None] * 3 and [x.skipped_steps for x in optimizers] == [count] * 3
    outcomes = ranks.outcomes(lambda r: optimizers[r].step(like(params[r]) if r != 1 else None))
    assert list(map(type, outcomes)) == [RefusedElsewhereError, TypeError, RefusedElsewhereError]
    assert fingerprint(params) == before
    ranks.run(lambda r: optimizers[r].step(like(params[r])))
