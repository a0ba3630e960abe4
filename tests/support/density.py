"""How much of a test with very many cases is run: a sample, or all for `make cuda`."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

__all__ = ["ALL", "sample"]

ALL = os.environ.get("LARS_CHECKS") == "all"


def sample(every: Iterable[Any], kept: Iterable[Any]) -> list[Any]:
    """Return all values where all are asked for, else those to be kept."""
    every, kept = list(every), list(kept)
    assert set(kept) <= set(every)
    return every if ALL else kept
