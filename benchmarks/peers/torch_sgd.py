"""torch's own SGD: no norms, so less work than LARS. What torch's best code needs for the rest of it."""

from __future__ import annotations

from typing import Any

from benchmarks.contestant import DECAY, LR, MOMENTUM, Run
from benchmarks.peers.torch_run import torch_run

__all__ = ["build_foreach", "build_fused"]


def build_fused(params: list[Any], grads: list[Any]) -> Run:
    """One pass over memory."""
    return _build(params, grads, fused=True)


def build_foreach(params: list[Any], grads: list[Any]) -> Run:
    """An operation at a time, over all tensors."""
    return _build(params, grads, foreach=True)


def _build(params: list[Any], grads: list[Any], **options: Any) -> Run:
    from torch.optim import SGD

    return torch_run(
        params, grads, lambda tensors: SGD(tensors, lr=LR, momentum=MOMENTUM, weight_decay=DECAY, **options)
    )
