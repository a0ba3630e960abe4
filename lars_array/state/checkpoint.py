"""State dicts: checked before they are loaded."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, NamedTuple

from lars_array._arrays import dtype_name
from lars_array._messages import Problems, listed, located, near, shown
from lars_array.hyperparams import DEFAULTS, at_step, complete
from lars_array.state.store import KEPT, check_previous_lr

__all__ = ["Checkpoint", "Problems", "check_params", "fitted", "located_in_file", "read_checkpoint"]


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
        If a key is missing or unknown, or a value does not fit. Names, options and arrays that do not fit are all in
        one message, the first of them in words.
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

    problems, groups, names_of = Problems(), [], []
    saved = _listed("param_groups", state_dict["param_groups"])
    for number, group in enumerate(saved):
        with located(f"parameter group {number} of state_dict" if len(saved) > 1 else ""):
            _check_keys("a group of state_dict", group, {"names"}, open_end=True)
            names_of.append(_listed("names", group["names"]))
            with problems.noted(), located(f"parameter group {number} of state_dict" if len(saved) > 1 else ""):
                _check_keys("a group of state_dict", group, {"lr", "names", *DEFAULTS}, open_end=True)
                options = copy.deepcopy(complete({key: value for key, value in group.items() if key != "names"}))
                at_step(options, state_dict["steps"])
                groups.append(options)
    names = [list(group) for group in names_of_groups]
    if names_of != names:
        problems.errors.append(_other_names(names, names_of))
    with problems.noted():
        known = set(chain(*names)) if names_of == names else set()
        _check_keys("state of state_dict", state_dict["state"], known, open_end=not known, of_names=True)
    read: dict[str, dict[str, Any]] = {}
    of_names = state_dict["state"] if isinstance(state_dict["state"], Mapping) else {}
    for name, p in zip(chain(*names), params, strict=True):
        if name not in of_names:
            continue
        own = of_names[name]
        with problems.noted():
            _check_keys(f"the state of {shown(name)}", own, {"previous_lr"}, optional=set(KEPT))
            read[name] = {**own, "previous_lr": check_previous_lr(name, own["previous_lr"])}
        for key, check in KEPT.items():
            if isinstance(own, Mapping) and own.get(key) is not None:
                with problems.noted():
                    check(name, own[key], p)
    problems.raise_all()
    return Checkpoint(state_dict["steps"], state_dict["skipped_steps"], groups, read)


def fitted(state_dict: Any, param_groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return a state dict of a file with its names in the groups of an optimizer.

    Parameters
    ----------
    state_dict : mapping
        Not modified. Its names may come in another order, and in other groups if these have the same options; other
        names are left as they are. Options that it lacks are those of the optimizer.
    param_groups : sequence of mappings
        Those of the optimizer, with "names".

    Raises
    ------
    ValueError
        If names of one group come from groups with different options.
    """
    options: dict[str, dict[str, Any]] = {}
    for group in state_dict["param_groups"]:
        own = {key: x for key, x in group.items() if key != "names"}
        options |= {name: own for name in group["names"]}
    lengths = [sum(len(group["names"]) for group in x) for x in (param_groups, state_dict["param_groups"])]
    if options.keys() != set(chain(*(group["names"] for group in param_groups))) or lengths[0] != lengths[1]:
        return {**state_dict, "param_groups": [_completed(x, param_groups) for x in state_dict["param_groups"]]}
    groups = []
    for group in param_groups:
        names = list(group["names"])
        first = options[names[0]] if names else {}
        for name in names:
            if options[name] is not first and not _is_alike(options[name], first):
                raise ValueError(
                    f"state_dict must have the same options for {shown(names[0])} and {shown(name)}, which are in one "
                    "parameter group here"
                )
        groups.append(_completed(first | {"names": names}, param_groups))
    return {**state_dict, "param_groups": groups}


def _is_alike(options: Mapping[str, Any], others: Mapping[str, Any]) -> bool:
    """Return whether options are the same but for `layer_axes`, which belong to the parameters."""
    return {**options, "layer_axes": 0} == {**others, "layer_axes": 0}


