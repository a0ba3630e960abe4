"""How long the first step takes in a new process, with the compiled code on disk and without."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

from benchmarks.arrays import GRADIENT, PARAMETER, make
from benchmarks.contestant import OPTIONS
from benchmarks.machine import ROOT, plain
from benchmarks.shapes import resnet50

__all__ = ["measure"]

KERNELS = ("compiled", "blocked")
PROCESSES = 5


def measure() -> dict[str, Any]:
    """Return seconds by kernel: medians of five processes, "warm", and one with an empty compile cache, "cold".

    Returns
    -------
    dict
        By kernel ``{"warm": {...}, "cold": {...}}``, each with "import", "construct", "first_step" and "second_step";
        or ``{"skipped": reason}``.
    """
    result: dict[str, Any] = {}
    for kernel in KERNELS:
        filled = _in_new_process(kernel)  # also fills the cache
        if "skipped" in filled:
            result[kernel] = filled
            continue
        warm = [_in_new_process(kernel) for _ in range(PROCESSES)]
        result[kernel] = {"warm": {key: statistics.median(times[key] for times in warm) for key in filled}}
        with tempfile.TemporaryDirectory() as empty:
            result[kernel]["cold"] = _in_new_process(kernel, NUMBA_CACHE_DIR=empty)
    return result


def _in_new_process(kernel: str, **environment: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.latency", kernel]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)
    if done.returncode:
        return {"skipped": plain(done.stderr.strip().rpartition("\n")[2])}
    seconds: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return seconds


def _seconds(kernel: str) -> dict[str, Any]:
    """Measure in this process, where NumPy is imported already, as in a program that has data."""
    shapes = resnet50()
    params, grads = make(shapes, PARAMETER), make(shapes, GRADIENT)
    times = [time.perf_counter()]
    from lars_array import LARS

    times.append(time.perf_counter())
    try:
        optimizer = LARS(params, **OPTIONS, kernel=kernel)
    except ValueError as error:
        return {"skipped": plain(error)}
    times.append(time.perf_counter())
    for _ in range(2):
        optimizer.step(grads)
        times.append(time.perf_counter())
    names = ("import", "construct", "first_step", "second_step")
    return {name: after - before for name, before, after in zip(names, times, times[1:])}


if __name__ == "__main__":
    print(json.dumps(_seconds(sys.argv[1])))
