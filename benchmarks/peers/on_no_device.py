"""Optimizers as on a CUDA device whose kernels do nothing: what is timed is the host's part of a step."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

from benchmarks import no_device
from benchmarks.contestant import DECAY, LR, MOMENTUM, OPTIONS, Run

__all__ = ["cupy_lars", "torch_lars", "torch_sgd"]


def cupy_lars(params: list[Any], grads: list[Any], *, moves: bool, **options: Any) -> Run:
    """`lars_array.LARS` over CuPy arrays; with `moves` gradients are new arrays at each step."""
    from lars_array import LARS

    no_device.install()
    own, slopes = ([no_device.array(x.shape) for x in arrays] for arrays in (params, grads))
    optimizer = LARS(own, **OPTIONS, **options)

    def renew() -> None:
        if moves:
            slopes[:] = [no_device.array(g.shape) for g in grads]

    return _warm(Run(lambda: optimizer.step(slopes), list, renew))


def torch_lars(params: list[Any], grads: list[Any], *, moves: bool) -> Run:
    """`lars_torch.LARS` on tensors that it takes for a device's."""
    from lars_torch import LARS, optimizer

    state = no_device.tensor_state()
    run = _torch_run(params, grads, lambda tensors: LARS(tensors, **OPTIONS).step, moves=moves)
    with patch.object(optimizer, "TensorState", state):
        return _warm(run)


def torch_sgd(params: list[Any], grads: list[Any], *, moves: bool, **options: Any) -> Run:
    """``torch.optim.SGD``; of the fused one the kernel does nothing."""
    import torch

    def make(tensors: list[Any]) -> Callable[[], Any]:
        sgd = torch.optim.SGD(tensors, lr=LR, momentum=MOMENTUM, weight_decay=DECAY, nesterov=True, **options)

        def step() -> None:
            kernel, torch._fused_sgd_ = torch._fused_sgd_, _nothing
            try:
                sgd.step()
            finally:
                torch._fused_sgd_ = kernel

        return step

    return _warm(_torch_run(params, grads, make, moves=moves))


def _nothing(*_: Any, **__: Any) -> None:
    pass


def _torch_run(params: list[Any], grads: list[Any], make: Callable[[list[Any]], Any], *, moves: bool) -> Run:
    import torch

    tensors = [torch.nn.Parameter(torch.from_numpy(p)) for p in params]
    for p, g in zip(tensors, grads):
        p.grad = torch.from_numpy(g)
    step = make(tensors)

    def renew() -> None:
        new = [torch.empty_like(p, requires_grad=False) for p in tensors]  # before the old ones are freed
        for p, g in zip(tensors, new):
            p.grad = g

    return Run(step, list, renew if moves else lambda: None)


def _warm(run: Run) -> Run:
    for _ in range(4):
        run.before()
        run.step()
    return run
