"""What processes have agreed on is kept with the function that adds over them: `update` has no optimizer."""

from __future__ import annotations

import functools
import gc
from typing import Any

import numpy as np
import pytest
from processes import Ranks

from lars_array import RefusedElsewhereError, init, update
from lars_array.state import sharing


class Communicator:
    """An object with a method; `fresh` makes other kinds of functions that are another one in each call."""

    def __init__(self, add: Any) -> None:
        self.add = add

    def all_reduce(self, table: Any) -> None:
        self.add(table)


@pytest.mark.parametrize(("kind", "comparisons"), [("function", 1), ("method", 1), ("lambda", 4), ("partial", 4)])
def test_layers_are_compared_once_a_function(kind: str, comparisons: int) -> None:
    ranks = Ranks(2)

    def work(rank: int) -> None:
        comm = Communicator(ranks.all_reduce(rank))
        known = {
            "function": lambda: comm.add,
            "method": lambda: comm.all_reduce,
            "lambda": lambda: lambda table: comm.add(table),
            "partial": lambda: functools.partial(comm.add),
        }[kind]
        p = {"w": np.ones(2)}
        state = init(p)
        for _ in range(4):
            p, state = update(p, p, state, lr=0.1, all_reduce=known())
        gc.collect()

    ranks.run(work)
    assert [shape for shape in ranks.sum_over().shapes if shape == (3, 3)] == [(3, 3)] * comparisons
    assert ranks.calls == comparisons + 4


def test_two_models_may_share_a_function() -> None:
    ranks = Ranks(2)

    def work(rank: int) -> None:
        add, models = ranks.all_reduce(rank), [{"w": np.ones(2)}, {f"v{i}": np.ones(2) for i in range(7)}]
        states = [init(p) for p in models]
        for k in (0, 1, 1, 0, 1, 0):
            models[k], states[k] = update(models[k], models[k], states[k], lr=0.1, all_reduce=add)
        if rank:
            with pytest.raises(ValueError, match="empty"):  # told with the layers of the last update
                update({}, 3, states[0], lr=0.1, all_reduce=add)
        else:
            with pytest.raises(RefusedElsewhereError):
                update(models[0], models[0], states[0], lr=0.1, all_reduce=add)

    ranks.run(work)
    assert ranks.calls == 2 + 7


def test_nothing_of_a_function_is_kept() -> None:
    gc.collect()
    before = len(sharing._agreed)
    p = {"w": np.ones(2)}
    for _ in range(3):
        update(p, p, init(p), lr=0.1, all_reduce=lambda table: None)
    gc.collect()
    assert len(sharing._agreed) == before and not sharing._kept


def test_an_update_that_is_traced_is_refused() -> None:
    jax = pytest.importorskip("jax")
    p = {"w": jax.numpy.ones(3)}
    state, calls = init(p), []

    @jax.jit
    def step(p: Any, state: Any) -> Any:
        return update(p, p, state, lr=0.1, all_reduce=calls.append)

    with pytest.raises(TypeError, match=r"all_reduce can't be called in an update that is traced; lars_jax\.lars adds"):
        step(p, state)
    update(p, p, state, lr=0.1, all_reduce=lambda table: None)


def test_arguments_are_checked() -> None:
    p = {"w": np.ones(2)}
    wrong: Any = 3
    for call in (lambda: init(p, all_reduce=wrong), lambda: update(p, p, init(p), lr=0.1, all_reduce=wrong)):
        with pytest.raises(TypeError, match="all_reduce must be a function that adds an array over processes; got 3"):
            call()
    with pytest.raises(ValueError, match="layers must be None without an all_reduce"):
        update(p, p, init(p), lr=0.1, layers=["w"])
    with pytest.raises(ValueError, match="layers must name all layers of all processes; it lacks 'w'"):
        update(p, p, init(p), lr=0.1, layers=["v"], all_reduce=lambda table: None)
