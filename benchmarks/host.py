"""``python -m benchmarks host``: what a step on a CUDA device costs the host, measured without one.

Kernels do nothing, and nearly all else is real: `benchmarks.no_device` says what is replaced, and docs/performance.md
what that can't show. For each of `KINDS` all steps are taken in turn, in one process, with arrays of their own.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.contestant import OPTIONS, Run
from benchmarks.machine import ROOT, commit, machine, versions
from benchmarks.peers.on_no_device import cupy_lars, torch_lars, torch_sgd, torch_sgd_of_elements
from benchmarks.shapes import Shape, resnet50
from benchmarks.timing import described, interleaved, ratios, summary

__all__ = ["CONTESTANTS", "KINDS", "SGD", "main", "measure"]

OUT = ROOT / "benchmarks" / "results" / "host.json"
SGD = "torch SGD, fused"
CONTESTANTS: dict[str, Callable[..., Run]] = {
    SGD: partial(torch_sgd, fused=True),
    "torch SGD, fused, on one element each": torch_sgd_of_elements,
    "torch SGD, foreach": partial(torch_sgd, foreach=True),
    "lars_array, CuPy, propagate": partial(cupy_lars, nonfinite="propagate"),
    "lars_array, CuPy": cupy_lars,
    "lars_torch": torch_lars,
}
# What is new at each step: gradients lie elsewhere after zero_grad, and most schedulers set a learning rate.
KINDS = {
    "new gradients": {"moves": True},
    "the same gradients": {"moves": False},
    "new gradients and learning rate": {"moves": True, "rates": True},
}


def measure(shapes: Sequence[Shape], rounds: int) -> dict[str, Any]:
    """Return milliseconds by contestant and by what is new.

    Parameters
    ----------
    shapes : sequence of tuple of int
        One a layer.
    rounds : int
        How many, in each of which every step is taken once.

    Returns
    -------
    dict
        By contestant, and in that by a key of `KINDS`, what `summary` returns, and as "ratio" the ratios to torch's
        fused SGD of the same kind.
    """

    def arrays() -> list[Any]:
        return [np.empty(shape, np.float32) for shape in shapes]  # nothing reads or writes them

    found: dict[str, Any] = {name: {} for name in CONTESTANTS}
    for kind, changes in KINDS.items():
        runs = {name: build(arrays(), arrays(), **changes) for name, build in CONTESTANTS.items()}
        seconds = interleaved(runs, rounds, rest=0.0)
        for name, own in seconds.items():
            found[name][kind] = summary(own) | {"ratio": ratios(own, seconds[SGD])}
    return found


def main(arguments: list[str]) -> int:
    """Print a table, write the results as JSON, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks host", description=__doc__)
    parser.add_argument("--rounds", type=int, default=301, help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", default=OUT, help="default: benchmarks/results/host.json")
    asked = parser.parse_args(arguments)
    shapes = resnet50()
    found = measure(shapes, asked.rounds)
    import cupy

    document = {"machine": machine(), "versions": versions() | {"cupy": cupy.__version__}, "options": OPTIONS}
    document |= {"date": datetime.now(UTC).date().isoformat(), "commit": commit(), "arrays": len(shapes)}
    print(f"ResNet-50, {len(shapes)} arrays: milliseconds (quartiles), and as a ratio to {SGD}")
    for name, own in found.items():
        for kind, row in own.items():
            print(f"  {name:38} {kind:32} {described(row, 3):46} {row['ratio']['median']:5.2f}")
    asked.json.write_text(json.dumps(document | {"rounds": asked.rounds, "contestants": found}, indent=1) + "\n")
    return 0
