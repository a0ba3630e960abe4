"""The memory that a model of many small arrays takes beside its numbers: a few hundred bytes an array."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from lars_array import LARS

COUNT, SIZE = 10_000, 100
PROMISE = (1 << 20) + 600 * COUNT
LOADED = (1 << 19) + 100 * COUNT
OPTIONS: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4, "kernel": "compiled"}


def arrays(count: int) -> list[Any]:
    return [np.ones(SIZE, np.float32) for _ in range(count)]


def named(values: list[Any]) -> dict[str, Any]:
    return {f"layer{i}.weight": x for i, x in enumerate(values)}


FORMS: dict[str, Callable[[list[Any]], Any]] = {"list": list, "mapping": named, "pairs": lambda x: [*named(x).items()]}


def peak(form: Callable[[list[Any]], Any], **options: Any) -> int:
    """Return the most bytes that an optimizer takes, from when it is built to its third step, but for momentum."""
    LARS(form(arrays(20)), **OPTIONS | options).step(form(arrays(20)))  # for what is kept once a process
    params, grads = form(arrays(COUNT)), form(arrays(COUNT))
    tracemalloc.start()
    try:
        optimizer = LARS(params, **OPTIONS | options)
        for _ in range(3):
            optimizer.step(grads)
        return tracemalloc.get_traced_memory()[1] - 4 * SIZE * COUNT
    finally:
        tracemalloc.stop()


def test_a_loaded_state_takes_as_little() -> None:
    optimizer, grads = LARS(arrays(COUNT), **OPTIONS), arrays(COUNT)
    optimizer.step(grads)
    state = optimizer.state_dict()
    tracemalloc.start()
    try:
        optimizer.load_state_dict(state)
        kept = tracemalloc.get_traced_memory()[0] - 4 * SIZE * COUNT
    finally:
        tracemalloc.stop()
    assert kept < LOADED, f"{kept / COUNT:.0f} bytes an array"


@pytest.mark.parametrize("options", [{}, {"nonfinite": "propagate"}, {"max_grad_norm": 1.0}], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_many_small_arrays_take_little_memory(form: str, options: dict[str, Any]) -> None:
    found = peak(FORMS[form], **options)
    assert found < PROMISE, f"{found / COUNT:.0f} bytes an array, {PROMISE / COUNT:.0f} are promised"
