"""The forms in which parameters and gradients are given, read into lists of named arrays."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lars_array._arrays import check_parameter, is_array
from lars_array._messages import shown

__all__ = ["Group", "Layout", "Position", "all_names", "gradient_order", "match", "match_gradients", "read_parameters"]


class Position(str):
    """The name that `param_groups` gives to a parameter without one: its position among all, to restore their order."""

    __slots__ = ()


def all_names(groups: Sequence[Sequence[str]]) -> list[str]:
    """Return the names in several groups as one list; raise ValueError for one that occurs twice."""
    found = [name for names in groups for name in names]
    if len(set(found)) < len(found):
        (twice, _), *_ = Counter(found).most_common(1)
        raise ValueError(f"names of parameters must differ; got {shown(twice)} twice")
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
        If `params` has none of these forms, is empty, or holds anything but arrays of floating-point types.
    """
    _refuse_others(params)
    if isinstance(params, Mapping):
        if "params" in params and not is_array(params["params"]):
            raise TypeError("params must be an iterable of groups, not one group; write [{'params': ...}]")
    elif not isinstance(params, tuple):
        params = _listed(params)
    grouped = not isinstance(params, Mapping) and bool(params) and all(isinstance(item, Mapping) for item in params)
    groups = []
    for group in params if grouped else [{"params": params}]:
        if "params" not in group:
            raise ValueError(f"a parameter group must have the key 'params'; got the keys {shown(list(group))}")
        names, arrays, form = _read_arrays(group["params"], start, group.get("names"))
        overrides = {key: value for key, value in group.items() if key not in ("params", "names")}
        groups.append(Group(names, arrays, overrides, form))
        start += len(names)
    all_names([group.names for group in groups])
    if not any(group.arrays for group in groups):
        raise ValueError("optimizer got an empty parameter list")
    return Layout(groups, grouped)


def _listed(items: Any, what: str = "params") -> list[Any]:
    """Return an iterable of arrays as a list; `what` is its name in messages."""
    if not isinstance(items, list | tuple):
        if is_array(items):
            raise TypeError(f"{what} must be an iterable of arrays or a mapping; got a single {type(items).__name__}")
        if isinstance(items, str | bytes) or not isinstance(items, Iterable):
            raise TypeError(f"{what} must be an iterable of arrays or a mapping; got {shown(items)}")
    found = list(items)
    if not found and isinstance(items, Iterator):
        start = "optimizer got an empty parameter list" if what == "params" else f"{what} must not be empty"
        raise ValueError(f"{start}; an iterator is empty once something has iterated over it, give a list instead")
    return found


# What is meant by objects of other libraries.
_FRONT_ENDS = {
    "torch": "for a torch module use lars_torch.LARS, with its parameters()",
    "flax": "for a module of flax use lars_jax, with its parameters",
    "equinox": "for a module of equinox use lars_jax, with its arrays, eqx.filter(module, eqx.is_inexact_array)",
    "haiku": "for haiku use lars_jax, with its parameters",
    "keras": "for keras give arrays of its weights",
}


def _refuse_others(params: Any) -> None:
    """Raise for what holds parameters and is none: a model, or an optimizer."""
    if is_array(params) or isinstance(params, Mapping | list | str):
        return
    if hasattr(params, "param_groups") or (hasattr(params, "init") and hasattr(params, "update")):
        kind = type(params).__name__
        raise TypeError(f"params must be parameters, not an optimizer; LARS is one, and wraps none: got a {kind}")
    if not isinstance(params, Iterator | tuple):
        for base in type(params).__mro__:
            library = base.__module__.partition(".")[0]
            if library in _FRONT_ENDS and not isinstance(params, type):
                raise TypeError(f"params must be arrays, not a {type(params).__name__}; {_FRONT_ENDS[library]}")


def _is_pair(item: Any) -> bool:
    """Return whether `item` is a pair (name, value)."""
    return isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str)


def _read_arrays(params: Any, start: int, names: Any) -> tuple[Sequence[str], list[Any], str]:
    """Return names, arrays and form of the value of "params"."""
    if isinstance(params, Mapping):
        names, arrays, form = list(params), list(params.values()), "mapping"
    elif (arrays := _listed(params)) and all(_is_pair(item) for item in arrays):
        names, arrays, form = [name for name, _ in arrays], [p for _, p in arrays], "pairs"
    else:
        form = "tuple" if isinstance(params, tuple) else "list"
        names = [str(start + i) for i in range(len(arrays))] if names is None else list(names)
        if len(names) != len(arrays):
            raise ValueError(f"names must hold one entry for each of {len(arrays)} parameters; got {shown(names)}")
    for name, p in zip(names, arrays, strict=True):
        if not isinstance(name, str):
            raise TypeError(f"names of parameters must be strings; got {shown(name)}")
        check_parameter(name, p)
    return names, arrays, form


def _in_form(form: str, names: Sequence[str], arrays: list[Any]) -> Any:
    if form in ("mapping", "pairs"):
        pairs = zip(names, arrays, strict=True)
        return dict(pairs) if form == "mapping" else list(pairs)
    return tuple(arrays) if form == "tuple" else arrays


# --------------------------------------------------------------------------------------------------------- gradients


def gradient_order(names: Sequence[str]) -> list[int] | None:
    """Return the position of each name's gradient in an iterable of gradients, None for the order of the names.

    Parameters without a name may stand in another order than they were given in, for instance after `param_groups`;
    gradients keep the order given.
    """
    places = [int(name) if isinstance(name, Position) else i for i, name in enumerate(names)]
    return places if sorted(places) == list(range(len(names))) != places else None


def match_gradients(grads: Any, names: Sequence[str], order: Sequence[int] | None) -> list[Any]:
    """Return a gradient, or None, for each name.

    Parameters
    ----------
    grads : mapping or iterable
        By name; or one a parameter, in the order in which parameters were given.
    names : sequence of str
        The names of all parameters.
    order : sequence of int, or None
        Their `gradient_order`.

    Returns
    -------
    list
        In the order of `names`; NumPy's scalars have become arrays.

    Raises
    ------
    ValueError
        For unknown or missing names, or another number of gradients than of parameters.
    TypeError
        If `grads` is neither a mapping nor an iterable of gradients.
    """
    found = match(grads, names, order)
    if any(issubclass(kind, np.generic) for kind in set(map(type, found))):
        return [np.asarray(g) if isinstance(g, np.generic) else g for g in found]
    return found


def match(given: Any, names: Sequence[str], order: Sequence[int] | None, what: str = "grads") -> list[Any]:
    """Return `given`, in the form of gradients, in the order of `names`; `what` is its name in messages."""
    if not isinstance(given, Mapping):
        given = _listed(given, what)
        if not given or not all(map(_is_pair, given)):
            if len(given) != len(names):
                raise ValueError(
                    f"{what} must hold one entry for each of the {len(names)} parameters; got {len(given)}"
                )
            return given if order is None else [given[place] for place in order]
        if len({name for name, _ in given}) < len(given):
            raise ValueError(f"{what} must hold each name once; got {shown([name for name, _ in given])}")
        given = dict(given)
    unknown = given.keys() - set(names)
    missing = [name for name in names if name not in given]
    if unknown:
        first = next(name for name in given if name in unknown)
        raise ValueError(f"{what} must be named as the parameters are; got the unknown name {shown(first)}")
    if missing:
        raise ValueError(
            f"{what} must hold every parameter, with None for one to be skipped; {shown(missing[0])} is missing"
        )
    return [given[name] for name in names]
