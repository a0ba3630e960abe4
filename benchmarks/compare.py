"""``python -m benchmarks compare OLD NEW``: what a step takes in one checkout of the library beside another.

Each checkout has a process of its own, with its folder and its adapters first on the path; the tasks are those of the
benchmark that is run. In each round both take their steps one after the other, in an order that changes, and what is
told is the ratio of new to old in the same round. "Fastest", or what is in brackets, is that of the fastest rounds.

On a machine that others use, ``taskset -c 0 python -m benchmarks compare --clock cpu`` says more: on one core no thread
waits for another, and the seconds are those that the process had the core.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.comparisons import COMPARISONS, DEFAULT, PEER, chosen
from benchmarks.cpu import say
from benchmarks.machine import ROOT, commit, machine, versions
from benchmarks.table import aligned, digits
from benchmarks.timing import ratios, summary

__all__ = ["Process", "compared", "main", "markdown"]

ROUNDS = 15
LONG_ENOUGH, MOST = 0.05, 50  # seconds of the steps of a round, and how many they are at most

COLUMNS = ["", "new to old", "quartiles", "fastest", "old", "new", "unit", "old to SGD", "new to SGD"]


class Process:
    """A process with one checkout.

    Parameters
    ----------
    checkout : Path
        The folder that `lars_array` and `adapters` are in.
    """

    def __init__(self, checkout: Path) -> None:
        command = [sys.executable, "-m", "benchmarks.compare_worker", os.fspath(checkout.resolve())]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True)

    def ask(self, what: str, **more: Any) -> None:
        """Ask for something; see `benchmarks.compare_worker`."""
        assert self._process.stdin is not None
        try:
            print(json.dumps({"do": what} | more), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            pass  # the answer will be missing as well

    def answer(self) -> dict[str, Any]:
        """Wait for the answer."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"a process ended with exit status {self._process.wait()}")
        found: dict[str, Any] = json.loads(line)
        return found

    def close(self) -> None:
        """Have it end."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def compared(old: Process, new: Process, name: str, rounds: int, clock: str = "wall") -> dict[str, Any]:
    """Return what was measured of both.

    Parameters
    ----------
    old, new : Process
        With their checkouts.
    name : str
        A key of `benchmarks.comparisons.COMPARISONS`.
    rounds : int
        How often times are taken.
    clock : {"wall", "cpu"}
        What tells the time.

    Returns
    -------
    dict
        "ratio", "old" and "new", and the last two "to_peer" as well if there is one; or "skipped" or "failed".
    """
    both = {"old": old, "new": new}
    task = "memory" if COMPARISONS[name].build is None else "build"
    for process in both.values():
        process.ask(task, name=name)
    found = {who: process.answer() for who, process in both.items()}
    for who, answer in found.items():
        for problem in answer.keys() & {"skipped", "failed"}:
            return {problem: f"{who}: {answer[problem]}"}
    if task == "memory":
        old_bytes, new_bytes = (found[who]["bytes"] for who in both)
        ratio = {"median": new_bytes / old_bytes, "quartiles": [new_bytes / old_bytes] * 2}
        return {"ratio": ratio, "old": {"bytes": old_bytes}, "new": {"bytes": new_bytes}}
    longest = max(answer["seconds"][""] for answer in found.values())
    seconds = _timed(both, rounds, min(MOST, math.ceil(LONG_ENOUGH / longest)), clock)
    for process in both.values():
        process.ask("drop")
        process.answer()
    rows: dict[str, Any] = {who: summary(seconds[who][""]) for who in both}
    if PEER in seconds["old"]:
        for who in both:
            own, peer = seconds[who][""], seconds[who][PEER]
            rows[f"{who}_to_peer"] = ratios(own, peer) | {"fastest": min(own) / min(peer)}
    return {"ratio": ratios(seconds["new"][""], seconds["old"][""])} | rows


def _timed(both: dict[str, Process], rounds: int, count: int, clock: str) -> dict[str, dict[str, list[float]]]:
    """Return the seconds of each round, by who took them and by what was timed."""
    seconds: dict[str, dict[str, list[float]]] = {who: {} for who in both}
    order, shuffle = list(both), random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for who in order:
            both[who].ask("time", count=count, clock=clock)
            for role, x in both[who].answer()["seconds"].items():
                seconds[who].setdefault(role, []).append(x)
    return seconds


def markdown(found: dict[str, dict[str, Any]]) -> str:
    """Return a table of what `compared` has returned, by name."""
    rows = [[name, *_cells(one)] for name, one in found.items() if "ratio" in one]
    left = [
        f"* {name}: {key}: {one[key]}" for name, one in found.items() for key in ("skipped", "failed") if key in one
    ]
    return "\n".join([*aligned(COLUMNS, rows), *([""] if left else []), *left])


def _cells(one: dict[str, Any]) -> list[str]:
    low, high = one["ratio"]["quartiles"]
    key, unit = ("bytes", "bytes an array") if "bytes" in one["old"] else ("median_ms", "ms")
    found = (one.get(f"{who}_to_peer") for who in ("old", "new"))
    peers = ["–" if x is None else f"{x['median']:.2f} ({x['fastest']:.2f})" for x in found]
    sizes = [digits(one[who][key]) for who in ("old", "new")]
    fastest = f"{one['new']['fastest_ms'] / one['old']['fastest_ms']:.3f}" if unit == "ms" else "–"
    return [f"{one['ratio']['median']:.3f}", f"{low:.3f} – {high:.3f}", fastest, *sizes, unit, *peers]


def main(arguments: list[str]) -> int:
    """Return the exit status: 1 if something failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks compare", description=__doc__)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="default: %(default)s")
    parser.add_argument("--case", nargs="+", metavar="NAME", default=DEFAULT, help=f"default: {' '.join(DEFAULT)}")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was found to this file as well")
    asked = parser.parse_args(arguments)
    if asked.rounds < 1:
        parser.error("--rounds must be at least 1")
    for checkout in (asked.old, asked.new):
        if not (checkout / "lars_array" / "__init__.py").exists():
            parser.error(f"{checkout} has no lars_array")
    try:
        names = chosen(asked.case)
    except ValueError as error:
        parser.error(str(error))
    found = {}
    old, new = Process(asked.old), Process(asked.new)
    try:
        for name in names:
            found[name] = compared(old, new, name, asked.rounds, asked.clock)
            say(f"{name}: {' '.join(_cells(found[name])[:3]) if 'ratio' in found[name] else found[name]}")
    finally:
        old.close()
        new.close()
    print(markdown(found))
    if asked.json is not None:
        commits = {"old": commit(asked.old), "new": commit(asked.new)}
        document = {"commits": commits, "machine": machine(), "versions": versions()}
        document |= {"rounds": asked.rounds, "clock": asked.clock}
        asked.json.write_text(json.dumps(document | {"comparisons": found}, indent=1, ensure_ascii=False) + "\n")
    return int(any("failed" in one for one in found.values()))
