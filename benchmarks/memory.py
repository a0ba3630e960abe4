"""Memory that a contestant takes beside parameters, gradients and momentum, measured in a process of its own.

``resident``: how far the process is above where it was, with parameters and gradients made and its library in use, at
the highest point of a later step; less the momentum buffers. Compiled code counts; what was freed and only waits in the
heap, hundreds of megabytes after XLA has compiled, does not. ``allocated``: the peak of what Python and NumPy allocate
in a step, which other libraries don't report.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

from benchmarks.arrays import GRADIENT, PARAMETER, make
from benchmarks.cases import CASES, GROWTH
from benchmarks.contestant import Contestant, Run
from benchmarks.contestants import CPU
from benchmarks.machine import ROOT, give_back, plain

__all__ = ["measure", "measured_here"]

STEPS = 3  # until everything that is kept is there, and compiled
LIMIT = 900  # seconds


def measure(case: str, contestant: str) -> dict[str, Any]:
    """Return what `measured_here` returns in a new process.

    Parameters
    ----------
    case, contestant : str
        Names.

    Returns
    -------
    dict
        Or ``{"failed": reason}``.
    """
    command = [sys.executable, "-m", "benchmarks.memory", case, contestant]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return {"failed": f"took more than {LIMIT} s"}
    except subprocess.CalledProcessError as error:
        return {"failed": plain((error.stderr or "").strip().rpartition("\n")[2] or f"exit status {error.returncode}")}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def measured_here(shapes: list[tuple[int, ...]], contestant: Contestant) -> dict[str, Any]:
    """Return extra bytes of a step.

    Parameters
    ----------
    shapes : list of tuple of int
        Of the parameters.
    contestant : Contestant
        What takes the steps.

    Returns
    -------
    dict
        "resident" and, for lars_array, "allocated"; None where the system does not tell.
    """
    small = [(8, 8)]
    _step(contestant.build(make(small, PARAMETER), make(small, GRADIENT)))  # loads the library
    params, grads = make(shapes, PARAMETER), make(shapes, GRADIENT)
    give_back()
    kept = (contestant.copies - 2) * sum(p.nbytes for p in params)
    before = _status("VmRSS")
    run = contestant.build(params, grads)
    for _ in range(STEPS):
        _step(run)
    run.before()
    give_back()
    resident = None
    if before is not None and _forget_peak():
        run.step()
        peak = _status("VmHWM")
        resident = None if peak is None else peak - before - kept
    allocated = _allocated(run) if contestant.in_place else None
    return {"resident": resident, "allocated": allocated}


def _step(run: Run) -> None:
    run.before()
    run.step()


def _allocated(run: Run) -> int:
    tracemalloc.start()
    try:
        run.step()  # what it keeps until the next step is not a step's peak
        tracemalloc.reset_peak()
        before, _ = tracemalloc.get_traced_memory()
        run.step()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


def _status(key: str) -> int | None:
    try:
        match = re.search(rf"^{key}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(match[1]) * 1024 if match else None


def _forget_peak() -> bool:
    """Let VmHWM begin anew, if this system can."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


if __name__ == "__main__":
    case, name = sys.argv[1:]
    contestant = next(contestant for contestant in CPU if contestant.name == name)
    print(json.dumps(measured_here((CASES | GROWTH)[case].shapes(), contestant)))
