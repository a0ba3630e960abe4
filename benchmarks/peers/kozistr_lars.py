"""pytorch-optimizer's LARS. It leaves vectors to SGD, and writes the update into the gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from benchmarks.contestant import OPTIONS, Run
from benchmarks.peers.torch_run import torch_run

__all__ = ["build"]


def build(params: list[Any], grads: list[Any]) -> Run:
    """``pytorch_optimizer.LARS``, with its gradients restored before each step, as a backward pass would."""
    from pytorch_optimizer import LARS

    originals = [g.copy() for g in grads]

    def restore() -> None:
        for g, original in zip(grads, originals):
            g[...] = original

    return replace(torch_run(params, grads, lambda tensors: LARS(tensors, **OPTIONS)), before=restore)
