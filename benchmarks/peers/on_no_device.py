"""Optimizers as on a CUDA device whose kernels do nothing: what is timed is the host's part of a step."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any
from unittest.mock import patch

from benchmarks import no_device
from benchmarks.contestant import DECAY, LR, MOMENTUM, OPTIONS, Run

__all__ = ["cupy_lars", "torch_lars", "torch_sgd", "torch_sgd_of_elements"]

STEPS = 4  # until a program is made, and what it remembers


def cupy_lars(params: list[Any], grads: list[Any], *, moves: bool, rates: bool = False, **options: Any) -> Run:
    """`lars_array.LARS` over CuPy arrays.

    With `moves` gradients are new arrays at each step, elsewhere; with `rates` it has another learning rate as well.
    """
    from lars_array import LARS

    no_device.install()
    own, slopes = ([no_device.array(x.shape) for x in arrays] for arrays in (params, grads))
    optimizer, numbers = LARS(own, **OPTIONS, **options), count(LR, 1e-6)

    def renew() -> None:
        if moves:
            slopes[:] = [no_device.array(g.shape) for g in grads]
        if rates:
            optimizer.param_groups[0]["lr"] = next(numbers)

    return _warm(Run(lambda: optimizer.step(slopes), list, renew))


def torch_lars(params: list[Any], grads: list[Any], **changes: bool) -> Run:
    """`lars_torch.LARS` on tensors that it takes for a device's."""
    from lars_torch import LARS, optimizer

    state = no_device.tensor_state()
    run = _torch_run(params, grads, lambda tensors: LARS(tensors, **OPTIONS), **changes)
    with patch.object(optimizer, "TensorState", state):
        return _warm(run)


def torch_sgd_of_elements(params: list[Any], grads: list[Any], **changes: bool) -> Run:
    """``torch.optim.SGD(fused=True)`` with torch's kernel for a CPU, over one element of each array.

    That kernel, too, reads its arguments in C++, which `torch_sgd` leaves out.
    """
    few = ([x.ravel()[:1] for x in arrays] for arrays in (params, grads))
    return torch_sgd(*few, runs=True, fused=True, **changes)


def torch_sgd(
    params: list[Any], grads: list[Any], *, moves: bool, rates: bool = False, runs: bool = False, **options: Any
) -> Run:
    """``torch.optim.SGD`` with `fused` or `foreach`; its kernels do nothing while it steps, unless it `runs`."""
    import torch

    names = () if runs else ("_fused_sgd_", "_foreach_add", "_foreach_add_", "_foreach_mul_")
    kernels = {name: getattr(torch, name) for name in names}

    def replace(replacements: dict[str, Any]) -> None:
        for name, function in replacements.items():
            setattr(torch, name, function)

    def make(tensors: list[Any]) -> Any:
        return torch.optim.SGD(tensors, lr=LR, momentum=MOMENTUM, weight_decay=DECAY, nesterov=True, **options)

    run = _torch_run(params, grads, make, moves=moves, rates=rates)

    def before() -> None:
        run.before()
        replace(dict.fromkeys(names, _first))

    def step() -> None:
        try:
            run.step()
        finally:
            replace(kernels)

    return _warm(Run(step, list, before))


def _first(x: Any, *_: Any, **__: Any) -> Any:
    return x


def _torch_run(
    params: list[Any], grads: list[Any], make: Callable[[list[Any]], Any], *, moves: bool, rates: bool = False
) -> Run:
    import torch

    tensors = [torch.nn.Parameter(torch.from_numpy(p)) for p in params]
    for p, g in zip(tensors, grads):
        p.grad = torch.from_numpy(g)
    optimizer, numbers = make(tensors), count(LR, 1e-6)

    def renew() -> None:
        if moves:
            new = [torch.empty_like(p, requires_grad=False) for p in tensors]  # before the old ones are freed
            for p, g in zip(tensors, new):
                p.grad = g
        if rates:
            optimizer.param_groups[0]["lr"] = next(numbers)

    return Run(optimizer.step, list, renew)


def _warm(run: Run) -> Run:
    for _ in range(STEPS):
        run.before()
        run.step()
    return run
