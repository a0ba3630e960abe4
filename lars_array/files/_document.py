"""The state of an optimizer as a document of JSON and named arrays, and back."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from lars_array._messages import shown
from lars_array.files._container import Container
from lars_array.files._values import NotStorableError, read_value, stored_rule, stored_value
from lars_array.functional import State
from lars_array.hyperparams import DEFAULTS, NUMBERS
from lars_array.state.store import KEPT

__all__ = ["document_of", "functional_state_in", "state_dict_in"]

_FIELDS = ("step", "first", "previous_lr")  # the arrays of a State that are not by name


def document_of(state: Any, omit: frozenset[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the document of a `State` or of a state dict, and its arrays by key.

    Raises
    ------
    TypeError
        For a hyper-parameter that is only code.
    ValueError
        If `omit` names none.
    """
    unknown = sorted(omit - {"lr", *DEFAULTS})
    if unknown:
        raise ValueError(f"omit must name hyper-parameters; got {shown(unknown[0])}")
    if isinstance(state, State):
        arrays = {f"momentum_buffer/{name}": v for name, v in state.momentum_buffers.items()}
        arrays |= {f"state/{field}": getattr(state, field) for field in _FIELDS}
        return {"kind": "State"}, arrays
    groups = [_stored_group(number, group, omit) for number, group in enumerate(state["param_groups"])]
    arrays, rates = {}, {}
    for name, own in state["state"].items():
        rates[name] = stored_value(own["previous_lr"])
        arrays |= {f"{kind}/{name}": own[kind] for kind in KEPT if own.get(kind) is not None}
    counts = {key: int(state[key]) for key in ("steps", "skipped_steps")}
    document = {"kind": "state_dict", **counts, "param_groups": groups, "previous_lr": rates, "omitted": sorted(omit)}
    return document, arrays


def _stored_group(number: int, group: Mapping[str, Any], omit: frozenset[str]) -> dict[str, Any]:
    options = {}
    for key, value in group.items():
        if key == "names" or key in omit:
            continue
        try:
            options[key] = stored_rule(value) if key == "rule" else stored_value(value)
        except NotStorableError as error:
            way = "register it under a name with lars_array.register, or"
            if key != "rule":
                way = "use a schedule of lars_array.schedules, or" if key in NUMBERS else "give another value, or"
            raise TypeError(
                f"{key} of parameter group {number} must be data to be saved; got {error}: {way} leave it out by "
                f"omit=({key!r},) and give it to the optimizer that loads the file"
            ) from None
    return {"names": list(group["names"]), "options": options}


def state_dict_in(file: Container, read: Callable[[str], Any]) -> dict[str, Any]:
    """Return the state dict in a file, with what `read` returns for the key of an array in the place of the array.

    Raises
    ------
    ValueError, TypeError
        If it holds none.
    """
    document = file.document
    if document.get("kind") != "state_dict":
        raise ValueError(f"it must hold a state dict; got {shown(document.get('kind'))}")
    groups, rates = document.get("param_groups"), document.get("previous_lr")
    if not isinstance(groups, list) or not isinstance(rates, dict):
        raise ValueError(f"its groups must be a list, and its rates by name; got {shown(groups)} and {shown(rates)}")
    omitted = document.get("omitted")
    if not isinstance(omitted, list) or not all(isinstance(name, str) for name in omitted):
        raise ValueError(f"omitted must be a list of names; got {shown(omitted)}")
    state = {name: {"previous_lr": read_value(rate)} for name, rate in rates.items()}
    for key in sorted(file.keys):
        kind, _, name = key.partition("/")
        if kind == "state" or (kind in KEPT and name not in state):
            raise ValueError(f"it must hold no array for an unknown parameter; got {shown(key)}")
        if kind in KEPT:
            state[name][kind] = read(key)
    counts = {key: document.get(key) for key in ("steps", "skipped_steps")}
    for key, count in counts.items():
        if type(count) is not int or not 0 <= count < 2**63:
            raise ValueError(f"{key} must be an integer from 0 to 2**63 - 1; got {shown(count)}")
    return {**counts, "param_groups": [_group_in(group, omitted) for group in groups], "state": state}


def _group_in(group: Any, omitted: list[str]) -> dict[str, Any]:
    if not isinstance(group, dict) or group.keys() != {"names", "options"} or not isinstance(group["options"], dict):
        raise ValueError(f"a group must hold names and options; got {shown(group)}")
    names = group["names"]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"the names of a group must be strings; got {shown(names)}")
    lacking = {"lr", *DEFAULTS} - group["options"].keys()
    if lacking != set(omitted):
        raise ValueError(f"a group must lack the options {shown(omitted)}; got one that lacks {shown(sorted(lacking))}")
    return {key: read_value(x) for key, x in group["options"].items()} | {"names": names}


def functional_state_in(file: Container) -> State:
    """Return the `State` in a file."""
    fields = {field: f"state/{field}" for field in _FIELDS}
    lacking = [key for key in fields.values() if key not in file.keys]
    if lacking:
        raise ValueError(f"it must hold {shown(lacking[0])}")
    buffers = {key.partition("/")[2]: key for key in sorted(file.keys) if key.startswith("momentum_buffer/")}
    lengths = {field: math.prod(file.form(key).shape) for field, key in fields.items()}
    if lengths != {"step": 1, "first": len(buffers), "previous_lr": len(buffers)}:
        raise ValueError(f"its state must be of {len(buffers)} parameters; got {lengths}")
    arrays = {field: file.read(key) for field, key in fields.items()}
    return State(momentum_buffers={name: file.read(key) for name, key in buffers.items()}, **arrays)
