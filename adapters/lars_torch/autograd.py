"""A step that autograd can look through: the same stages on torch's own functions."""

from __future__ import annotations

from typing import Any

import torch

from lars_array import State, update
from lars_array.hyper import needs_buffer
from lars_torch.engine import check_tensor
from lars_torch.hyper import hyper_of
from lars_torch.views import computed_in

__all__ = ["step"]


def step(optimizer: Any) -> None:
    """Take a step of `optimizer` that is recorded; parameters change in place, momentum buffers are new tensors."""
    grad_scale, found_inf = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
    members = [member for member in optimizer._members() if member.param.grad is not None]
    if not members or (found_inf is not None and bool(found_inf)):
        return
    for member in members:
        check_tensor(member.name, member.param)
    tensors = {member.name: member.param for member in members}
    grads = {name: p.grad for name, p in tensors.items()}
    groups: list[dict[str, Any]] = []
    for k, group in enumerate(optimizer.param_groups):
        # Copies, since autograd looks back at what is written over.
        named = {member.name: member.param.clone() for member in members if member.group == k}
        if named:
            device = next(iter(named.values())).device
            groups.append({"params": named, **hyper_of(group, grad_scale, device, recorded=True)})
    before = _state(optimizer, tensors)
    with torch.enable_grad():
        after, state = update(groups, grads, before, nonfinite="propagate", layer_of=optimizer._labels().get)
        for group in after:
            keeps = needs_buffer(group)
            for name, new in group["params"].items():
                p = tensors[name]
                p.copy_(new)
                if keeps:
                    optimizer.state[p]["momentum_buffer"] = state.momentum_buffers[name]
                optimizer._note_lr(p, group["lr"])


def _state(optimizer: Any, tensors: dict[str, torch.Tensor]) -> State:
    known = {name: optimizer.state[p].get("momentum_buffer") for name, p in tensors.items() if p in optimizer.state}
    buffers = {name: _zeros(p) if known.get(name) is None else known[name] for name, p in tensors.items()}
    device, names = next(iter(tensors.values())).device, sorted(tensors)
    previous_lrs = optimizer._previous_lrs()
    lrs = [previous_lrs.get(tensors[name], 0.0) for name in names]
    return State(
        step=torch.tensor(0, device=device),
        momentum_buffers=buffers,
        first=torch.tensor([known.get(name) is None for name in names], device=device),
        previous_lr=torch.tensor(lrs, dtype=torch.float64, device=device),
    )


def _zeros(p: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(p, dtype=computed_in(p.dtype))
