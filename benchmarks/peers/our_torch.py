"""`lars_torch.LARS`: the same kernels, called by an optimizer of torch."""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import Any

from benchmarks.contestant import OPTIONS, Run, UnavailableError
from benchmarks.peers.torch_run import torch_run

__all__ = ["build", "build_compiled", "build_with_new_gradients"]


def build(params: list[Any], grads: list[Any]) -> Run:
    """As it is, with gradients that stay where they are."""
    return torch_run(params, grads, _make)


def build_with_new_gradients(params: list[Any], grads: list[Any]) -> Run:
    """The same with gradients in other memory at each step, as after ``zero_grad``."""
    import torch

    tensors: list[Any] = []

    def make(parameters: list[Any]) -> Any:
        tensors.extend(parameters)
        return _make(parameters)

    run = torch_run(params, grads, make)
    originals = [torch.from_numpy(g) for g in grads]

    def renew() -> None:
        new = [g.clone() for g in originals]  # before the old ones are given back
        for tensor, g in zip(tensors, new):
            tensor.grad = g

    return replace(run, before=renew)


def build_compiled(params: list[Any], grads: list[Any]) -> Run:
    """``torch.compile(optimizer.step)``: the graph calls the same kernels."""
    if shutil.which("g++") is None:
        raise UnavailableError("torch.compile needs g++")
    return torch_run(params, grads, _make, compiled=True)


def _make(tensors: list[Any]) -> Any:
    from lars_torch import LARS

    return LARS(tensors, **OPTIONS)
