"""``python -m benchmarks after-work``: a step alone, and right after the work that training does before it.

Work of torch, of NumPy's BLAS or of XLA leaves caches cold and threads awake. All steps of a case are taken in turn, in
one process, with arrays of their own.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from benchmarks.arrays import GRADIENT, PARAMETER, make
from benchmarks.contestant import Run
from benchmarks.machine import commit, machine, versions
from benchmarks.peers import flat_pass, our_jax, our_lars, our_torch, tight_pass, torch_sgd, two_passes
from benchmarks.shapes import Shape, resnet50, tiny, vit_b
from benchmarks.timing import described, interleaved, ratios, summary

__all__ = ["CASES", "STEPS", "measure"]

CASES: dict[str, Callable[[], list[Shape]]] = {"resnet50": resnet50, "vit-b": vit_b, "tiny": tiny}
TRACED = 1000  # arrays up to which JAX compiles in reasonable time
SGD, FLAT, TIGHT, TWICE = "torch SGD, fused", "flat pass", "tight pass", "two passes"

STEPS: dict[str, Callable[[list[Any], list[Any]], Run]] = {
    SGD: torch_sgd.build_fused,
    FLAT: flat_pass.build,
    TIGHT: tight_pass.build,
    TWICE: two_passes.build,
    "lars_array, propagate": our_lars.compiled_unchecked,
    "lars_array, raise": our_lars.compiled,
    "lars_torch": our_torch.build,
    "lars_jax.LARS, donate=True": our_jax.build_eager,
    "lars_jax.lars, jitted, donated": partial(our_jax.build, donate=True),
}
# Who steps after which work.
AFTER = {
    "alone": list(STEPS),
    "torch": [SGD, "lars_torch"],
    "numpy": [SGD, "lars_array, propagate", "lars_array, raise"],
    "jax": [SGD, "lars_jax.LARS, donate=True", "lars_jax.lars, jitted, donated"],
}


def measure(shapes: Sequence[Shape], rounds: int) -> dict[str, Any]:
    """Return milliseconds by work and step.

    Parameters
    ----------
    shapes : sequence of tuple of int
        One a layer.
    rounds : int
        How many, in each of which every step is taken after every work.

    Returns
    -------
    dict
        By work and step what `summary` returns, and as "ratio" the ratios to torch's SGD after the same work.
    """
    taking_part = {name: build for name, build in STEPS.items() if "jitted" not in name or len(shapes) <= TRACED}
    runs = {name: build(make(shapes, PARAMETER), make(shapes, GRADIENT)) for name, build in taking_part.items()}
    for run in runs.values():
        for _ in range(3):
            run.before()
            run.step()
    works = {"alone": partial(time.sleep, 0.03), "torch": _torch(), "numpy": _numpy(), "jax": _jax()}
    pairs: Mapping[tuple[str, str], Run] = {
        (work, name): Run(runs[name].step, runs[name].parameters, partial(_before, runs[name], works[work]))
        for work, names in AFTER.items()
        for name in names
        if name in runs
    }
    seconds = interleaved(pairs, rounds, rest=0.0)
    found: dict[str, Any] = {work: {} for work in works}
    for (work, name), own in seconds.items():
        found[work][name] = summary(own) | {"ratio": ratios(own, seconds[work, SGD])}
    return found


def _before(run: Run, work: Callable[[], object]) -> None:
    run.before()
    work()


def _torch() -> Callable[[], object]:
    """Return a forward and backward pass of convolutions."""
    import torch
    from torch import nn

    layers = [nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()) for _ in range(4)]
    model, x = nn.Sequential(*layers), torch.randn(8, 32, 56, 56)

    def work() -> None:
        model.zero_grad()
        model(x).square().mean().backward()

    return work


def _numpy() -> Callable[[], object]:
    """Return a forward and backward pass of matrix products."""
    import numpy as np

    x, w = np.ones((512, 1024), np.float32), np.full((1024, 1024), 1e-3, np.float32)

    def work() -> Any:
        hidden = np.maximum(x @ w, 0)
        return x.T @ ((hidden @ w - 1) @ w.T)

    return work


def _jax() -> Callable[[], object]:
    """Return a jitted gradient of matrix products."""
    import jax
    import jax.numpy as jnp

    x, w = jnp.ones((512, 1024), jnp.float32), jnp.full((1024, 1024), 1e-3, jnp.float32)
    gradient = jax.jit(jax.grad(lambda w: jnp.square(jax.nn.relu(x @ w) @ w - 1).mean()))
    return lambda: jax.block_until_ready(gradient(w))


def main(arguments: list[str]) -> int:
    """Print a table for each case, and write the results as JSON where asked; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks after-work", description=__doc__)
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--json", metavar="FILE", help="write the results to this file as well")
    asked = parser.parse_args(arguments)
    document: dict[str, Any] = {"machine": machine(), "versions": versions(), "commit": commit(), "cases": {}}
    for case in asked.case:
        document["cases"][case] = found = measure(CASES[case](), asked.rounds)
        print(f"{case}: milliseconds (quartiles), and as a ratio to {SGD} after the same work")
        for work, rows in found.items():
            for name, row in rows.items():
                print(f"  {work:6} {name:32} {described(row, 2):44} {row['ratio']['median']:5.2f}", flush=True)
    if asked.json:
        with open(asked.json, "w") as file:
            json.dump(document, file, indent=1)
    return 0
