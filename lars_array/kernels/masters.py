"""Which arrays a step computes on where some parameters have master copies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["with_masters"]


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
        return params, [None] * len(params)
    pairs = list(zip(params, masters, strict=True))
    return [p if m is None else m for p, m in pairs], [None if m is None else p for p, m in pairs]