def _completed(group: Mapping[str, Any], param_groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return a group with the options that it lacks from the group of an optimizer that its first name is in."""
    first = next(iter(group["names"]), None)
    own = next((x for x in param_groups if first in x["names"]), {})
    return {key: x for key, x in own.items() if key in ("lr", *DEFAULTS)} | dict(group)


def check_params(saved: Mapping[str, Any] | None, given: Mapping[str, Any]) -> None:
    """Raise ValueError unless saved parameters have the names, shapes and types of those given, with all misfits.

    Parameters
    ----------
    saved : mapping of name to array, or None
        NumPy arrays, or of their shapes and types.
    given : mapping of name to array
        Arrays of any library.
    """
    if saved is None:
        raise ValueError("it holds no parameters: give params to save as well")
    problems = Problems()
    lacking, surplus = ([name for name in a if name not in b] for a, b in ((given, saved), (saved, given)))
    for what, found in (("lacks", lacking), ("holds, beside those given,", surplus)):
        if found:
            problems.errors.append(ValueError(f"it {what} the parameters {listed(map(shown, found))}"))
    for name in [name for name in given if name in saved]:
        (kind, shape), ours = ((dtype_name(x.dtype), tuple(x.shape)) for x in (saved[name], given[name]))
        if (kind, shape) != ours:
            text = f"parameter {shown(name)} must be of {ours[0]} {shown(ours[1])}; got {kind} {shown(shape)}"
            problems.errors.append(ValueError(text))
    problems.raise_all()


@contextmanager
def located_in_file(path: Any) -> Iterator[None]:
    """Raise a ValueError, with the path of a file, for an error about its contents."""
    try:
        yield
    except (ValueError, TypeError, OverflowError) as error:
        if type(error) not in (ValueError, TypeError, OverflowError):
            raise
        raise ValueError(f"{error!s:.350} (file {shown(str(path))})") from error


def _other_names(names: list[list[str]], loaded: list[list[Any]]) -> ValueError:
    """Return the error for other names than the parameters': all names, or those that differ where these are many."""
    ours, theirs = list(chain(*names)), list(chain(*loaded))
    start = "state_dict must be of parameters named"
    if (str(names), str(loaded)) == (shown(names), shown(loaded)):
        return ValueError(f"{start} {shown(names)}, by group; got {shown(loaded)}")
    known, found = set(map(shown, ours)), set(map(shown, theirs))
    lacking, surplus = [x for x in ours if shown(x) not in found], [x for x in theirs if shown(x) not in known]
    parts = [f"{what} {listed(map(shown, x)):.80}" for what, x in (("no", lacking), ("the unknown", surplus)) if x]
    if parts:
        return ValueError(f"{start} as these are; it has {' and '.join(parts)}")
    first = next((f": {shown(a)}, not {shown(b)}" for a, b in zip(theirs, ours) if a != b), "")
    return ValueError(f"{start} {shown(names)}, by group; got {shown(loaded)}{first}")


def _refuse_others(state_dict: Any) -> None:
    """Raise for a state dict of another optimizer, with its keys."""
    groups = state_dict.get("param_groups") if isinstance(state_dict, Mapping) else None
    if isinstance(groups, list) and groups and isinstance(groups[0], Mapping) and "names" not in groups[0]:
        options = [key for key in groups[0] if key != "params"]
        if "params" in groups[0]:
            own = f"got one of another optimizer, with the options {listed(map(shown, options))}"
            raise ValueError(f"state_dict must be of lars_array.LARS; {own}. lars_torch.LARS loads those of torch")


def _check_keys(
    what: str,
    given: Any,
    wanted: set[str],
    *,
    optional: set[str] | None = None,
    open_end: bool = False,
    of_names: bool = False,
) -> None:
    if not isinstance(given, Mapping):
        raise TypeError(f"{what} must be a mapping; got {shown(given)}")
    missing = wanted - given.keys()
    if len(missing) > 1 and of_names:
        raise ValueError(f"{what} must hold the keys {listed(map(shown, sorted(missing)))}; got {shown(list(given))}")
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
