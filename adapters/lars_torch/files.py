"""Saving and loading by `lars_array.save` and `load`: the state by the names of parameters, and the model's tensors."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch

import lars_array
from lars_array import Saved
from lars_array._arrays import dtype_name, form_of
from lars_array._stepper import KEPT, shown, uninterrupted
from lars_array.state.checkpoint import Problems, check_params, fitted, located_in_file, read_checkpoint
from lars_torch._arrays import has_bfloat16
from lars_torch._dtensors import is_dtensor
from lars_torch._hyperparams import check_group
from lars_torch._keys import FIXED, NAMES
from lars_torch.optimizer import LARS

__all__ = ["load", "save"]

OWN = "lars_torch"  # in the metadata: what groups hold beside hyper-parameters


def save(
    path: Any,
    optimizer: LARS,
    *,
    params: Any = None,
    metadata: Mapping[str, Any] | None = None,
    omit: Collection[str] = (),
) -> None:
    """Save the state of an optimizer by the names of parameters, see `lars_array.save`.

    Parameters
    ----------
    path : str or path
        As there.
    optimizer : LARS
        Not modified.
    params : torch.nn.Module, or mapping of name to Tensor, optional
        Saved as well, a module with all tensors of its ``state_dict``. Its names are those of the optimizer's
        parameters in the file. None: names are those that the optimizer was given, or positions such as "0".
    metadata : dict, optional
        As there.
    omit : collection of str, optional
        As there.

    Raises
    ------
    TypeError
        For DTensors: torch.distributed.checkpoint saves the ``state_dict`` of an optimizer of these. And as there.
    ValueError, OSError
        As there.
    """
    if not isinstance(optimizer, LARS):
        raise TypeError(f"optimizer must be a lars_torch.LARS; got {torch.typename(optimizer)}")
    tensors = _tensors_of(params)
    _check_whole([*optimizer._params, *(tensors or {}).values()])
    names = _names(optimizer, params)
    optimizer.synchronize()
    saved, start = optimizer.state_dict(), 0
    groups, others, state = [], [], {}
    for group in saved["param_groups"]:
        own = names[start : start + len(group["params"])]
        start += len(own)
        groups.append({"names": own, **{key: group[key] for key in NAMES}})
        others.append({"names": own, "options": {key: x for key, x in group.items() if key not in FIXED}})
        for name, number in zip(own, group["params"], strict=True):
            kept = saved["state"].get(number, {})
            state[name] = {key: kept[key] for key in KEPT if kept.get(key) is not None}
            state[name]["previous_lr"] = float(kept.get("previous_lr", 0.0))
    counts = {"steps": optimizer.steps, "skipped_steps": optimizer.skipped_steps}
    if OWN in (metadata or {}):
        raise ValueError(f"metadata must not hold the key {OWN!r}, under which the options of other programs are saved")
    more = {OWN: others} if any(group["options"] for group in others) else {}
    state_dict = {**counts, "param_groups": groups, "state": state}
    lars_array.save(path, state_dict, params=tensors, metadata={**(metadata or {}), **more}, omit=omit)


def load(path: Any, optimizer: LARS | None = None, *, params: Any = None) -> Saved:
    """Load a file of `save`, of `lars_array.save` or of `lars_jax.save`.

    Parameters
    ----------
    path : str or path
        The file.
    optimizer : LARS, optional
        Takes over the state by the names of its parameters; by their positions, if it has no names and `params` is
        None. It goes on counting steps where the file ends.
    params : torch.nn.Module, or mapping of name to Tensor, optional
        Tensors into which those in the file are copied, which have their names, shapes and types. The names are those
        of the optimizer's parameters in the file.

    Returns
    -------
    Saved
        See `lars_array.load`; "params" are tensors.

    Raises
    ------
    ValueError, OSError
        As `lars_array.load` does. Then nothing was changed.
    """
    if optimizer is not None and not isinstance(optimizer, LARS):
        raise TypeError(f"optimizer must be a lars_torch.LARS; got {torch.typename(optimizer)}")
    tensors = _tensors_of(params)
    _check_whole([*([] if optimizer is None else optimizer._params), *(tensors or {}).values()])
    saved = lars_array.load(path)
    others = saved.metadata.pop(OWN, []) if _is_own(saved.metadata.get(OWN)) else []
    problems, state = Problems(), dict[str, Any]()
    more: list[dict[str, Any]] = []
    with located_in_file(path):
        if optimizer is not None:
            with problems.noted():
                state, more = _fitted(optimizer, saved.state, params, others)
        if tensors is not None:
            with problems.noted():
                check_params(saved.params, tensors)
        problems.raise_all()
    new = None if saved.params is None else {name: _tensor(x) for name, x in saved.params.items()}
    with uninterrupted(), torch.no_grad():
        if optimizer is not None:
            _load_state(optimizer, state, more)
        if tensors is not None and new is not None:
            for name, p in tensors.items():
                p.copy_(new[name])
    state_left = saved.state if optimizer is None else None
    return saved._replace(state=state_left, params=new if tensors is None else None)


def _is_own(x: Any) -> bool:
    """Return whether metadata are those that `save` adds."""
    return isinstance(x, list) and all(
        isinstance(group, dict) and group.keys() == {"names", "options"} and isinstance(group["options"], dict)
        for group in x
    )


def _fitted(
    optimizer: LARS, state: Any, params: Any, others: list[dict[str, Any]]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the state in a file as one of the optimizer's parameters, by their own names, and other options by group.

    Raises ValueError or TypeError if it is not.
    """
    if not isinstance(state, Mapping):
        raise ValueError("it holds the state of lars_array.update, which LARS can't take over")
    names = _names(optimizer, params)
    groups, start = [], 0
    for group in optimizer.param_groups:
        groups.append({**group, "names": names[start : start + len(group["params"])]})
        start += len(group["params"])
    if params is None and not any("param_names" in group for group in optimizer.param_groups):
        state, others = _by_position(state, others)
    forms = [_form(p) for p in optimizer._params]
    state = fitted(state, groups)
    read_checkpoint(state, [group["names"] for group in groups], forms)
    for group in state["param_groups"]:
        check_group(optimizer.defaults | {key: _like_torch(group[key], None) for key in NAMES if key in group})
    more: list[dict[str, Any]] = [
        next((x["options"] for x in others if set(x["names"]) == set(group["names"])), {}) for group in groups
    ]
    own = dict(zip(names, (member.name for member in optimizer._named_params()), strict=True))
    renamed = [{**group, "names": [own[name] for name in group["names"]]} for group in state["param_groups"]]
    state = {**state, "param_groups": renamed, "state": {own[name]: kept for name, kept in state["state"].items()}}
    return state, more


