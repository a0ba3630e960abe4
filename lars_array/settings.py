"""The hyper-parameters that the groups of an optimizer hold, as a step takes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import NoneType
from typing import Any, NamedTuple

from lars_array.arrays import is_array, is_distant
from lars_array.hyper import at_step
from lars_array.registry import RULES

__all__ = ["Settings", "checked", "options_of"]

# What is the same if it is equal and of the same type: True is 1, but no momentum.
_PLAIN = frozenset({bool, int, float, str, NoneType})


def options_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return the hyper-parameters of a parameter group."""
    return {key: value for key, value in group.items() if key not in ("params", "names")}


def checked(options: Mapping[str, Any], step: int) -> dict[str, Any]:
    """Return complete and checked hyper-parameters.

    Parameters
    ----------
    options : mapping
        As for `lars_array.hyper.at_step`.
    step : int
        Steps taken before.

    Returns
    -------
    dict
        What `lars_array.hyper.at_step` does, but with numbers for arrays of shape () that can be read without waiting.

    Raises
    ------
    ValueError, TypeError
        As `lars_array.hyper.at_step` does.
    """
    group = _scheduled(options, step)
    return at_step({key: x.item() if _can_be_read(x) else x for key, x in group.items()}, step)


class Settings:
    """The hyper-parameters of all groups: checked, and once more only where something may have changed.

    Nothing of it is copied or pickled, since it can be found out again.
    """

    def __init__(self) -> None:
        self._remembered: tuple[list[_Look] | None, Sequence[Mapping[str, Any]]] = None, []

    def __reduce__(self) -> tuple[Any, ...]:
        return Settings, ()

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
            One a group. The same object as before if nothing has changed, so whoever has it may not write to it, and
            may remember what follows from it.

        Raises
        ------
        ValueError, TypeError
            As `lars_array.hyper.at_step` does.
        """
        all_options = [_scheduled(options_of(group), step) for group in groups]
        looks = [_Look.of(options) for options in all_options]
        before, settings = self._remembered
        if before is None or len(before) != len(looks) or not all(map(_Look.is_still, before, looks)):
            settings = [checked(options, step) for options in all_options]
            lasting = all(look.is_lasting() for look in looks)
            self._remembered = (looks if lasting else None), settings  # at once: an interrupt may come between
        return settings


class _Look(NamedTuple):
    """What the hyper-parameters of a group are, to be asked at a later step whether they are still.

    Parameters
    ----------
    names, kinds, values : list
        Of those that are numbers, or should be.
    rule, bounds : object
        What else there may be. A rule is the one that its name stands for now.
    """

    names: list[str]
    kinds: list[type]
    values: list[Any]
    rule: Any
    bounds: Any

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> _Look:
        numbers = dict(options)
        rule, bounds = numbers.pop("rule", None), numbers.pop("trust_bounds", None)
        if type(rule) is str:
            rule = RULES.get(rule)
        values = list(numbers.values())
        return cls(list(numbers), list(map(type, values)), values, rule, bounds)

    def is_lasting(self) -> bool:
        """Return whether all of it can only change by something else taking its place."""
        return _PLAIN.issuperset(self.kinds) and (self.bounds is None or type(self.bounds) is tuple)

    def is_still(self, now: _Look) -> bool:
        """Return whether a later look is the same, given that this one lasts. Users' objects are not asked: they may
        call themselves equal to others, or return arrays."""
        return (
            self.names == now.names
            and self.kinds == now.kinds  # and with that, values can be compared
            and self.values == now.values
            and self.rule is now.rule
            and self.bounds is now.bounds
        )


def _scheduled(options: Mapping[str, Any], step: int) -> dict[str, Any]:
    group = dict(options)
    if callable(group.get("lr")):
        group["lr"] = group["lr"](step)
    return group


def _can_be_read(x: Any) -> bool:
    return getattr(x, "shape", None) == () and not (is_array(x) and is_distant(x))
