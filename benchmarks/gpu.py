"""The GPU suite: each case with each contestant, by the host's clock and by the device's."""

from __future__ import annotations

import os
import random
import re
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import gpu_table, results, shapes
from benchmarks.arrays import GRADIENT, PARAMETER, make
from benchmarks.cases import Case
from benchmarks.check import Truth
from benchmarks.contestant import OPTIONS, Contestant, Run, UnavailableError
from benchmarks.gpu_contestants import GPU, OWN_STREAM, REFERENCE
from benchmarks.machine import commit, machine, plain, versions
from benchmarks.timing import ratios, summary

__all__ = ["CASES", "main", "measure"]

FORMAT = 1
STEPS = 3  # until all is compiled and allocated; after them the parameters are checked
SHARE = 0.85  # of the free memory, for contestants that are timed together
CHECKED = 100_000_000  # elements; the check, on the host, takes a minute a contestant for more

CASES = {
    "resnet50": Case("ResNet-50", shapes.resnet50, 51),
    "vit-l": Case("ViT-L/16", shapes.vit_l, 21),
    "1b": Case("a language model", shapes.language_model, 11),
}


class Times(NamedTuple):
    """The seconds of steps.

    Parameters
    ----------
    host, device, queued : list of float
        By the host's clock until the device is done, by the device's, and until the host has asked for a step.
    """

    host: list[float]
    device: list[float]
    queued: list[float]


def main(names: Sequence[str] | None, rounds: int | None, only: Sequence[str] | None, out: Path, gpu: Any) -> int:
    """Measure, write gpu-<device>.json and .md into `out`, print the table, and return the exit status.

    Parameters
    ----------
    names : sequence of str, optional
        Names in `CASES`; by default all.
    rounds : int, optional
        How often each contestant is timed.
    only : sequence of str, optional
        Parts of the names of the contestants that take part.
    out : Path
        The folder.
    gpu : Gpu
        See `benchmarks.gpu_device`.

    Returns
    -------
    int
        1 if a contestant failed.
    """
    os.environ.pop("LARS_ARRAY_CUDA", None)  # which contestants set
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # JAX would take three quarters of the memory
    facts = gpu.facts()
    setting: dict[str, Any] = {"format": FORMAT, "gpu": facts, "machine": machine(), "versions": versions()}
    setting |= {"options": OPTIONS, "date": datetime.now(UTC).date().isoformat(), "commit": commit()}
    contestants = [c for c in GPU if not only or any(part in c.name for part in only)]
    path = out / f"gpu-{re.sub('[^a-z0-9]+', '-', facts['name'].lower()).strip('-')}.json"
    try:
        document = results.load(path, setting)  # of cases that were measured before, on the same day
    except results.ConflictError:
        document = setting | {"cases": {}}
    document.setdefault("copy_bytes_per_s", gpu.copy_bandwidth())
    for name in names or CASES:
        case = CASES[name]
        document["cases"][name] = measure(name, case, contestants, rounds or case.rounds, gpu)
        results.save(path, document)  # what was measured is not lost if a later case ends badly
        path.with_suffix(".md").write_text(gpu_table.markdown(document))
    print(gpu_table.markdown(document))
    return int(any(document["cases"][name]["failed"] for name in names or CASES))


def measure(name: str, case: Case, contestants: Sequence[Contestant], rounds: int, gpu: Any) -> dict[str, Any]:
    """Return what goes into the JSON of one case."""
    skipped: dict[str, str] = {}
    failed: dict[str, str] = {}
    first: dict[str, dict[str, Any]] = {}
    times: dict[str, Times] = {}
    sizes = case.sizes
    params, grads = make(case.shapes(), PARAMETER), make(case.shapes(), GRADIENT)
    truth = Truth(case.shapes()) if sum(sizes) <= CHECKED else None
    ready = []
    for c in contestants:
        if c.most_arrays is not None and len(sizes) > c.most_arrays:
            skipped[c.name] = f"compiling {len(sizes):,} arrays takes too long; the most is {c.most_arrays:,}"
        else:
            ready.append(c)
    together = 4 * sum(sizes) * (sum(c.copies for c in ready) + 3) <= SHARE * gpu.free_bytes()
    for group in [ready] if together else [[c] for c in ready]:
        runs: dict[str, Run] = {}
        for c in group:
            if 4 * sum(sizes) * (c.copies + 3) > gpu.free_bytes():
                skipped[c.name] = f"{gpu.free_bytes() / 1e9:.0f} GB are free"
                continue
            try:
                runs[c.name], first[c.name] = _warm(c, params, grads, truth, gpu)
            except (ImportError, UnavailableError) as error:
                skipped[c.name] = plain(error)
            except Exception as error:  # of any library, and it is in the table
                failed[c.name] = f"{type(error).__name__}: {plain(error)}"
            _say(f"{name}: {c.name}: {failed.get(c.name) or skipped.get(c.name) or 'ready'}")
        times |= _timed(runs, rounds, gpu)
        runs.clear()
        gpu.give_back()
    return {
        "title": case.title,
        "arrays": len(sizes),
        "elements": sum(sizes),
        "rounds": rounds,
        "interleaved": together,
        "contestants": {c.name: _row(c, times, first) for c in ready if c.name in times},
        "skipped": skipped,
        "failed": failed,
    }


def _warm(c: Contestant, params: list[Any], grads: list[Any], truth: Truth | None, gpu: Any) -> tuple[Run, Any]:
    """Return a run that was found right, the seconds of building it and of its first steps, and their error."""
    start = time.perf_counter()
    run = c.build(params, grads)
    for _ in range(STEPS):
        run.before()
        run.step()
    gpu.synchronize()
    seconds = time.perf_counter() - start
    error = None
    if truth is not None:
        error = truth.check(run.parameters(), c.rule, STEPS, float32_norms=c.float32_norms)
    return run, {"first_steps_s": seconds, "error": error}


def _timed(runs: dict[str, Run], rounds: int, gpu: Any) -> dict[str, Times]:
    """Return the seconds of each step; a first round is not counted."""
    seconds: dict[str, Times] = {name: Times([], [], []) for name in runs}
    order, shuffle = list(runs), random.Random(0).shuffle
    for _ in range(rounds + 1):
        shuffle(order)
        for name in order:
            runs[name].before()
            seconds[name].host.append(gpu.timed(runs[name].step, ahead=False)[0])
            runs[name].before()
            _, device, queued = gpu.timed(runs[name].step, ahead=True)
            seconds[name].device.append(device)
            seconds[name].queued.append(queued)
    return {name: Times(*(column[1:] for column in columns)) for name, columns in seconds.items()}


def _row(c: Contestant, times: dict[str, Times], first: dict[str, Any]) -> dict[str, Any]:
    host, device, queued = times[c.name]
    row = {"label": c.label, "kind": c.kind, "rule": c.rule, "host": summary(host)} | first[c.name]
    row["ratio"] = ratios(host, times[REFERENCE][0]) if REFERENCE in times else None
    row["device"], row["queued"] = (None if c.name in OWN_STREAM else summary(x) for x in (device, queued))
    return row


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
