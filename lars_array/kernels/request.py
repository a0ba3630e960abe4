"""What a kernel that decides on a step by itself must be told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from lars_array.registry import Rule

__all__ = ["Request"]


class Request(NamedTuple):
    """A step to be taken on a device, without asking the host.

    Parameters
    ----------
    rules, policies : sequences
        Rule and `nonfinite` of each group.
    clips : bool
        Whether gradients are clipped by their global norm.
    group_of, place, keeps : sequences
        Of each layer its group, its position among all parameters, and whether it keeps a momentum buffer. The same
        objects as long as they hold the same.
    joined : sequence of sequences of int
        The rows of each layer that has several, see `lars_array.rows`.
    hyper : array of shape (groups, fields)
        See `lars_array.hyper_table`.
    first, previous_lr : arrays of shape (layers,)
        As in `lars_array.hyper.Hyper`; written to if the step is taken.
    counts : int64 array
        See `lars_array.news`; written to.
    found_inf : array of shape (), or None
        The step is skipped where it isn't zero.
    out : sequence of arrays, or None
        What parameters are written to instead of in place.
    """

    rules: Sequence[Rule]
    policies: Sequence[str]
    clips: bool
    group_of: Sequence[int]
    place: Sequence[int]
    keeps: Sequence[bool]
    joined: Sequence[Sequence[int]]
    hyper: Any
    first: Any
    previous_lr: Any
    counts: Any
    found_inf: Any
    out: Sequence[Any] | None = None
