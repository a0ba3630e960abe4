"""Optimizers of torch with gradients that a backward pass has made anew, in other memory at each step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from benchmarks.contestant import MOMENTUM, OPTIONS, Run
from benchmarks.peers.torch_run import torch_run

__all__ = ["lars", "sgd"]


def lars(params: list[Any], grads: list[Any]) -> Run:
    """``lars_torch.LARS``."""
    from lars_torch import LARS

    return _run(params, grads, lambda tensors: LARS(tensors, **OPTIONS))


def sgd(params: list[Any], grads: list[Any]) -> Run:
    """``torch.optim.SGD(fused=True)``, which is no LARS: what torch needs for as many tensors."""
    from torch.optim import SGD

    return _run(params, grads, lambda tensors: SGD(tensors, lr=1e-3, momentum=MOMENTUM, fused=True))


def _run(params: list[Any], grads: list[Any], make: Callable[[list[Any]], Any]) -> Run:
    import torch

    tensors: list[Any] = []

    def made(parameters: list[Any]) -> Any:
        tensors.extend(parameters)
        return make(parameters)

    run = torch_run(params, grads, made)
    slopes = [torch.from_numpy(g) for g in grads]

    def backward() -> None:
        old = [p.grad for p in tensors]  # kept until the new ones are there, which so lie elsewhere
        for p in tensors:
            p.grad = None
        torch.stack([torch.vdot(p.flatten(), g.flatten()) for p, g in zip(tensors, slopes)]).sum().backward()
        del old

    return replace(run, before=backward)
