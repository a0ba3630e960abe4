"""What all optimizers of torch have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.contestant import Run
from benchmarks.machine import cores

__all__ = ["torch_run"]


def torch_run(params: list[Any], grads: list[Any], make: Callable[[list[Any]], Any], *, compiled: bool = False) -> Run:
    """Return the run of an optimizer of torch.

    Parameters
    ----------
    params, grads : list of ndarray
        torch uses their memory: where the system has huge pages, NumPy asks for them and torch does not.
    make : callable
        From a list of parameters to the optimizer.
    compiled : bool
        Whether its step goes through torch.compile.

    Returns
    -------
    Run
        Of ``optimizer.step``.
    """
    import torch

    torch.set_num_threads(cores())
    tensors = [torch.nn.Parameter(torch.from_numpy(p)) for p in params]
    for tensor, g in zip(tensors, grads):
        tensor.grad = torch.from_numpy(g)
    optimizer = make(tensors)
    step = torch.compile(optimizer.step) if compiled else optimizer.step
    return Run(step, lambda: [tensor.detach().numpy() for tensor in tensors])
