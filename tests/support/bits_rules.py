"""Rules of a user's own for the recorder of bits."""

from __future__ import annotations

from typing import Any

__all__ = ["arithmetic", "mean"]


def arithmetic(S: Any, hyper: Any, xp: Any) -> Any:
    """Of a user: arithmetic that can be played back for each layer."""
    ratio = hyper.trust_coefficient * xp.sqrt(S[:, 0] + 1.0) / (xp.sqrt(S[:, 2]) + hyper.eps)
    ratio = xp.where(S[:, 1] > 0, ratio, 1.0)
    zeros, ones = xp.zeros_like(ratio), xp.ones_like(ratio)
    return xp.stack([hyper.momentum, ratio, ratio * hyper.weight_decay, hyper.lr * ones, zeros, zeros], axis=1)


def mean(S: Any, hyper: Any, xp: Any) -> Any:
    """Of a user: one that looks at all layers together, so that it must be called at each step."""
    return arithmetic(S / xp.mean(S), hyper, xp)
