"""What the processes compare before the first step, and sums that fail."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from assertions import assert_refused, fingerprint
from pieces import OPTIONS, Pieces, groups_of, model
from processes import Ranks

from lars_array import LARS, RefusedElsewhereError
from lars_array.state.shards import digest

NAMES: dict[str, Callable[[int], list[str]]] = {
    "another name": lambda rank: ["a", "b", "c" if rank else "d"],
    "another order": lambda rank: ["a", "b", "c"] if rank else ["a", "c", "b"],
    "one less": lambda rank: ["a", "b", "c"][: 3 - rank // 2],
    "all different": lambda rank: [f"{rank}{k}" for k in range(10)],
    "many more": lambda rank: [str(k) for k in range(1000 if rank == 1 else 3)],
}


@pytest.mark.parametrize("kind", NAMES)
def test_layers_that_differ_are_refused_in_a_message_of_fixed_size(kind: str) -> None:
    ranks = Ranks(3)

    def work(rank: int) -> None:
        params = {name: np.ones(2) for name in NAMES[kind](rank)}
        optimizer = LARS(params, **OPTIONS, all_reduce=ranks.all_reduce(rank))
        optimizer.step({name: np.ones(2) for name in params})

    outcomes = ranks.outcomes(work)
    start = "the layers must be the same on all 3 processes, in the same order; here they are "
    assert all(type(x) is ValueError and str(x).startswith(start) for x in outcomes), outcomes
    first = NAMES[kind](0)
    assert str(outcomes[0]) == f"{start}{len(first)}, the first {', '.join(map(repr, first[:5]))}"
    assert ranks.sum_over().shapes == [(3, 3)]


def test_a_list_of_layers_has_to_be_the_same_too() -> None:
    ranks = Ranks(2)

    def work(rank: int) -> None:
        layers = ["a", "b"] if rank else ["b", "a"]
        LARS({"b": np.ones(2)}, **OPTIONS, layers=layers, all_reduce=ranks.all_reduce(rank)).step({"b": np.ones(2)})

    assert [type(x) for x in ranks.outcomes(work)] == [ValueError] * 2


def test_digests_differ_by_order_and_by_name() -> None:
    assert digest(("a", "b")) != digest(("b", "a")) != digest(("ba",))
    assert all(0 <= part < 2**20 for part in digest(("a",)))


@pytest.mark.parametrize("others", [(0,), (0, 2)])
def test_a_layer_has_to_be_in_one_group(others: tuple[int, ...]) -> None:
    pieces = Pieces(make=lambda params, rank, f: LARS(groups_of(params), **OPTIONS, all_reduce=f))
    moved = {"w": 1}

    def work(r: int, optimizer: LARS, grads: Any) -> None:
        optimizer.step(grads)

    def make(params: Any, rank: int, all_reduce: Any) -> LARS:
        second = {n: p for n, p in params.items() if n in ("b", "s") or (rank in others and n in moved)}
        first = {n: p for n, p in params.items() if n not in second}
        order = [{"params": first}, {"params": second, "lr": 0.05}]
        return LARS(order, **OPTIONS, layers=sorted(params), all_reduce=all_reduce)

    pieces = Pieces(make=make)
    before = fingerprint(pieces.params)
    outcomes = pieces.outcomes(work, model(1))
    message = "'w' must be in the same parameter group on all processes; nothing was changed"
    assert [(type(x), str(x)) for x in outcomes] == [(ValueError, message)] * 3
    assert fingerprint(pieces.params) == before


def untouched(table: Any) -> None:
    """The sum over one process, or over none that takes part."""


def test_arguments_are_checked() -> None:
    p = {"w": np.ones(2), "b": np.ones(1)}
    calls: list[tuple[Callable[[], Any], type[Exception], str]] = [
        (
            lambda: LARS(p, lr=0.1, all_reduce=3),  # type: ignore[arg-type]
            TypeError,
            "all_reduce must be a function that adds an array over processes; got 3",
        ),
        (lambda: LARS(p, lr=0.1, layers=["w", "b"]), ValueError, "layers must be None without an all_reduce; got ("),
        (
            lambda: LARS(p, lr=0.1, layers="wb", all_reduce=untouched),
            TypeError,
            "layers must be a list of names; got 'wb'",
        ),
        (
            lambda: LARS(p, lr=0.1, layers=["w"], all_reduce=untouched),
            ValueError,
            "layers must name all layers of all processes; it lacks 'b'",
        ),
        (
            lambda: LARS(p, lr=0.1, layers=["w", "b", "w"], all_reduce=untouched),
            ValueError,
            "layers must name each layer once; 2 of 3 names differ",
        ),
        (
            lambda: LARS(
                [{"params": {"w": p["w"]}, "all_reduce": untouched}, {"params": {"b": p["b"]}}],
                lr=0.1,
                layer_of={"w": "x", "b": "x"},
            ),
            ValueError,
            "all parts of a layer must have the same all_reduce; those of 'x' differ",
        ),
    ]
    for call, kind, message in calls:
        with pytest.raises(kind) as caught:
            call()
        assert type(caught.value) is kind and str(caught.value).startswith(message), caught.value
    optimizer = LARS(p, **OPTIONS, all_reduce=untouched)
    added = {"params": {"c": np.ones(2)}, "all_reduce": 3}
    message = "all_reduce must be a function that adds an array over processes; got 3"
    assert_refused(lambda: optimizer.add_param_group(added), TypeError, message, optimizer, p)
    assert issubclass(RefusedElsewhereError, RuntimeError)
