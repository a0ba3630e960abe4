"""One of the two processes of `benchmarks.compare`: it has the library of one checkout, and does what it is asked to.

``python -m benchmarks.compare_worker CHECKOUT`` reads a JSON object a line, and answers each with one.
"""

from __future__ import annotations

import gc
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from benchmarks.comparisons import COMPARISONS, kept_bytes
from benchmarks.contestant import Run, UnavailableError
from benchmarks.machine import give_back, plain
from benchmarks.timing import REST

__all__ = ["Worker"]

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
STEPS = 3  # until everything that is kept is there, and compiled


class Worker:
    """What it has built."""

    def __init__(self) -> None:
        self._runs: dict[str, Run] = {}
        self._random = random.Random(0)

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return the answer to ``{"do": "build" | "time" | "memory" | "drop", ...}``."""
        try:
            found: dict[str, Any] = getattr(self, request.pop("do"))(**request)
        except (ImportError, UnavailableError) as error:
            found = {"skipped": plain(error)}
        except Exception as error:  # of any library, and it is in the table
            found = {"failed": f"{type(error).__name__}: {plain(error)}"}
        return found

    def build(self, name: str) -> dict[str, Any]:
        """Build what a comparison is of; return the seconds of the last of its first steps."""
        self._runs = COMPARISONS[name].runs()
        seconds = {}
        for role, run in self._runs.items():
            for _ in range(STEPS):
                run.before()
                start = time.perf_counter()
                run.step()
                seconds[role] = time.perf_counter() - start
        gc.collect()
        gc.freeze()  # so that collecting between steps visits only what they made
        return {"seconds": seconds}

    def time(self, count: int, clock: str) -> dict[str, Any]:
        """Return the median seconds of so many steps, after one that is not counted, by one of `CLOCKS`."""
        gc.collect()
        gc.disable()
        try:
            return {"seconds": {role: _median(self._runs[role], count, CLOCKS[clock]) for role in self._shuffled()}}
        finally:
            gc.enable()

    def _shuffled(self) -> list[str]:
        return self._random.sample(list(self._runs), len(self._runs))

    def memory(self, name: str) -> dict[str, Any]:
        """Return the bytes an array."""
        return {"bytes": kept_bytes(COMPARISONS[name].shapes())}

    def drop(self) -> dict[str, Any]:
        """Give back what was built."""
        self._runs = {}
        gc.unfreeze()
        give_back()
        return {}


def _median(run: Run, count: int, clock: Callable[[], float]) -> float:
    time.sleep(REST)
    seconds = []
    for _ in range(count + 1):
        run.before()
        start = clock()
        run.step()
        seconds.append(clock() - start)
    return statistics.median(seconds[1:])


def _serve(checkout: Path, questions: TextIO, answers: TextIO) -> None:
    sys.path[:0] = [os.fspath(checkout), os.fspath(checkout / "adapters")]
    import lars_array

    found = Path(lars_array.__file__ or "").resolve().parents[1]
    if found != checkout.resolve():
        raise SystemExit(f"{checkout.name} has no lars_array of its own")
    worker = Worker()
    for line in questions:
        print(json.dumps(worker.answer(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print is no answer
    _serve(Path(sys.argv[1]), sys.stdin, channel)
