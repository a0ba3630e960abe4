"""The forms in which parameters are given, and what becomes of them: lists of named arrays."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from lars_array.arrays import check_parameter, is_array

__all__ = ["Group", "Layout", "Position", "Positions", "all_names", "is_pair", "listed", "read_parameters"]


class Position(str):
    """The name of a parameter that has none: its position among all. It keeps it through `param_groups`."""

    __slots__ = ()


class Positions(Sequence[str]):
    """The names of parameters that have none, made when they are asked for: a string takes more than its parameter."""

    __slots__ = ("places",)

    def __init__(self, places: range) -> None:
        self.places = places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, i: Any) -> Any:
        return Positions(self.places[i]) if isinstance(i, slice) else Position(self.places[i])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    def __repr__(self) -> str:
        return repr(list(self))


def all_names(groups: Sequence[Sequence[str]]) -> Sequence[str]:
    """Return the names in several groups as those of one.

    Raises
    ------
    ValueError
        If one is there twice.
    """
    places = [names.places for names in groups if isinstance(names, Positions)]
    if len(places) == len(groups) and all(one.stop == other.start for one, other in pairwise(places)):
        return Positions(range(places[0].start, places[-1].stop))
    found = [name for names in groups for name in names]
    if len(set(found)) < len(found):
        (twice, _), *_ = Counter(found).most_common(1)
        raise ValueError(f"names of parameters must differ; got {twice!r} twice")
    return found


class Group(NamedTuple):
    """A parameter group as it was given: `names` and `arrays` of its parameters, and its own hyper-parameters."""

    names: Sequence[str]
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
    all_names([group.names for group in groups])
    if not any(group.arrays for group in groups):
        raise ValueError("optimizer got an empty parameter list")
    return Layout(groups, grouped)


def listed(items: Any, what: str = "params") -> list[Any]:
    """Return an iterable of arrays as a list, refusing what is none; `what` it is called in messages."""
    if not isinstance(items, list | tuple):
        if is_array(items):
            raise TypeError(f"{what} must be an iterable of arrays or a mapping; got a single {type(items).__name__}")
        if isinstance(items, str | bytes) or not isinstance(items, Iterable):
            raise TypeError(f"{what} must be an iterable of arrays or a mapping; got {items!r}")
    return list(items)


def is_pair(item: Any) -> bool:
    """Return whether `item` is a name and something that bears it."""
    return isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str)


def _read_arrays(params: Any, start: int, names: Any) -> tuple[Sequence[str], list[Any], str]:
    """Return names, arrays and form of what stands under "params"."""
    if isinstance(params, Mapping):
        names, arrays, form = list(params), list(params.values()), "mapping"
    elif (arrays := listed(params)) and all(is_pair(item) for item in arrays):
        names, arrays, form = [name for name, _ in arrays], [p for _, p in arrays], "pairs"
    else:
        form = "tuple" if isinstance(params, tuple) else "list"
        names = Positions(range(start, start + len(arrays))) if names is None else list(names)
        if len(names) != len(arrays):
            raise ValueError(f"names must hold one entry for each of {len(arrays)} parameters; got {names!r}")
    for name, p in zip(names, arrays, strict=True):
        if not isinstance(name, str):
            raise TypeError(f"names of parameters must be strings; got {name!r}")
        check_parameter(name, p)
    return names, arrays, form


def _in_form(form: str, names: Sequence[str], arrays: list[Any]) -> Any:
    if form in ("mapping", "pairs"):
        pairs = zip(names, arrays, strict=True)
        return dict(pairs) if form == "mapping" else list(pairs)
    return tuple(arrays) if form == "tuple" else arrays
