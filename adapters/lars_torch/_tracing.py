"""Steps that torch traces: as one operator in a graph of ``torch.compile``, and as a part of autograd's graph.

Hyper-parameters are not in a compiled graph, so that a schedule compiles nothing anew. Nor are momentum buffers.
"""

from __future__ import annotations

from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch

from lars_array import State, init, update
from lars_array.hyperparams import needs_buffer
from lars_torch._arrays import check_tensor
from lars_torch._hyperparams import numbers_of

__all__ = ["compiled_step", "differentiable_step", "number"]

_numbers = count()
_optimizers: WeakValueDictionary[int, Any] = WeakValueDictionary()


# ------------------------------------------------------------------------------------------------------ torch.compile


def number(optimizer: Any) -> int:
    """Return a number by which graphs can refer to `optimizer`."""
    new = next(_numbers)
    _optimizers[new] = optimizer
    return new


def compiled_step(optimizer: Any) -> None:
    """Put a step of `optimizer` into the graph that is being traced."""
    params, grads, index = [], [], []
    for i, p in enumerate(optimizer._params):  # not of its groups, whose every number the graph would be bound to
        if p.grad is not None:
            params.append(p)
            grads.append(p.grad)
            index.append(i)
    # Also where none has a gradient, since others may be put into a group; and an operator that writes to nothing would
    # be left out of the graph.
    _step(params or optimizer._params[:1], grads, index, optimizer._number)


# The schema is written out, since torch before 2.7 infers none from list[...].
@torch.library.custom_op(
    "lars_torch::step",
    mutates_args={"params"},
    schema="(Tensor(a0!)[] params, Tensor[] grads, int[] index, int number) -> ()",
)
def _step(params: list[torch.Tensor], grads: list[torch.Tensor], index: list[int], number: int) -> None:
    """Step the tensors that a graph has in the place of an optimizer's parameters."""
    optimizer = _optimizers[number]
    given = {optimizer._params[i]: (p, g) for i, p, g in zip(index, params, grads)}
    known = set(optimizer._params)  # others were put into a group since the graph was traced
    new = (p for group in optimizer.param_groups for p in group["params"] if p not in known)
    given |= {p: (p, p.grad) for p in new if p.grad is not None}
    with torch.no_grad():
        optimizer._step(given)


# ----------------------------------------------------------------------------------------------------------- autograd


def differentiable_step(optimizer: Any) -> None:
    """Take a step that autograd records; parameters change in place, momentum buffers are new tensors."""
    grad_scale, found_inf = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
    members = [member for member in optimizer._named_params() if member.param.grad is not None]
    if not members or (found_inf is not None and bool(found_inf)):
        return
    for member in members:
        check_tensor(member.name, member.param)
    tensors = {member.name: member.param for member in members}
    grads = {name: p.grad for name, p in tensors.items()}
    groups: list[dict[str, Any]] = []
    for k, group in enumerate(optimizer.param_groups):
        # Copies, since autograd needs the values that are overwritten.
        named = {member.name: member.param.clone() for member in members if member.group == k}
        if named:
            device = next(iter(named.values())).device
            groups.append({"params": named, **numbers_of(group, device, grad_scale, recorded=True)})
    before = _state(optimizer, tensors)
    with torch.enable_grad():
        after, state = update(groups, grads, before, nonfinite="propagate", layer_of=optimizer._labels().get)
        for group in after:
            for name, new in group["params"].items():
                p, lr = tensors[name], group["lr"]
                p.copy_(new)
                if needs_buffer(group):
                    optimizer.state[p]["momentum_buffer"] = state.momentum_buffers[name]
                optimizer._previous_lr[p] = float(lr.detach() if isinstance(lr, torch.Tensor) else lr)


def _state(optimizer: Any, tensors: dict[str, torch.Tensor]) -> State:
    """Return the state of `lars_array.update` before a step."""
    kept = {name: optimizer.state.get(p, {}).get("momentum_buffer") for name, p in tensors.items()}
    buffers = {name: v for name, v in kept.items() if v is not None}
    state, names = init(tensors), sorted(tensors)
    rates = [optimizer._previous_lr.get(tensors[name], 0.0) for name in names]
    return state._replace(
        momentum_buffers=state.momentum_buffers | buffers,
        first=state.first.new_tensor([name not in buffers for name in names]),
        previous_lr=state.previous_lr.new_tensor(rates),
    )
