"""NumPy arrays on memory of which only the address is known."""

from __future__ import annotations

import ctypes
import sys
from typing import Any

import numpy as np

__all__ = ["array_at"]

# All there is as one buffer: an array on it belongs to nobody, and takes a quarter of a microsecond to make.
_FIRST = 1  # since no address is 0
_MEMORY = memoryview((ctypes.c_byte * (sys.maxsize - _FIRST)).from_address(_FIRST))
_TO_READ = _MEMORY.toreadonly()


def array_at(address: int, shape: Any, dtype: Any, strides: Any = None, *, write: bool = False) -> Any:
    """Return an array on memory that it doesn't keep alive: it must not be looked at when that is gone.

    Parameters
    ----------
    address : int
        Where the first element is; not looked at if there is none.
    shape, dtype, strides
        As for `numpy.ndarray`.
    write : bool
        Whether the array can be written to.

    Returns
    -------
    ndarray
        The array.
    """
    if 0 in shape:
        return np.empty(shape, dtype)
    return np.ndarray(shape, dtype, _MEMORY if write else _TO_READ, address - _FIRST, strides)
