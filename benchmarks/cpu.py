"""One step over ResNet-50's parameters on the CPU: `lars_array` against flash's arithmetic in torch."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import numpy as np

from benchmarks.shapes import resnet50
from benchmarks.timing import interleaved, summary
from lars_array import LARS

REFERENCE = "torch_optimizer 0.3.0 (flash's arithmetic, torch)"
OPTIONS = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 1e-4}


def measure(rounds: int) -> dict[str, Any]:
    """Return the versions, the machine and the table.

    Parameters
    ----------
    rounds : int
        How often each contestant is timed.

    Returns
    -------
    dict
        What goes into the JSON.
    """
    import torch

    contestants = {REFERENCE: _torch_optimizer(), "lars_array, blocked NumPy kernel": _lars_array("blocked")}
    return {
        "case": "ResNet-50, 161 arrays, 25,557,032 float32 parameters, one step",
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("lars-array", "numpy", "torch", "torch_optimizer")},
        "torch_threads": torch.get_num_threads(),
        "rounds": rounds,
        "contestants": summary(interleaved(contestants, rounds), REFERENCE),
    }


def _arrays() -> tuple[list[Any], list[Any]]:
    rng = np.random.default_rng(0)
    params = [0.05 * rng.standard_normal(shape, dtype=np.float32) for shape in resnet50()]
    return params, [0.01 * rng.standard_normal(p.shape, dtype=np.float32) for p in params]


def _lars_array(kernel: str) -> Callable[[], object]:
    params, grads = _arrays()
    optimizer = LARS(params, **OPTIONS, kernel=kernel)
    return lambda: optimizer.step(grads)


def _torch_optimizer() -> Callable[[], object]:
    import torch
    import torch_optimizer

    params, grads = _arrays()
    tensors = [torch.nn.Parameter(torch.from_numpy(p)) for p in params]
    for tensor, g in zip(tensors, grads, strict=True):
        tensor.grad = torch.from_numpy(g)
    return torch_optimizer.LARS(tensors, **OPTIONS, trust_coefficient=0.001).step  # type: ignore[no-any-return]


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
