"""State dicts, checked whole before any of it is loaded."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from math import inf
from numbers import Real
from typing import Any, NamedTuple

from lars_array.hyperparams import DEFAULTS, at_step, complete
from lars_array.state.store import KEPT

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
    _check_keys("state_dict", state_dict, {"steps", "skipped_steps", "param_groups", "state"})
    for count in ("steps", "skipped_steps"):
        if isinstance(state_dict[count], bool) or not isinstance(state_dict[count], int):
            raise TypeError(f"{count} must be an integer; got {state_dict[count]!r}")
        if state_dict[count] < 0:
            raise ValueError(f"{count} must be at least 0; got {state_dict[count]!r}")

    groups = []
    for group in _listed("param_groups", state_dict["param_groups"]):
        _check_keys("a group of state_dict", group, {"lr", "names", *DEFAULTS}, open_end=True)
        options = copy.deepcopy(complete({key: value for key, value in group.items() if key != "names"}))
        at_step(options, state_dict["steps"])
        groups.append(options)
    names = [list(group) for group in names_of_groups]
    loaded = [_listed("names", group["names"]) for group in state_dict["param_groups"]]
    if loaded != names:
        raise ValueError(f"state_dict must be of parameters named {names!r}, by group; got {loaded!r}")

    flat = [name for group in names for name in group]
    _check_keys("state of state_dict", state_dict["state"], set(flat))
    read: dict[str, dict[str, Any]] = {}
    for name, p in zip(flat, params, strict=True):
        own = state_dict["state"][name]
        _check_keys(f"the state of {name!r}", own, {"previous_lr"}, optional=set(KEPT))
        for key, check in KEPT.items():
            if own.get(key) is not None:
                check(name, own[key], p)
        read[name] = {**own, "previous_lr": _previous_lr(name, own["previous_lr"])}
    return Checkpoint(state_dict["steps"], state_dict["skipped_steps"], groups, read)


def _check_keys(
    what: str, given: Any, wanted: set[str], *, optional: set[str] | None = None, open_end: bool = False
) -> None:
    if not isinstance(given, Mapping):
        raise TypeError(f"{what} must be a mapping; got {given!r}")
    missing = wanted - given.keys()
    if missing:
        raise ValueError(f"{what} must hold the key {min(missing)!r}; got {list(given)!r}")
    unknown = given.keys() - wanted - (optional or set())
    if unknown and not open_end:
        raise ValueError(
            f"{what} must hold no other keys than {sorted(wanted | (optional or set()))!r}; got {min(unknown)!r}"
        )


def _listed(what: str, given: Any) -> list[Any]:
    if not isinstance(given, (list, tuple)):
        raise TypeError(f"{what} must be a list; got {given!r}")
    return list(given)


def _previous_lr(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"previous_lr of {name!r} must be a number; got {value!r}")
    if not 0 <= float(value) < inf:
        raise ValueError(f"previous_lr of {name!r} must be finite and at least 0; got {value!r}")
    return float(value)
