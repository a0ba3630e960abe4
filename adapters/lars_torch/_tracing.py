"""Steps that torch traces: as one operator in a graph of ``torch.compile``, and as a part of autograd's graph.

Hyper-parameters are not in a compiled graph, so that a schedule compiles nothing anew. Nor are momentum buffers.
"""

from __future__ import annotations

from contextlib import nullcontext
from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch._subclasses.fake_tensor import FakeTensor

from lars_array import State, init, update
from lars_array._arrays import is_half
from lars_array._stepper import SignalScope, defer_signals, reads_previous_lr
from lars_array.hyperparams import needs_buffer
from lars_torch._arrays import check_tensor
from lars_torch._dtensors import is_dtensor
from lars_torch._hyperparams import numbers_of

__all__ = ["compiled_step", "is_observed", "number", "plain_step", "recorded_step"]

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
    if getattr(torch.compiler, "is_exporting", bool)():
        raise RuntimeError("a step of lars_torch.LARS can't be exported: the graph would refer to this optimizer")
    params, grads, index = [], [], []
    for i, p in enumerate(optimizer._params):  # not of its groups, whose every number the graph would be bound to
        if p.grad is not None:
            params.append(piece_in_graph(p))
            grads.append(piece_in_graph(p.grad, p))
            index.append(i)
    # Also where none has a gradient, since others may be put into a group; and an operator that writes to nothing would
    # be left out of the graph.
    _step(params or list(map(piece_in_graph, optimizer._params[:1])), grads, index, optimizer._number)


def piece_in_graph(x: Any, p: Any = None) -> Any:
    """Return what this process holds of a tensor, cut as `p`, as a graph can take it into an operator."""
    if not is_dtensor(x):
        return x
    if p is not None and x.placements != p.placements:
        x = x.redistribute(placements=p.placements)
    return x.to_local()


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


# ------------------------------------------------------------------------------------------- by torch's own functions


def is_observed(optimizer: Any) -> bool:
    """Return whether a step must be made of torch's own functions, because torch passes them on.

    Dispatch modes and torch.func trace graphs (make_fx), or compute with tensors that have no memory (FakeTensors).
    """
    key, one = torch._C._TorchDispatchModeKey, next(iter(optimizer._params), None)
    modes = torch._C._len_torch_dispatch_stack() and [
        mode for kind in (key.FAKE, key.PROXY, key.FUNCTIONAL) if (mode := torch._C._get_dispatch_mode(kind))
    ]
    observed = bool(modes or torch._C._functorch.peek_interpreter_stack()) or isinstance(one, FakeTensor)
    if observed and any(map(is_dtensor, optimizer._params)):
        raise TypeError("a step of DTensors can't be traced, except by torch.compile")
    return observed


def plain_step(optimizer: Any) -> None:
    """Take a step by torch's own functions; parameters and momentum buffers change in place."""
    with getattr(next(iter(optimizer._params), None), "fake_mode", nullcontext()):
        _functional_step(optimizer, recorded=False)


def recorded_step(optimizer: Any) -> None:
    """Take a step that autograd records; parameters change in place, momentum buffers are new tensors."""
    _functional_step(optimizer, recorded=True)


def _functional_step(optimizer: Any, *, recorded: bool) -> None:
    if recorded and any(map(is_dtensor, optimizer._params)):
        raise TypeError("a step that autograd records takes no DTensors")
    grad_scale, found_inf = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
    members = [member for member in optimizer._named_params() if member.param.grad is not None]
    optimizer._check_keys()
    if found_inf is not None and bool(found_inf):
        optimizer._skipped += 1
        return
    if not members:
        return
    if not is_observed(optimizer):
        for member in members:
            check_tensor(member.name, member.param)
    tensors = {member.name: member.param for member in members}
    grads = {name: p.grad for name, p in tensors.items()}
    masters: dict[str, torch.Tensor] = {}
    groups: list[dict[str, Any]] = []
    for k, group in enumerate(optimizer.param_groups):
        own = {member.name: member.param for member in members if member.group == k}
        if not own:
            continue
        options = numbers_of(group, next(iter(own.values())).device, grad_scale, recorded=recorded)
        if options["nonfinite"] != "propagate" and not recorded:
            raise ValueError(f"nonfinite must be 'propagate' in a step that is traced; got {options['nonfinite']!r}")
        if options["master_weights"]:
            halves = {name: p for name, p in own.items() if is_half(p)}
            masters |= {name: optimizer.state.get(p, {}).get("master", p.float()) for name, p in halves.items()}
        # Copies, since autograd needs the values that are overwritten.
        named = {name: masters.get(name, p).clone() for name, p in own.items()}
        groups.append({"params": named, **options, "master_weights": False})
    before = _state(optimizer, tensors)
    with torch.set_grad_enabled(recorded), SignalScope():
        after, state = update(groups, grads, before, nonfinite="propagate", layer_of=optimizer._labels().get)
        defer_signals()
        for group in after:
            for name, new in group["params"].items():
                p = tensors[name]
                own = optimizer.state.setdefault(p, {}) if needs_buffer(group) or name in masters else {}
                p.copy_(new)
                if name in masters:
                    own["master"] = masters[name].copy_(new)
                if needs_buffer(group):
                    buffer, kept = state.momentum_buffers[name], own.get("momentum_buffer")
                    own["momentum_buffer"] = buffer if recorded or kept is None else kept.copy_(buffer)
                if reads_previous_lr(group["rule"]):
                    lr = torch.as_tensor(group["lr"], dtype=torch.float64).detach()
                    optimizer.state.setdefault(p, {})["previous_lr"] = lr
        if recorded:  # a graph does not count its runs
            optimizer._taken += 1


def _state(optimizer: Any, tensors: dict[str, torch.Tensor]) -> State:
    """Return the state of `lars_array.update` before a step."""
    kept = {name: optimizer.state.get(p, {}) for name, p in tensors.items()}
    buffers = {name: own["momentum_buffer"] for name, own in kept.items() if own.get("momentum_buffer") is not None}
    state, names = init(tensors), sorted(tensors)
    rates = [torch.as_tensor(kept[name].get("previous_lr", 0.0), dtype=torch.float64) for name in names]
    return state._replace(
        momentum_buffers=state.momentum_buffers | buffers,
        first=state.first.new_tensor([name not in buffers for name in names]),
        previous_lr=torch.stack([rate.to(state.previous_lr) for rate in rates]),
    )