def _load_state(optimizer: LARS, state: dict[str, Any], more: list[dict[str, Any]]) -> None:
    for group, own in zip(state["param_groups"], optimizer.param_groups, strict=True):
        group |= {key: _like_torch(x, own.get(key)) for key, x in group.items() if key in NAMES}
    optimizer.load_state_dict(state)
    for group, options in zip(optimizer.param_groups, more, strict=True):
        group.update({key: _like_torch(x, group.get(key)) for key, x in options.items() if key not in FIXED})
    optimizer._taken, optimizer._skipped = state["steps"], state["skipped_steps"]


def _like_torch(x: Any, before: Any) -> Any:
    """Return a tensor for an array of shape (), on the device of the value before, and a number for NumPy's."""
    if isinstance(x, np.ndarray):
        device = before.device if isinstance(before, torch.Tensor) else None
        return torch.tensor(x.item(), dtype=getattr(torch, x.dtype.name), device=device)
    return x.item() if isinstance(x, np.generic) else x


def _by_position(state: Mapping[str, Any], others: list[dict[str, Any]]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return a state, and other options by group, with positions as the names of parameters."""
    names = [name for group in state["param_groups"] for name in group["names"]]
    number = {name: str(i) for i, name in enumerate(names)}
    groups = [{**group, "names": [number[name] for name in group["names"]]} for group in state["param_groups"]]
    own = {number.get(name, name): kept for name, kept in state["state"].items()}
    others = [{**group, "names": [number.get(name) for name in group["names"]]} for group in others]
    return {**state, "param_groups": groups, "state": own}, others


def _names(optimizer: LARS, params: Any) -> list[str]:
    """Return the names of the optimizer's parameters in a file."""
    members = optimizer._named_params()
    if params is None:
        return [member.name for member in members]
    known = params.named_parameters() if isinstance(params, torch.nn.Module) else params.items()
    name_of = {id(p): name for name, p in known}
    lacking = [member.name for member in members if id(member.param) not in name_of]
    if lacking:
        raise ValueError(f"params must hold all parameters of the optimizer; it lacks {shown(lacking[0])}")
    return [name_of[id(member.param)] for member in members]


def _tensors_of(params: Any) -> dict[str, torch.Tensor] | None:
    if params is None:
        return None
    if not isinstance(params, torch.nn.Module | Mapping):
        raise TypeError(f"params must be a module or a mapping of names to tensors; got {torch.typename(params)}")
    tensors = dict(params.state_dict() if isinstance(params, torch.nn.Module) else params)
    for name, p in tensors.items():
        if not isinstance(p, torch.Tensor):
            raise TypeError(f"params must hold tensors; got {shown(p)} for {shown(name)}")
    return tensors


def _check_whole(tensors: list[torch.Tensor]) -> None:
    if any(map(is_dtensor, tensors)):
        raise TypeError(
            "parameters must be whole tensors; those that are spread over processes, DTensors, and the state_dict of "
            "their optimizer are saved and loaded by torch.distributed.checkpoint"
        )


def _form(p: torch.Tensor) -> Any:
    """Return `form_of` a tensor."""
    has_bfloat16()  # which adds it to the types of NumPy
    return form_of(dtype_name(p.dtype), p.shape)


def _tensor(x: Any) -> torch.Tensor:
    """Return a tensor on the memory of a NumPy array."""
    if x.dtype.name == "bfloat16":
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(x)
