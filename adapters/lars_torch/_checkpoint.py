"""Checkpoints of this class, of other LARS and of SGD: checked whole before any of it is loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import inf
from typing import Any

import numpy as np
import torch

from lars_array._stepper import KEPT, listed, reads_previous_lr, shown
from lars_array.hyperparams import DEFAULTS, unknown_option
from lars_torch._arrays import compute_dtype
from lars_torch._dtensors import is_dtensor, spread_as
from lars_torch._hyperparams import check_group
from lars_torch._keys import PROCESSES, foreign_keys, resembles, translated

__all__ = ["load"]


def load(optimizer: Any, load_as_torch_does: Callable[[Any], None], state_dict: Mapping[str, Any]) -> None:
    """Load `state_dict` into `optimizer`; see `lars_torch.LARS.load_state_dict`."""
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= state_dict.keys():
        got = listed(map(shown, state_dict)) if state_dict and isinstance(state_dict, Mapping) else shown(state_dict)
        raise TypeError(f"state_dict must be a mapping with the keys 'state' and 'param_groups'; got {got}")
    if "steps" in state_dict:
        state_dict = _from_lars_array(optimizer, state_dict)
    else:
        state_dict = _translated(state_dict)
    given: list[Any] = []

    def check(_: Any, hooked: Any) -> Any:  # after all other hooks, and before anything is changed
        hooked = _spread(optimizer, _by_name(optimizer, hooked))
        _check_origin(optimizer.param_groups, hooked)
        hooked = _filled(optimizer, hooked)
        given.extend(_check(optimizer, hooked))
        return hooked

    processes = [{key: group[key] for key in PROCESSES if key in group} for group in optimizer.param_groups]

    def restore(_: Any) -> None:  # before all other hooks, which get the state as it will be
        _restore(optimizer, given)
        for group, mine in zip(optimizer.param_groups, processes, strict=True):
            group |= mine

    handles = [
        optimizer.register_load_state_dict_pre_hook(check),
        optimizer.register_load_state_dict_post_hook(restore, prepend=True),
    ]
    try:
        load_as_torch_does(state_dict)
    finally:
        for handle in handles:
            handle.remove()


def _check(optimizer: Any, state_dict: Mapping[str, Any]) -> list[tuple[torch.Tensor, str, Any]]:
    """Raise unless a checkpoint fits the parameters; return what it holds for these."""
    groups, saved = optimizer.param_groups, state_dict["param_groups"]
    if [len(group["params"]) for group in groups] != [len(group["params"]) for group in saved]:
        return []  # torch has a better message
    for group in saved:
        check_group(optimizer.defaults | group)
    kept = _kept(optimizer, state_dict)
    for p, key, v in kept:
        if key == "previous_lr":
            if not 0 <= float(v) < inf:
                raise ValueError(f"previous_lr must be finite and at least 0; got {shown(v)}")
            continue
        if type(v) is torch.Tensor and v.dtype == p.dtype and v.shape == p.shape and v.layout == torch.strided:
            continue  # as for most, and faster
        if not isinstance(v, torch.Tensor) or v.shape != p.shape or v.layout != torch.strided:
            found = tuple(v.shape) if isinstance(v, torch.Tensor) else shown(v)
            name = next(member.name for member in optimizer._named_params() if member.param is p)
            raise ValueError(f"{key} of {name!r} must have the parameter's shape {tuple(p.shape)!r}; got {found}")
        if v.is_complex() != p.is_complex() or not (v.is_floating_point() or v.is_complex()):
            raise ValueError(f"{key} must be of a type like {p.dtype}, the parameter's; got {v.dtype}")
    return kept


def _filled(optimizer: Any, state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a checkpoint whose groups have those options of the optimizer's that they lack; others don't save all."""
    groups = list(state_dict["param_groups"])
    for number, (own, saved) in enumerate(zip(optimizer.param_groups, groups)):
        groups[number] = {key: own[key] for key in optimizer.defaults if key in own} | saved
    return {**state_dict, "param_groups": groups}


def _check_origin(groups: list[dict[str, Any]], state_dict: Mapping[str, Any]) -> None:
    """Refuse checkpoints of other optimizers, by the keys that these alone write."""
    saved, known = state_dict["param_groups"], {key for group in groups for key in group}
    foreign = {key for group in saved for key in foreign_keys(group, known)}
    misnamed = {key for key in foreign if resembles(key)}
    if not any("rule" in group for group in saved):  # those of this class hold what wrappers keep in its state
        numbers = {number for group in saved for number in group["params"]}
        own = [kept for number, kept in state_dict["state"].items() if number in numbers]
        foreign |= {key for kept in own for key in kept} - {*KEPT, "previous_lr"}
    if foreign:
        reason = "".join(f"; {unknown_option(key)}" for key in sorted(misnamed)[:1])
        raise ValueError(
            f"state_dict must be of LARS or SGD; got one with {listed(map(shown, sorted(foreign, key=str)))}{reason}"
        )


