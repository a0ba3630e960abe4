"""Checkpoints of this class, of other LARS and of SGD: checked whole before any of it is loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from lars_array._stepper import KEPT, reads_previous_lr
from lars_array.hyperparams import DEFAULTS
from lars_torch._arrays import compute_dtype
from lars_torch._hyperparams import check_group

__all__ = ["load", "with_previous_lr"]

NAMES_OF_OTHERS = {"trust_coeff": "trust_coefficient"}  # timm's


def load(optimizer: Any, load_as_torch_does: Callable[[Any], None], state_dict: Mapping[str, Any]) -> None:
    """Load `state_dict` into `optimizer`; see `lars_torch.LARS.load_state_dict`."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict must be a mapping; got {state_dict!r}")
    if "steps" in state_dict and "state" in state_dict:
        state_dict = _from_lars_array(optimizer, state_dict)
    else:
        state_dict = _renamed(state_dict)
    given: list[Any] = []

    def check(_: Any, hooked: Any) -> None:  # after all other hooks, and before anything is changed
        _check(optimizer, hooked)
        given.append(hooked)

    def restore(_: Any) -> None:  # before all other hooks, which get the state as it will be
        _restore(optimizer, given[0])

    handles = [
        optimizer.register_load_state_dict_pre_hook(check),
        optimizer.register_load_state_dict_post_hook(restore, prepend=True),
    ]
    try:
        load_as_torch_does(state_dict)
    finally:
        for handle in handles:
            handle.remove()


def with_previous_lr(optimizer: Any, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return groups to be saved, with the learning rates of the last steps where a rule reads them."""
    reads = [reads_previous_lr(group["rule"]) for group in groups]
    if not any(reads):
        return groups
    known = optimizer._previous_lrs()
    rates = [[known.get(p, 0.0) for p in group["params"]] for group in optimizer.param_groups]
    return [saved | ({"previous_lr": own} if yes else {}) for saved, own, yes in zip(groups, rates, reads)]


def _check(optimizer: Any, state_dict: Mapping[str, Any]) -> None:
    """Raise unless a checkpoint fits the parameters."""
    groups, saved = optimizer.param_groups, state_dict["param_groups"]
    if [len(group["params"]) for group in groups] != [len(group["params"]) for group in saved]:
        return  # torch has a better message
    for group in saved:
        check_group(optimizer.defaults | group)
    for p, key, v in _kept(optimizer, state_dict):
        if not isinstance(v, torch.Tensor) or v.shape != p.shape or v.layout != torch.strided:
            found = tuple(v.shape) if isinstance(v, torch.Tensor) else v
            raise ValueError(f"{key} must have the parameter's shape {tuple(p.shape)!r}; got {found!r}")
        if v.is_complex() != p.is_complex() or not (v.is_floating_point() or v.is_complex()):
            raise ValueError(f"{key} must be of a type like {p.dtype}, the parameter's; got {v.dtype}")


def _restore(optimizer: Any, state_dict: Mapping[str, Any]) -> None:
    """Copy momentum buffers and masters once more, since torch casts them to the parameters' type."""
    for p, key, v in _kept(optimizer, state_dict):
        new = torch.empty_like(p, dtype=compute_dtype(p), requires_grad=False)
        optimizer.state[p][key] = new.copy_(v.detach())
    for p in list(optimizer.state):
        if isinstance(optimizer.state[p], dict) and optimizer.state[p].get("momentum_buffer", p) is None:
            del optimizer.state[p]  # SGD of older torch writes None where there is none


def _kept(optimizer: Any, state_dict: Mapping[str, Any]) -> list[tuple[torch.Tensor, str, Any]]:
    """Return the momentum buffers and masters in a checkpoint: of each the parameter, the key, and the tensor."""
    found = []
    for group, saved in zip(optimizer.param_groups, state_dict["param_groups"]):
        for p, number in zip(group["params"], saved["params"]):
            own = state_dict["state"].get(number, {})
            found += [(p, key, own[key]) for key in KEPT if own.get(key) is not None]
    return found


def _renamed(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Return a checkpoint with this library's names for the hyper-parameters of others."""
    groups = [
        {ours: group[theirs] for theirs, ours in NAMES_OF_OTHERS.items() if theirs in group} | dict(group)
        for group in state_dict["param_groups"]
    ]
    return {**state_dict, "param_groups": groups}


def _from_lars_array(optimizer: Any, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Return a result of `lars_array.LARS.state_dict` in torch's form."""
    index = {member.name: i for i, member in enumerate(optimizer._named_params())}
    state, groups, position = {}, [], 0
    for group in state_dict["param_groups"]:
        names = list(group["names"])
        by_position = [str(position + i) for i in range(len(names))]
        position += len(names)
        if not set(names) <= index.keys() and not _has_names(optimizer):
            names = by_position  # torch's parameters have no names to compare: their order counts
        unknown = [name for name in names if name not in index]
        if unknown:
            raise ValueError(f"state_dict must be of parameters named {list(index)!r}; got {unknown[0]!r}")
        keys = [index[name] for name in names]
        for key, name in zip(keys, group["names"]):
            own = state_dict["state"][name]
            state[key] = {kind: torch.asarray(own[kind]) for kind in KEPT if own.get(kind) is not None}
        options = {key: group[key] for key in ("lr", *DEFAULTS) if key in group}
        options["previous_lr"] = [float(state_dict["state"][name]["previous_lr"]) for name in group["names"]]
        groups.append({"params": keys, **options})
    return {"state": state, "param_groups": groups}


def _has_names(optimizer: Any) -> bool:
    return any("param_names" in group for group in optimizer.param_groups)
