"""Which arrays a step computes on, and which it writes to, where some parameters have master copies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lars_array.buffers import Rows

__all__ = ["copy_all", "destinations", "with_masters"]


def with_masters(params: Sequence[Any], masters: Sequence[Any] | None) -> tuple[Sequence[Any], Sequence[Any]]:
    """Return what is trained in the place of `params`, and what its rounding is written to.

    Parameters
    ----------
    params : sequence of arrays
        One entry a layer.
    masters : sequence, or None
        Master copies; None where there is none.

    Returns
    -------
    tuple of sequences
        The master, or else the parameter; and the parameter where there is a master, or else None.
    """
    if masters is None:
        return params, Rows(len(params))
    pairs = list(zip(params, masters, strict=True))
    return [p if m is None else m for p, m in pairs], [None if m is None else p for p, m in pairs]


def destinations(
    trained: Sequence[Any], copies: Sequence[Any], out: Sequence[Any] | None
) -> tuple[Sequence[Any], Sequence[Any]]:
    """Return what a step writes what is trained to, and what its rounding.

    Parameters
    ----------
    trained, copies : sequences of arrays
        What `with_masters` returned.
    out : sequence of arrays, or None
        What the parameters are written to; None: they are written in place.

    Returns
    -------
    tuple of sequences
        One entry a layer; in the second None where nothing is rounded. Masters always are written in place.
    """
    if out is None:
        return trained, copies
    layers = list(zip(trained, copies, out, strict=True))
    return [x if copy is None else p for p, copy, x in layers], [None if copy is None else x for _, copy, x in layers]


def copy_all(params: Sequence[Any], out: Sequence[Any] | None) -> None:
    """Write parameters to `out`, if that is not None, as they are: no step is taken."""
    for p, x in zip(params, [] if out is None else out):
        x[...] = p