@torch.no_grad()
def _restore(optimizer: Any, kept: list[tuple[torch.Tensor, str, Any]]) -> None:
    """Copy momentum buffers and masters once more, since torch casts them to the parameters' type."""
    for p, key, v in kept:
        if key == "previous_lr":
            new = torch.tensor(float(v), dtype=torch.float64)
        else:
            kind = compute_dtype(p)
            is_alike = v.dtype == kind and v.device == p.device and v.stride() == p.stride()
            new = v.clone() if is_alike else torch.empty_like(p, dtype=kind, requires_grad=False).copy_(v)
        optimizer.state[p][key] = new
    for p, own in list(optimizer.state.items()):
        if isinstance(own, dict) and own.get("momentum_buffer", p) is None:
            del optimizer.state[p]  # SGD of older torch writes None where there is none


def _kept(optimizer: Any, state_dict: Mapping[str, Any]) -> list[tuple[torch.Tensor, str, Any]]:
    """Return what a checkpoint holds for parameters: of each the parameter, the key, and the tensor or number."""
    found, keys = [], (*KEPT, "previous_lr")
    for group, saved in zip(optimizer.param_groups, state_dict["param_groups"]):
        for p, number in zip(group["params"], saved["params"]):
            own = state_dict["state"].get(number)
            if own:
                found += [(p, key, v) for key in keys if (v := own.get(key)) is not None]
    return found


def _by_name(optimizer: Any, state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a checkpoint with its parameters in the order of the optimizer's, if both have names and share some."""
    groups = state_dict["param_groups"]
    saved, own = ([group.get("param_names") for group in x] for x in (groups, optimizer.param_groups))
    if saved == own or None in saved or None in own or len(saved) != len(own):
        return state_dict
    theirs, ours = ([name for names in x for name in names] for x in (saved, own))
    has_repeats = len(set(theirs)) < len(theirs) or len(set(ours)) < len(ours)
    if has_repeats or set(theirs).isdisjoint(ours):  # as torch does: by position
        return state_dict
    if set(theirs) != set(ours):
        name = min(set(theirs) ^ set(ours))
        place = "the optimizer" if name in theirs else "state_dict"
        raise ValueError(f"state_dict must be of the same parameters by name; {name!r} is missing in {place}")
    number = dict(zip(theirs, (i for group in groups for i in group["params"]), strict=True))
    ordered = [
        {**group, "params": [number[name] for name in names], "param_names": list(names)}
        for group, names in zip(groups, own, strict=True)
    ]
    return {**state_dict, "param_groups": ordered}


def _spread(optimizer: Any, state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a checkpoint with whole tensors cut as the parameters are."""
    saved, own = state_dict["param_groups"], optimizer.param_groups
    pairs = [(p, n) for group, other in zip(own, saved) for p, n in zip(group["params"], other["params"])]
    state = dict(state_dict["state"])
    for p, number in pairs:
        kept = state.get(number)
        if isinstance(kept, Mapping) and any(is_dtensor(x) for x in (p, *kept.values())):
            state[number] = dict(kept) | {key: spread_as(key, x, p) for key, x in kept.items() if key in KEPT}
    return {**state_dict, "state": state}


def _translated(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Return a checkpoint of another LARS with the names of this one."""
    state = dict(state_dict["state"])
    for number, own in state.items():
        if isinstance(own, dict) and "momentum_buffer" not in own and isinstance(own.get("mu"), torch.Tensor):
            state[number] = {"momentum_buffer" if key == "mu" else key: v for key, v in own.items()}  # FAIR's
    return {**state_dict, "state": state, "param_groups": [*map(translated, state_dict["param_groups"])]}


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
            got = f"{listed(map(shown, unknown)):.100}"
            raise ValueError(f"state_dict must be of parameters named {listed(map(shown, index))}; got {got}")
        keys = [index[name] for name in names]
        options = {key: group[key] for key in ("lr", *DEFAULTS) if key in group}
        kinds = (*KEPT, "previous_lr") if reads_previous_lr(options.get("rule", "flash")) else tuple(KEPT)
        for key, name in zip(keys, group["names"]):
            own = state_dict["state"][name]
            state[key] = {kind: torch.from_numpy(np.asarray(own[kind])) for kind in kinds if own.get(kind) is not None}
        if _has_names(optimizer):
            options["param_names"] = names
        groups.append({"params": keys, **options})
    return {"state": state, "param_groups": groups}


def _has_names(optimizer: Any) -> bool:
    return any("param_names" in group for group in optimizer.param_groups)
