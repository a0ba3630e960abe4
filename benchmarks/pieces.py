"""``python -m benchmarks.pieces``: what a sum over processes costs a step beside the sum itself.

A step whose `all_reduce` does nothing, as on one process, against the same step without, in rounds that take turns.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from benchmarks.arrays import GRADIENT, PARAMETER, make
from benchmarks.contestant import OPTIONS, Run
from benchmarks.shapes import Shape, resnet50, tiny
from benchmarks.timing import interleaved, ratios, summary
from lars_array import LARS

__all__ = ["measure"]

CASES: dict[str, tuple[Callable[[], list[Shape]], int]] = {"resnet50": (resnet50, 60), "tiny": (tiny, 200)}
WITHOUT, WITH = "without", "all_reduce"


def measure(shapes: Sequence[Shape], rounds: int, kernel: str | None = None) -> dict[str, Any]:
    """Return milliseconds of both, and the ratio of each round; both check all sums before they write.

    Parameters
    ----------
    shapes : sequence of tuple of int
        One a layer.
    rounds : int
        How many, in each of which both take a step.
    kernel : str, optional
        As for `LARS`.

    Returns
    -------
    dict
        "without" and "all_reduce" as `summary` returns them, and "ratio" as `ratios` does.
    """
    options: Mapping[str, dict[str, Any]] = {WITHOUT: {}, WITH: {"all_reduce": _nothing}}
    runs = {}
    for name, more in options.items():
        params, grads = make(shapes, PARAMETER), make(shapes, GRADIENT)
        optimizer = LARS(params, **OPTIONS, nonfinite="raise", kernel=kernel, **more)
        optimizer.step(grads)  # which compiles, and compares the layers
        runs[name] = Run(partial(optimizer.step, grads), lambda params=params: params)
    seconds = interleaved(runs, rounds)
    return {name: summary(own) for name, own in seconds.items()} | {"ratio": ratios(seconds[WITH], seconds[WITHOUT])}


def _nothing(table: Any) -> None:
    """The sum over one process."""


def main() -> None:
    """Print the results as JSON, a line a case."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pieces", description=__doc__)
    parser.add_argument("--rounds", type=int, help="instead of those of each case")
    parser.add_argument("--kernel", default="compiled")
    given = parser.parse_args()
    for name, (shapes, rounds) in CASES.items():
        print(json.dumps({"case": name, **measure(shapes(), given.rounds or rounds, given.kernel)}), flush=True)


if __name__ == "__main__":
    main()
