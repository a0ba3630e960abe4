"""The hyper-parameters of parameter groups at a step: complete, with schedules evaluated, and checked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from numbers import Real
from operator import is_, itemgetter
from types import NoneType
from typing import Any

from lars_array._arrays import is_array, is_on_accelerator
from lars_array._messages import located, shown
from lars_array.core import RULES, resolve
from lars_array.hyperparams.checks import check
from lars_array.hyperparams.names import DEFAULTS, NUMBERS, unknown_option

__all__ = [
    "PLAIN",
    "Hyperparams",
    "at_step",
    "can_be_read",
    "complete",
    "needs_buffer",
    "options_of",
    "readable",
    "scheduled",
]


# For these types, equal values of equal type are the same: True == 1, but True is not a valid momentum.
PLAIN = frozenset({bool, int, float, str, NoneType})


def complete(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return `group` with defaults for all missing hyper-parameters.

    Parameters
    ----------
    group : mapping
        A value for `lr`, and for any of `DEFAULTS`.

    Returns
    -------
    dict
        `lr` and every key of `DEFAULTS`.

    Raises
    ------
    ValueError
        For an unknown hyper-parameter, or if `lr` is missing.
    """
    if not group.keys() <= {"lr", *DEFAULTS}:
        raise ValueError(unknown_option(next(name for name in group if name not in DEFAULTS and name != "lr")))
    if "lr" not in group:
        raise ValueError("a parameter group must have the key 'lr'")
    return {"lr": group["lr"], **DEFAULTS, **group}


def options_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return the hyper-parameters of a parameter group."""
    return {key: value for key, value in group.items() if key not in ("params", "names")}


def at_step(options: Mapping[str, Any], step: Any) -> dict[str, Any]:
    """Return complete and checked hyper-parameters, with the values of schedules at `step`.

    Parameters
    ----------
    options : mapping
        A value for `lr` and for any of `DEFAULTS`; numbers may be functions of the step.
    step : int or integer array of shape ()
        Number of steps taken before.

    Returns
    -------
    dict
        `lr` and every key of `DEFAULTS`.

    Raises
    ------
    ValueError, TypeError
        As `complete` and `check` do.
    """
    group = complete(scheduled(options, step))
    check(group)
    return group


def scheduled(options: Mapping[str, Any], step: Any) -> dict[str, Any]:
    """Return the options with schedules evaluated at `step`."""
    group = dict(options)
    for name in NUMBERS:
        for _ in range(2):  # a schedule may return another
            if not callable(group.get(name)):
                break
            group[name] = group[name](step)
    return group


def readable(options: Mapping[str, Any], step: int) -> dict[str, Any]:
    """Return `at_step`, with arrays of shape () replaced by numbers where they can be read without waiting."""
    return _checked(scheduled(options, step))


def _checked(options: Mapping[str, Any]) -> dict[str, Any]:
    group = complete(options)
    group = {key: x.item() if type(x) not in PLAIN and can_be_read(x) else x for key, x in group.items()}
    check(group)
    return group


def can_be_read(x: Any) -> bool:
    """Return whether `x` is an array of shape () that is read without waiting."""
    return getattr(x, "shape", None) == () and not (is_array(x) and is_on_accelerator(x))


def needs_buffer(group: Mapping[str, Any]) -> bool:
    """Return whether layers with these hyper-parameters keep a momentum buffer; true for traced momentum."""
    return resolve(group["rule"]).keeps_buffer or not (isinstance(group["momentum"], Real) and group["momentum"] == 0)


class Hyperparams:
    """The hyper-parameters of parameter groups, which are checked again only after a possible change."""

    def __init__(self) -> None:
        self._last: tuple[list[Any], Sequence[Mapping[str, Any]]] = [], []
        self._objects: list[Any] | None = None  # that were read; None where one may hold another number later

    def __reduce__(self) -> tuple[Any, ...]:
        return Hyperparams, ()

    def read(
        self,
        param_groups: Sequence[Mapping[str, Any]],
        step: int,
        evaluated: Sequence[Mapping[str, Any]] | None = None,
    ) -> Sequence[Mapping[str, Any]]:
        """Return complete and checked hyper-parameters, one mapping per group.

        Parameters
        ----------
        param_groups : sequence of mappings
            The parameter groups.
        step : int
            Number of steps taken before.
        evaluated : sequence of mappings, optional
            Their hyper-parameters with schedules evaluated, if the caller has done that.

        Returns
        -------
        sequence of mappings
            Not to be modified. It is the same object as before if nothing has changed, so callers may compare identity.

        Raises
        ------
        ValueError, TypeError
            As `at_step` does.
        """
        if evaluated is None and self.are_unchanged(param_groups):
            return self.last
        self._objects = None
        all_options = evaluated or [scheduled(options_of(group), step) for group in param_groups]
        seen = [_comparable(options) for options in all_options]
        before, groups = self._last
        if not (seen and len(seen) == len(before) and all(map(_is_same, seen, before))):
            groups = []
            for number, (group, options) in enumerate(zip(param_groups, all_options)):
                try:
                    if missing := _NAMES - options.keys():
                        raise ValueError(f"a parameter group must have the key {shown(min(missing))}")
                    groups.append(_checked(options))
                except (TypeError, ValueError):
                    place = [f"parameter group {number}"] if len(all_options) > 1 else []
                    place += [f"step {step}"] if any(callable(group.get(name)) for name in NUMBERS) else []
                    with located(", ".join(place)):
                        raise
            self._last = seen, groups  # in one assignment, for interrupts
        if None not in seen and all(map(is_, _values_in(all_options), _values_in(param_groups))):
            self._objects = _objects_in(param_groups)
        return groups

    def are_unchanged(self, param_groups: Sequence[Mapping[str, Any]]) -> bool:
        """Return whether groups hold the objects that were read last, none of which can be modified in place."""
        if self._objects is None:
            return False
        try:
            objects = _objects_in(param_groups)
        except KeyError:
            return False
        return len(objects) == len(self._objects) and all(map(is_, objects, self._objects))

    @property
    def last(self) -> Sequence[Mapping[str, Any]]:
        """What `read` has returned last."""
        return self._last[1]


_NAMES = frozenset({"lr", *DEFAULTS})
_values_of = itemgetter("lr", *DEFAULTS)


def _values_in(groups: Sequence[Mapping[str, Any]]) -> Iterator[Any]:
    return chain.from_iterable(map(_values_of, groups))


def _objects_in(param_groups: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Return all keys of groups, their hyper-parameters, and what the names of rules stand for."""
    rules = [RULES.get(group["rule"]) for group in param_groups if isinstance(group["rule"], str)]
    return [*chain(*param_groups), *_values_in(param_groups), *rules]


def _comparable(options: Mapping[str, Any]) -> Any:
    """Return names, types and values, rule and bounds; None if a value is a mutable object."""
    options = dict(options)
    rule, bounds = options.pop("rule", None), options.pop("trust_bounds", None)
    kinds = list(map(type, options.values()))
    if not PLAIN.issuperset(kinds) or not (bounds is None or type(bounds) is tuple):
        return None
    rule = RULES.get(rule) if isinstance(rule, str) else rule
    return list(options), kinds, list(options.values()), rule, bounds


def _is_same(now: Any, before: Any) -> bool:
    """Return whether two results of `_comparable` are the same; custom objects may define their own equality."""
    if now is None or before is None or now[:3] != before[:3]:
        return False
    return now[3] is before[3] and now[4] is before[4]
