"""Blocks of scratch memory, one set a thread, kept between steps."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

__all__ = ["scratch"]


class _Kept(threading.local):
    def __init__(self) -> None:
        self.arrays: dict[tuple[Any, int], Any] = {}


_kept = _Kept()


def scratch(size: int, dtype: Any, slot: int) -> Any:
    """Return an uninitialised array that this thread may use until it asks for the same slot again.

    Parameters
    ----------
    size : int
        How many elements.
    dtype : dtype
        Their type.
    slot : int
        Arrays of different slots do not overlap.

    Returns
    -------
    ndarray of shape (size,)
        The array.
    """
    kept = _kept.arrays.get((dtype, slot))
    if kept is None or kept.size < size:
        kept = _kept.arrays[dtype, slot] = np.empty(size, dtype)
    return kept[:size]
