"""Flash's arithmetic in torch: flash itself, and torch_optimizer, which computes the same bit for bit."""

from __future__ import annotations

from typing import Any

from benchmarks.contestant import OPTIONS, Run
from benchmarks.peers.torch_run import torch_run

__all__ = ["lightning_flash", "torch_optimizer"]


def torch_optimizer(params: list[Any], grads: list[Any]) -> Run:
    """``torch_optimizer.LARS``."""
    from torch_optimizer import LARS

    return torch_run(params, grads, lambda tensors: LARS(tensors, **OPTIONS))


def lightning_flash(params: list[Any], grads: list[Any]) -> Run:
    """``flash.core.optimizers.LARS`` of lightning-flash 0.8.2, where its old requirements can still be installed."""
    from flash.core.optimizers import LARS

    return torch_run(params, grads, lambda tensors: LARS(tensors, **OPTIONS))
