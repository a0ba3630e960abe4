"""Many steps: memory stays flat, and a replay has the same bits. `make soak` runs this and writes RESULTS.md.

A workload is a generator that yields after each of its steps and at last returns the bytes of its result; others, such
as saving and loading, are added to `WORKLOADS`.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import os
import platform
import time
import warnings
from collections.abc import Callable, Generator
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import lars_array

__all__ = ["MOST_GROWTH", "WORKLOADS", "Workload", "measure"]

MOST_GROWTH = 4 << 20  # bytes of resident memory from a tenth of the steps to the end: less than 5 bytes a step of 1e6
SAMPLES = 50

Steps = Generator[None, None, bytes]


class Workload(NamedTuple):
    """Steps to be taken twice, and how many."""

    steps: int
    run: Callable[[int], Steps]


def small_numpy_steps(steps: int) -> Steps:
    """Small arrays and a changing learning rate; every thousandth step has other gradients' types, or lacks some."""
    rng = np.random.default_rng(0)
    params = [rng.standard_normal(shape).astype(np.float32) for shape in ((20, 10), (10,), (3, 3, 3))]
    grads = [[rng.standard_normal(p.shape).astype(np.float32) for p in params] for _ in range(7)]
    wide = [g.astype(np.float64) for g in grads[0]]
    optimizer = lars_array.LARS(params, lr=lambda step: 0.01 + 1e-4 * (step % 100), momentum=0.9, weight_decay=1e-3)
    for k in range(steps):
        given: Any = grads[k % 7]
        if k % 1000 == 999:
            given = wide if k % 2000 == 999 else [given[0], None, given[2]]
        optimizer.step(given)
        yield
    return b"".join(p.tobytes() for p in params)


def small_torch_steps(steps: int) -> Steps:
    """Gradients that lie elsewhere in every step, as after `zero_grad` and `backward`."""
    import torch

    import lars_torch

    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(shape, generator=generator).requires_grad_() for shape in ((20, 10), (10,), (300, 200))]
    optimizer = lars_torch.LARS(params, lr=0.01, momentum=0.9, weight_decay=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        kept = [torch.randn(p.shape, generator=generator) for p in params]  # noqa: F841 so that memory moves
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
        yield
    return b"".join(p.detach().numpy().tobytes() for p in params)


def small_jax_steps(steps: int) -> Steps:
    """The eager optimizer of JAX."""
    import jax.numpy as jnp

    import lars_jax

    rng = np.random.default_rng(0)
    params = [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((20, 10), (10,), (300, 200))]
    grads = [[np.asarray(rng.standard_normal(p.shape), np.float32) for p in params] for _ in range(7)]
    optimizer = lars_jax.LARS(params, 0.01, momentum=0.9, weight_decay=1e-3)
    for k in range(steps):
        optimizer.step([jnp.array(g) for g in grads[k % 7]])
        yield
    return b"".join(np.asarray(p).tobytes() for p in optimizer.params)


WORKLOADS: dict[str, Workload] = {
    "NumPy, small arrays": Workload(1_000_000, small_numpy_steps),
    "torch, moving gradients": Workload(2_000, small_torch_steps),
    "JAX, eager": Workload(2_000, small_jax_steps),
}


def resident() -> int:
    """Return the bytes of memory of this process that are in RAM."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


class Measured(NamedTuple):
    """Of one run: resident memory at evenly spaced steps, seconds, and a digest of the result."""

    memory: list[int]
    seconds: float
    digest: str

    @property
    def growth(self) -> int:
        """The bytes that a straight line through the last nine tenths of the samples rises by."""
        kept = self.memory[len(self.memory) // 10 :]
        slope = np.polyfit(np.arange(len(kept)), kept, 1)[0]
        return round(float(slope) * (len(kept) - 1))


def measure(run: Callable[[int], Steps], steps: int) -> Measured:
    """Take the steps of a workload once."""
    memory: list[int] = []
    every, steps_taken, start = max(steps // SAMPLES, 1), 0, time.perf_counter()
    running = run(steps)
    while True:
        try:
            next(running)
        except StopIteration as end:
            return Measured(memory, time.perf_counter() - start, hashlib.sha256(end.value).hexdigest())
        steps_taken += 1
        if steps_taken % every == 0:
            gc.collect()
            memory.append(resident())


def main() -> None:
    """Run all workloads, or those that are named, and write what they showed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="parts of the names of workloads; by default all")
    parser.add_argument("--steps", type=int, help="another number of steps")
    arguments = parser.parse_args()
    chosen = {
        name: x for name, x in WORKLOADS.items() if not arguments.names or any(part in name for part in arguments.names)
    }
    warnings.simplefilter("error")
    lines, failures = [], []
    for name, workload in chosen.items():
        steps = arguments.steps or workload.steps
        first, replay = (measure(workload.run, steps) for _ in range(2))
        line = f"| {name} | {steps:,} | {first.seconds:.0f} s | {first.memory[-1] >> 20} MiB | "
        line += f"{first.growth / 1024:+.0f} KiB | {replay.growth / 1024:+.0f} KiB | "
        lines.append(line + f"{'equal' if first.digest == replay.digest else 'DIFFERENT'} |")
        print(lines[-1], flush=True)
        if first.digest != replay.digest or max(first.growth, replay.growth) > MOST_GROWTH:
            failures.append(name)
    if not arguments.names and not arguments.steps:
        write(lines)
    if failures:
        raise SystemExit(f"memory grows, or a replay has other bits: {', '.join(failures)}")


def write(lines: list[str]) -> None:
    """Write RESULTS.md."""
    text = f"""# Soak

Written by `make soak` on {date.today().isoformat()}: Python {platform.python_version()}, NumPy {np.__version__}. Each
workload runs twice in one process. Growth is that of resident memory, by a straight line through the samples of the
last nine tenths of the steps; more than {MOST_GROWTH >> 20} MiB is a failure, and so are other bits in the replay.

| workload | steps | time | memory | growth | growth in the replay | bits |
|---|---|---|---|---|---|---|
"""
    Path(__file__).with_name("RESULTS.md").write_text(text + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
