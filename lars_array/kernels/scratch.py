"""Blocks of scratch memory, one set a thread, kept between steps."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

__all__ = ["scratch"]

_local = threading.local()


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
    key = f"{np.dtype(dtype).char}{slot}"
    kept = _local.__dict__.get(key)
    if kept is None or kept.size < size:
        kept = _local.__dict__[key] = np.empty(size, dtype)
    return kept[:size]
