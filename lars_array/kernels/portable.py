"""The kernel that any Array API namespace with writable arrays can run: `core`, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lars_array import core

__all__ = ["TAKES", "apply", "sums", "unusable"]

TAKES = "writable arrays of any Array API library"


def unusable(params: Sequence[Any]) -> str | None:
    """Return None: it takes everything that an optimizer does."""
    return None


def sums(params: Sequence[Any], grads: Sequence[Any], buffers: Sequence[Any], operand: Any, xp: Any) -> Any:
    """Return `core.sums`."""
    return core.sums(params, grads, buffers, operand, xp=xp)


def apply(params: Sequence[Any], grads: Sequence[Any], buffers: Sequence[Any], C: Any, xp: Any) -> None:
    """Write `core.apply` of each layer into its parameters and its buffer."""
    for i, (p, g, v) in enumerate(zip(params, grads, buffers, strict=True)):
        new_p, new_v = core.apply(p, g, v, C[i, :], xp=xp)
        p[...] = new_p
        if v is not None:
            v[...] = new_v
