"""The CPU suite: each case with each contestant, time and memory."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import memory
from benchmarks.arrays import GRADIENT, PARAMETER, make
from benchmarks.cases import Case
from benchmarks.check import Truth
from benchmarks.contestant import Contestant, Run, UnavailableError
from benchmarks.contestants import LIMIT_NAME, REFERENCE
from benchmarks.machine import available_bytes, give_back, plain, used_by_others
from benchmarks.parties import parties
from benchmarks.timing import interleaved, ratios, summary

__all__ = ["SHARE", "absent", "bytes_of", "measure", "say", "timed", "warmed"]

STEPS = 3  # until buffers are made and everything is compiled; after them the parameters are checked

# Of the memory that is free, for the arrays of those who are timed in the same rounds.
SHARE = 0.85


def absent(contestants: Sequence[Contestant]) -> dict[str, str]:
    """Return the reasons of those that can't take part on this machine, by name."""
    reasons = {}
    for contestant in contestants:
        try:
            contestant.build(make([(8, 8)], PARAMETER), make([(8, 8)], GRADIENT))
        except (ImportError, UnavailableError) as error:
            reasons[contestant.name] = plain(error)
        except Exception:  # it will fail again where failures are reported
            continue
    return reasons


def measure(
    name: str,
    case: Case,
    contestants: Sequence[Contestant],
    rounds: int,
    *,
    reasons: dict[str, str] | None = None,
    with_memory: bool = True,
) -> dict[str, Any]:
    """Return what goes into the JSON of one case.

    Parameters
    ----------
    name : str
        Of the case.
    case : Case
        What is stepped over.
    contestants : sequence of Contestant
        Who takes part; all are in the result, at least with the reason why not.
    rounds : int
        How often each is timed.
    reasons : dict of str to str, optional
        What `absent` returned.
    with_memory : bool
        Whether memory is measured, in a new process for each.

    Returns
    -------
    dict
        "contestants" by name; "skipped" and "failed", reasons by name; and what describes the case.
    """
    skipped = {c.name: reason for c in contestants if (reason := _reason(c, case, reasons or {}))}
    ready = [c for c in contestants if c.name not in skipped]
    room = int(SHARE * available_bytes())
    together = parties(ready, (REFERENCE, LIMIT_NAME), lambda who: bytes_of(who, case), room)
    failed: dict[str, str] = {}
    rows: dict[str, dict[str, Any]] = {}
    others = 0.0
    truth = Truth(case.shapes())
    for party in together:
        runs: dict[str, Run] = {}
        first: dict[str, dict[str, float]] = {}
        for contestant in party:
            if bytes_of([contestant], case) > room:
                needed = bytes_of([contestant], case) / 1e9
                skipped[contestant.name] = f"needs {needed:.1f} GB, {available_bytes() / 1e9:.1f} GB are free"
                continue
            try:
                runs[contestant.name], first[contestant.name] = warmed(contestant, truth)
            except Exception as error:  # of any library, and it is in the table
                failed[contestant.name] = f"{type(error).__name__}: {plain(error)}"
                rows.pop(contestant.name, None)  # of an earlier party
            say(f"{name}: {contestant.name}: {failed.get(contestant.name, 'ready')}")
        seconds, cores = timed(runs, rounds)
        others = max(others, cores)
        rows |= {
            c.name: _row(c, seconds, first)
            for c in party
            if c.name in seconds and c.name not in rows and c.name not in failed
        }
        del runs
        give_back()

    rows = {c.name: rows[c.name] for c in ready if c.name in rows}
    for contestant in ready:
        if with_memory and contestant.name in rows:
            rows[contestant.name]["memory"] = memory.measure(name, contestant.name)
    sizes = case.sizes
    return {
        "title": case.title,
        "arrays": len(sizes),
        "elements": sum(sizes),
        "rounds": rounds,
        "parties": [[c.name for c in party] for party in together],
        "cores_used_by_others": others,
        "contestants": rows,
        "skipped": skipped,
        "failed": failed,
    }


def _reason(contestant: Contestant, case: Case, reasons: dict[str, str]) -> str | None:
    if contestant.name in reasons:
        return reasons[contestant.name]
    arrays = len(case.sizes)
    if contestant.most_arrays is not None and arrays > contestant.most_arrays:
        return f"compiling {arrays:,} arrays takes too long; the most is {contestant.most_arrays:,}"
    return None


def bytes_of(contestants: Sequence[Contestant], case: Case) -> int:
    """Return what the arrays of contestants take, and what the hungriest step allocates: optax's, three copies."""
    copies = sum(contestant.copies for contestant in contestants) + 3 * any(not c.in_place for c in contestants)
    return 4 * sum(case.sizes) * copies


def warmed(contestant: Contestant, truth: Truth) -> tuple[Run, dict[str, float]]:
    """Return a run that was found right, the seconds of building it and of its first steps, and their error."""
    params, grads = make(truth.shapes, PARAMETER), make(truth.shapes, GRADIENT)
    start = time.perf_counter()
    run = contestant.build(params, grads)
    for _ in range(STEPS):
        run.before()
        run.step()
    seconds = time.perf_counter() - start
    error = truth.check(run.parameters(), contestant.rule, STEPS, float32_norms=contestant.float32_norms)
    return run, {"first_steps_s": seconds, "error": error}


def timed(runs: Mapping[str, Run], rounds: int) -> tuple[dict[str, list[float]], float]:
    """Return what `benchmarks.timing.interleaved` does, and how many cores other processes used meanwhile."""
    start, used = time.perf_counter(), used_by_others()
    seconds = interleaved(runs, rounds)
    return seconds, (used_by_others() - used) / (time.perf_counter() - start)


def _row(contestant: Contestant, seconds: dict[str, list[float]], first: dict[str, Any]) -> dict[str, Any]:
    own = seconds[contestant.name]
    row: dict[str, Any] = {"label": contestant.label, "kind": contestant.kind, "rule": contestant.rule}
    compared = {
        key: ratios(own, seconds[other]) if other in seconds else None
        for key, other in (("ratio", REFERENCE), ("ratio_to_limit", LIMIT_NAME))
    }
    return row | compared | summary(own) | first[contestant.name]


def say(text: str) -> None:
    """Tell who waits how far it is."""
    print(text, file=sys.stderr, flush=True)
