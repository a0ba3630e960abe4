"""The hyper-parameters that the groups of an optimizer hold, as a step takes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import FunctionType, NoneType
from typing import Any

from lars_array.arrays import is_array, is_distant
from lars_array.hyper import at_step
from lars_array.registry import Rule

__all__ = ["Settings", "checked", "options_of"]

# What can't be changed but by putting something else in its place.
_CONSTANT = frozenset({bool, int, float, str, tuple, NoneType, Rule, FunctionType})


def options_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return the hyper-parameters of a parameter group."""
    return {key: value for key, value in group.items() if key not in ("params", "names")}


def checked(options: Mapping[str, Any], step: int) -> dict[str, Any]:
    """Return `lars_array.hyper.at_step` with numbers for arrays of shape (), but for those on a device."""
    group = dict(options)
    if callable(group.get("lr")):
        group["lr"] = group["lr"](step)
    return at_step({key: x.item() if _can_be_read(x) else x for key, x in group.items()}, step)


class Settings:
    """The hyper-parameters of all groups: checked, once more only where something has changed."""

    def __init__(self) -> None:
        self._known: list[tuple[list[type], dict[str, Any]]] = []
        self._checked: Sequence[Mapping[str, Any]] = []

    def at(self, groups: Sequence[Mapping[str, Any]], step: int) -> Sequence[Mapping[str, Any]]:
        """Return complete and checked hyper-parameters.

        Parameters
        ----------
        groups : sequence of mappings
            The parameter groups.
        step : int
            Steps taken before.

        Returns
        -------
        sequence of mappings
            One a group, not to be written to. The same object as before if nothing has changed.

        Raises
        ------
        ValueError, TypeError
            As `lars_array.hyper.at_step` does.
        """
        found = []
        for group in groups:
            options = options_of(group)
            if callable(options.get("lr")):
                options["lr"] = options["lr"](step)
            # The types come first, and must be equal: True is 1, but no momentum, and arrays are not to be compared.
            found.append((list(map(type, options.values())), options))
        if found != self._known:
            self._checked = [checked(options, step) for _, options in found]
            constant = all(_CONSTANT.issuperset(kinds) for kinds, _ in found)
            self._known = found if constant else []
        return self._checked


def _can_be_read(x: Any) -> bool:
    return getattr(x, "shape", None) == () and not (is_array(x) and is_distant(x))
