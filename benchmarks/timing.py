"""Medians of interleaved runs: what disturbs the machine disturbs all contestants alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping


def interleaved(contestants: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each call, after one that is not counted.

    Parameters
    ----------
    contestants : mapping of str to callable
        Called in turn, `rounds` times.
    rounds : int
        How often.

    Returns
    -------
    dict of str to list of float
        In order of the rounds.
    """
    for call in contestants.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, call in contestants.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def summary(seconds: Mapping[str, list[float]], reference: str) -> dict[str, dict[str, float]]:
    """Return for each contestant the median, the quartiles, and the median ratio to the reference of the same round.

    Parameters
    ----------
    seconds : mapping of str to list of float
        From `interleaved`.
    reference : str
        Whose times the others are compared with.

    Returns
    -------
    dict
        By contestant: "ratio", "median_ms", "quartiles_ms", "minimum_ms".
    """
    table = {}
    for name, times in seconds.items():
        ratios = [ours / theirs for ours, theirs in zip(times, seconds[reference], strict=True)]
        low, median, high = (1e3 * x for x in statistics.quantiles(times, n=4))
        table[name] = {
            "ratio": statistics.median(ratios),
            "median_ms": median,
            "lower_quartile_ms": low,
            "upper_quartile_ms": high,
            "minimum_ms": 1e3 * min(times),
        }
    return table
