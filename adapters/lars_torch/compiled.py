"""The step as one operator of torch, for ``torch.compile``: a graph calls it, and it runs as it does without one.

Hyper-parameters are not in the graph, so that a schedule compiles nothing anew. Nor are momentum buffers.
"""

from __future__ import annotations

from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch

__all__ = ["number", "step"]

_numbers = count()
_optimizers: WeakValueDictionary[int, Any] = WeakValueDictionary()


def number(optimizer: Any) -> int:
    """Return a number by which graphs can refer to `optimizer`."""
    new = next(_numbers)
    _optimizers[new] = optimizer
    return new


def step(optimizer: Any) -> None:
    """Have the graph that is being traced take a step of `optimizer`."""
    params, grads, places = [], [], []
    for place, p in enumerate(optimizer._params):  # not of its groups, whose every number the graph would be bound to
        if p.grad is not None:
            params.append(p)
            grads.append(p.grad)
            places.append(place)
    # Also where none has a gradient, since others may be put into a group; and an operator that writes to nothing would
    # be left out of the graph.
    _step(params or optimizer._params[:1], grads, places, optimizer._number)


@torch.library.custom_op("lars_torch::step", mutates_args={"params"})
def _step(params: list[torch.Tensor], grads: list[torch.Tensor], places: list[int], number: int) -> None:
    """Step the tensors that a graph has in the place of an optimizer's parameters."""
    optimizer = _optimizers[number]
    given = {optimizer._params[place]: (p, g) for place, p, g in zip(places, params, grads)}
    known = set(optimizer._params)  # the graph knows no parameters that were put into a group since
    new = (p for group in optimizer.param_groups for p in group["params"] if p not in known)
    given |= {p: (p, p.grad) for p in new if p.grad is not None}
    with torch.no_grad():
        optimizer._step(given)
