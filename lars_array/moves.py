"""Where a step writes the new parameters, if not in place: found as gradients are, and refused where it can't be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from array_api_compat import array_namespace, device

from lars_array.arrays import is_array
from lars_array.gradients import Fit, match
from lars_array.memory import Spans, bounds, check_writable
from lars_array.roster import Roster

__all__ = ["Move", "Surroundings", "read_move"]


class Move(NamedTuple):
    """The arrays that parameters lie in after a step.

    Parameters
    ----------
    arrays : sequence of arrays
        One a parameter; None for one that stays where it is.
    rows : list of arrays
        One for each row that takes part in the step, see `lars_array.roster.Roster`.
    """

    arrays: Sequence[Any]
    rows: list[Any]


def read_move(out: Any, roster: Roster, order: Sequence[int] | None, index: Sequence[int]) -> Move:
    """Return what `lars_array.LARS.step` was given as `out`, for a step with the rows at `index`.

    Raises
    ------
    ValueError, TypeError
        If it has not the form of gradients, or holds arrays where there are no gradients, or none where there are.
    """
    arrays = match(out, roster.given, order, "out")
    for i, stack in roster.stacks.items():  # before they are cut up
        if arrays[i] is not None:
            _check_array(stack.name, arrays[i], stack.param)
    rows = roster.rows_of(arrays)
    if type(None) in set(map(type, rows)) or len(index) < len(rows):
        stepped = set(index)
        for i, (name, x) in enumerate(zip(roster.names, rows, strict=True)):
            if x is None and i in stepped:
                raise ValueError(f"out must hold an array for {name!r}, which has a gradient; got {x!r}")
            if x is not None and i not in stepped:
                raise ValueError(f"out must be None for {name!r}, which has no gradient; got {type(x).__name__}")
        rows = [rows[i] for i in index]
    return Move(arrays, rows)


class Surroundings:
    """What lies in memory beside the room that parameters move to: these themselves, and what is kept for them.

    Parameters
    ----------
    roster : Roster
        Whose parameters.

    Attributes
    ----------
    kept : Spans
        Where all lies that a step writes to but for the parameters, as long as nothing new is kept.
    """

    def __init__(self, roster: Roster) -> None:
        self._roster = roster
        self.kept = Spans(roster.names, [], roster.buffers.rows, roster.masters.rows)
        self._bounds: Any = None  # of the parameters, of shape (rows, 2)
        self._next: Any = None  # and of those that were checked last

    def check(self, fit: Fit, out: Sequence[Any], grads: Sequence[Any], starts: Any) -> None:
        """Refuse arrays that parameters can't move to.

        Parameters
        ----------
        fit : Fit
            Of the parameters that move, whose gradients have been checked.
        out, grads : sequences of arrays
            One a parameter.
        starts : array, or None
            What the check of the gradients has returned.

        Raises
        ------
        ValueError, TypeError
            Naming the parameter.
        """
        self._next = None
        found = fit.room(out, starts)
        if found is not None:
            if self._bounds is None:
                self._bounds = bounds(self._roster.params)
            if self._bounds is not None and _is_free(found[0], (self._bounds, found[1]), self.kept):
                self._next = found[0]
                return
        for name, x, p in zip(fit.names, out, fit.params, strict=True):
            _check_array(name, x, p)
        everything, room = self._roster.spans(), _Room(fit.names, out)
        for name, x, g in zip(fit.names, out, grads, strict=True):
            owner = everything.owner(x)
            if owner is not None:
                raise ValueError(f"out of {name!r} must not share memory with {owner}")
            owner = room.owner(g)
            if owner is not None:
                raise ValueError(f"the gradient of {name!r} must not share memory with {owner}")

    def follow(self, place: Any) -> None:
        """Know that parameters, those of the rows in `place`, an integer array, lie in what was checked last."""
        if self._next is None:
            self._bounds = None
        else:
            self._bounds[place] = self._next


class _Room(Spans):
    KINDS = "out of", "", ""


def _is_free(room: Any, others: Sequence[Any], kept: Spans) -> bool:
    """Return whether it is certain that stretches of addresses, of shape (arrays, 2), overlap with nothing."""
    starts, ends = room[np.argsort(room[:, 0], kind="stable")].T
    if np.any(starts[1:] < ends[:-1]):
        return False
    reach = np.concatenate([[0], ends])
    clear = all(np.all(reach[np.searchsorted(starts, other[:, 1])] <= other[:, 0]) for other in others)
    return clear and kept.are_clear(starts, ends)


def _check_array(name: str, x: Any, p: Any) -> None:
    if not is_array(x):
        raise TypeError(f"out of {name!r} must be an array; got {x!r}")
    if type(x) is not type(p) and array_namespace(x) is not array_namespace(p):
        kinds = f"{type(p).__name__}, as the parameter; got {type(x).__name__}"
        raise TypeError(f"out of {name!r} must be an array of the library of {kinds}")
    if x.dtype != p.dtype:
        raise TypeError(f"out of {name!r} must have the parameter's dtype {p.dtype!r}; got {x.dtype!r}")
    if x.shape != p.shape:
        raise ValueError(f"out of {name!r} must have the parameter's shape {tuple(p.shape)!r}; got {tuple(x.shape)!r}")
    if device(x) != device(p):
        raise ValueError(f"out of {name!r} must be on the parameter's device {device(p)!r}; got {device(x)!r}")
    check_writable(f"out of {name}", x)
