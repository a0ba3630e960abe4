"""State dicts, checked whole before any of it is loaded."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

from lars_array._messages import listed, located, near, shown
from lars_array.hyperparams import DEFAULTS, at_step, complete
from lars_array.state.store import KEPT, check_previous_lr

__all__ = ["Checkpoint", "read_checkpoint"]


class Checkpoint(NamedTuple):
    """A state dict as an optimizer takes it over."""

    steps: int
    skipped_steps: int
    groups: list[dict[str, Any]]
    state: dict[str, dict[str, Any]]


def read_checkpoint(state_dict: Any, names_of_groups: Sequence[Sequence[str]], params: Sequence[Any]) -> Checkpoint:
    """Check a state dict against the parameters it is for.

    Parameters
    ----------
    state_dict : mapping
        What `LARS.state_dict` returned; not modified.
    names_of_groups : sequence of sequences of str
        The names of the parameters, by group.
    params : sequence of arrays
        The parameters, in the order of their names.

    Returns
    -------
    Checkpoint
        What it holds, its arrays not copied.

    Raises
    ------
    ValueError
        If a key is missing or unknown, or a value does not fit.
    TypeError
        If a value is of the wrong kind.
    """
    _refuse_others(state_dict)
    _check_keys("state_dict", state_dict, {"steps", "skipped_steps", "param_groups", "state"})
    for count in ("steps", "skipped_steps"):
        if isinstance(state_dict[count], bool) or not isinstance(state_dict[count], int):
            raise TypeError(f"{count} must be an integer; got {shown(state_dict[count])}")
        if state_dict[count] < 0:
            raise ValueError(f"{count} must be at least 0; got {shown(state_dict[count])}")

    groups = []
    saved = _listed("param_groups", state_dict["param_groups"])
    for number, group in enumerate(saved):
        with located(f"parameter group {number} of state_dict" if len(saved) > 1 else ""):
            _check_keys("a group of state_dict", group, {"lr", "names", *DEFAULTS}, open_end=True)
            options = copy.deepcopy(complete({key: value for key, value in group.items() if key != "names"}))
            at_step(options, state_dict["steps"])
        groups.append(options)
    names = [list(group) for group in names_of_groups]
    loaded = [_listed("names", group["names"]) for group in state_dict["param_groups"]]
    if loaded != names:
        flat_loaded = [name for group in loaded for name in group]
        first = next((f": {shown(a)}, not {shown(b)}" for a, b in zip(flat_loaded, chain(*names)) if a != b), "")
        first = first if shown(names) == shown(loaded) else ""
        raise ValueError(f"state_dict must be of parameters named {shown(names)}, by group; got {shown(loaded)}{first}")

    flat = [name for group in names for name in group]
    _check_keys("state of state_dict", state_dict["state"], set(flat))
    read: dict[str, dict[str, Any]] = {}
    for name, p in zip(flat, params, strict=True):
        own = state_dict["state"][name]
        _check_keys(f"the state of {shown(name)}", own, {"previous_lr"}, optional=set(KEPT))
        for key, check in KEPT.items():
            if own.get(key) is not None:
                check(name, own[key], p)
        read[name] = {**own, "previous_lr": check_previous_lr(name, own["previous_lr"])}
    return Checkpoint(state_dict["steps"], state_dict["skipped_steps"], groups, read)


def _refuse_others(state_dict: Any) -> None:
    """Raise for a state dict of another optimizer, with its keys."""
    groups = state_dict.get("param_groups") if isinstance(state_dict, Mapping) else None
    if isinstance(groups, list) and groups and isinstance(groups[0], Mapping) and "names" not in groups[0]:
        options = [key for key in groups[0] if key != "params"]
        if "params" in groups[0]:
            own = f"got one of another optimizer, with the options {listed(map(shown, options))}"
            raise ValueError(f"state_dict must be of lars_array.LARS; {own}. lars_torch.LARS loads those of torch")


def _check_keys(
    what: str, given: Any, wanted: set[str], *, optional: set[str] | None = None, open_end: bool = False
) -> None:
    if not isinstance(given, Mapping):
        raise TypeError(f"{what} must be a mapping; got {shown(given)}")
    missing = wanted - given.keys()
    if missing:
        raise ValueError(f"{what} must hold the key {shown(min(missing))}; got {shown(list(given))}")
    unknown = given.keys() - wanted - (optional or set())
    if unknown and not open_end:
        keys, first = sorted(wanted | (optional or set())), next(key for key in given if key in unknown)
        raise ValueError(f"{what} must hold no other keys than {shown(keys)}; got {shown(first)}{near(first, keys)}")


def _listed(what: str, given: Any) -> list[Any]:
    if not isinstance(given, (list, tuple)):
        raise TypeError(f"{what} must be a list; got {shown(given)}")
    return list(given)
