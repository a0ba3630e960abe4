"""One array of a million to a billion elements: whether the time of an element stays what it is.

All sizes of a contestant are timed in the same rounds, so what changes the speed of memory changes it for all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import memory
from benchmarks.cases import Case
from benchmarks.check import Truth
from benchmarks.contestant import Contestant, Run
from benchmarks.contestants import LIMIT_NAME
from benchmarks.cpu import SHARE, bytes_of, say, timed, warmed
from benchmarks.machine import available_bytes, give_back, plain
from benchmarks.timing import summary

__all__ = ["growing", "measure"]


def growing(contestants: Sequence[Contestant], reasons: Mapping[str, str]) -> list[Contestant]:
    """Return whose growth is measured, if they can take part: lars_array's kernels, and the limit."""
    named = [c for c in contestants if c.name.startswith(("lars_array ", LIMIT_NAME)) and c.most_arrays is None]
    return [c for c in named if c.name not in reasons]


def measure(
    cases: Mapping[str, Case], contestants: Sequence[Contestant], rounds: int | None = None, *, with_memory: bool = True
) -> dict[str, Any]:
    """Return what goes into the JSON.

    Parameters
    ----------
    cases : mapping of str to Case
        One array each, the smallest first. A contestant takes as many of them as memory holds together.
    contestants : sequence of Contestant
        Who takes part.
    rounds : int, optional
        How often each size is timed; else as often as the cases say.
    with_memory : bool
        Whether memory is measured, in a new process for each.

    Returns
    -------
    dict
        "sizes", and by the names of contestants "sizes" of theirs: a list as long, with None for what was too large.
        "failed", reasons by name.
    """
    rounds = rounds or max(case.rounds for case in cases.values())
    failed: dict[str, str] = {}
    rows: dict[str, dict[str, Any]] = {}
    others = 0.0
    for contestant in contestants:
        runs: dict[str, Run] = {}
        found: dict[str, dict[str, Any]] = {}
        for name in _fitting(cases, contestant):
            try:
                runs[name], found[name] = warmed(contestant, Truth(cases[name].shapes()))
            except Exception as error:  # of any library, and it is in the table
                failed[contestant.name] = f"{type(error).__name__}: {plain(error)}"
                break
            say(f"{name}: {contestant.name}: ready")
        if contestant.name not in failed:
            seconds, cores = timed(runs, rounds)
            others = max(others, cores)
            for name, own in seconds.items():
                found[name] |= summary(own)
            rows[contestant.name] = {"label": contestant.label, "sizes": [found.get(name) for name in cases]}
        del runs
        give_back()
    for contestant in contestants:
        if with_memory and contestant.name in rows:
            for name, row in zip(cases, rows[contestant.name]["sizes"]):
                if row is not None:
                    row["memory"] = memory.measure(name, contestant.name)
    return {
        "sizes": [sum(case.sizes) for case in cases.values()],
        "rounds": rounds,
        "cores_used_by_others": others,
        "contestants": rows,
        "failed": failed,
    }


def _fitting(cases: Mapping[str, Case], contestant: Contestant) -> list[str]:
    """Return the names of the smallest cases, as many as memory holds together."""
    room, needed, names = SHARE * available_bytes(), 0, []
    for name, case in cases.items():
        needed += bytes_of([contestant], case)
        if needed <= room:
            names.append(name)
    return names
