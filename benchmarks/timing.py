"""Medians of interleaved rounds: what disturbs the machine disturbs all contestants alike."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.contestant import Run

__all__ = ["described", "interleaved", "ratios", "summary"]

REST = 0.005  # seconds until the worker threads of other libraries have stopped spinning


def interleaved(
    runs: Mapping[Any, Run],
    rounds: int,
    *,
    rest: float = REST,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], object] = time.sleep,
) -> dict[Any, list[float]]:
    """Return the seconds of each step, after a round that is not counted.

    Parameters
    ----------
    runs : mapping of name to Run
        Each takes one step a round, in an order shuffled anew for every round, the same in every run.
    rounds : int
        How many.
    rest : float
        Seconds to sleep before each step.
    clock, sleep : callable
        For tests.

    Returns
    -------
    dict of name to list of float
        In order of the rounds.
    """
    seconds: dict[Any, list[float]] = {name: [] for name in runs}
    order, shuffle = list(runs), random.Random(0).shuffle
    gc.collect()
    gc.freeze()  # so that collecting between steps visits only what they made
    gc.disable()
    try:
        for _ in range(rounds + 1):
            shuffle(order)
            for name in order:
                runs[name].before()
                gc.collect()
                sleep(rest)
                start = clock()
                runs[name].step()
                seconds[name].append(clock() - start)
    finally:
        gc.enable()
        gc.unfreeze()
    return {name: times[1:] for name, times in seconds.items()}


def summary(seconds: Sequence[float]) -> dict[str, Any]:
    """Return median, quartiles and minimum in milliseconds."""
    low, median, high = (1e3 * np.quantile(seconds, [0.25, 0.5, 0.75])).tolist()
    return {"median_ms": median, "quartiles_ms": [low, high], "fastest_ms": 1e3 * min(seconds)}


def described(row: Mapping[str, Any], digits: int) -> str:
    """Return what `summary` has found as text, in milliseconds."""
    times = row["median_ms"], *row["quartiles_ms"], row["fastest_ms"]
    median, low, high, fastest = (f"{x:.{digits}f}" for x in times)
    return f"{median:>7} ({low} to {high}), fastest {fastest}"


def ratios(seconds: Sequence[float], to: Sequence[float]) -> dict[str, Any]:
    """Return median and quartiles of the ratios to what another contestant took in the same round."""
    low, median, high = np.quantile(np.divide(seconds, to), [0.25, 0.5, 0.75]).tolist()
    return {"median": median, "quartiles": [low, high]}
