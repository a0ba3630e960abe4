"""The forms in which parameters are given, and what becomes of them: lists of named arrays."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from lars_array.arrays import check_parameter, is_array

__all__ = ["Group", "Layout", "Position", "is_pair", "listed", "read_parameters"]


class Position(str):
    """The name of a parameter that has none: its position among all. It keeps it through `param_groups`."""

    __slots__ = ()


class Group(NamedTuple):
    """A parameter group as it was given: `names` and `arrays` of its parameters, and its own hyper-parameters."""

    names: list[str]
    arrays: list[Any]
    overrides: dict[str, Any]
    form: str  # "mapping", "pairs", "list" or "tuple"


class Layout(NamedTuple):
    """Parameters as they were given: their groups, and whether they were given as groups."""

    groups: list[Group]
    grouped: bool

    def rebuild(self, arrays: Iterable[Any]) -> Any:
        """Return `arrays`, one a parameter in order, in the form that the parameters were given in."""
        remaining = iter(arrays)
        rebuilt = [_in_form(group.form, group.names, [next(remaining) for _ in group.names]) for group in self.groups]
        if not self.grouped:
            return rebuilt[0]
        return [{"params": x, **group.overrides} for x, group in zip(rebuilt, self.groups, strict=True)]


def read_parameters(params: Any, *, start: int = 0) -> Layout:
    """Read parameters in any of the forms that `LARS` takes.

    Parameters
    ----------
    params : iterable of arrays, mapping, iterable of (name, array), or iterable of groups
        See `LARS`.
    start : int
        How many parameters there are already: one without a name is named by its position.

    Returns
    -------
    Layout
        The groups.

    Raises
    ------
    TypeError, ValueError
        If `params` has none of these forms, is empty, or holds what can't be a parameter.
    """
    if isinstance(params, Mapping):
        if "params" in params and not is_array(params["params"]):
            raise TypeError("params must be an iterable of groups, not one group; write [{'params': ...}]")
    elif not isinstance(params, tuple):
        params = listed(params)
    grouped = not isinstance(params, Mapping) and bool(params) and all(isinstance(item, Mapping) for item in params)
    groups = []
    for group in params if grouped else [{"params": params}]:
        if "params" not in group:
            raise ValueError(f"a parameter group must have the key 'params'; got the keys {list(group)!r}")
        names, arrays, form = _read_arrays(group["params"], start, group.get("names"))
        overrides = {key: value for key, value in group.items() if key not in ("params", "names")}
        groups.append(Group(names, arrays, overrides, form))
        start += len(names)
    names = [name for group in groups for name in group.names]
    repeated = (
        next((name for i, name in enumerate(names) if name in names[:i]), None)
        if len(set(names)) < len(names)
        else None
    )
    if repeated is not None:
        raise ValueError(f"names of parameters must differ; got {repeated!r} twice")
    if not names:
        raise ValueError("optimizer got an empty parameter list")
    return Layout(groups, grouped)


def listed(items: Any, what: str = "params") -> list[Any]:
    """Return an iterable of arrays as a list, refusing what is none; `what` it is called in messages."""
    if is_array(items):
        raise TypeError(f"{what} must be an iterable of arrays or a mapping; got a single {type(items).__name__}")
    if isinstance(items, (str, bytes)) or not isinstance(items, Iterable):
        raise TypeError(f"{what} must be an iterable of arrays or a mapping; got {items!r}")
    return list(items)


def is_pair(item: Any) -> bool:
    """Return whether `item` is a name and something that bears it."""
    return isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str)


def _read_arrays(params: Any, start: int, names: Any) -> tuple[list[str], list[Any], str]:
    """Return names, arrays and form of what stands under "params"."""
    if isinstance(params, Mapping):
        pairs, form = list(params.items()), "mapping"
    else:
        pairs, form = listed(params), "pairs"
        if not pairs or not all(is_pair(item) for item in pairs):
            form = "tuple" if isinstance(params, tuple) else "list"
            names = [Position(start + i) for i in range(len(pairs))] if names is None else list(names)
            if len(names) != len(pairs):
                raise ValueError(f"names must hold one entry for each of {len(pairs)} parameters; got {names!r}")
            pairs = list(zip(names, pairs, strict=True))
    for name, p in pairs:
        if not isinstance(name, str):
            raise TypeError(f"names of parameters must be strings; got {name!r}")
        check_parameter(name, p)
    return [name for name, _ in pairs], [p for _, p in pairs], form


def _in_form(form: str, names: list[str], arrays: list[Any]) -> Any:
    if form in ("mapping", "pairs"):
        pairs = zip(names, arrays, strict=True)
        return dict(pairs) if form == "mapping" else list(pairs)
    return tuple(arrays) if form == "tuple" else arrays
