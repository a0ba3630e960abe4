"""New momentum buffers: together in one stretch of memory, which the system hands out in large pages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lars_array.dtypes import compute_dtype

__all__ = ["aligned_zeros", "new_buffers"]

ALIGNMENT = 64  # bytes: a line of cache, and what other libraries ask of memory that they are to take over


def new_buffers(params: Sequence[Any], xp: Any) -> list[Any]:
    """Return a momentum buffer of zeros for each of `params`, which is not modified.

    Parameters
    ----------
    params : sequence of arrays
        Parameters of one library.
    xp : Array API namespace
        Its namespace.

    Returns
    -------
    list of arrays
        Each of the shape of its parameter, in the same order in memory, and of the type that is computed in.
    """
    buffers: list[Any] = [None] * len(params)
    dense: dict[Any, list[int]] = {}
    for i, p in enumerate(params):
        if isinstance(p, np.ndarray) and p.flags.forc:
            dense.setdefault(compute_dtype(p, xp), []).append(i)
        else:
            buffers[i] = xp.zeros_like(p, dtype=compute_dtype(p, xp))
    for kind, layers in dense.items():
        step = ALIGNMENT // np.dtype(kind).itemsize
        starts = np.cumsum([0, *(-(-params[i].size // step) * step for i in layers)]).tolist()
        together = aligned_zeros(starts[-1], np.dtype(kind))
        for i, start in zip(layers, starts):
            p = params[i]
            flat = together[start : start + p.size]
            buffers[i] = flat.reshape(p.shape) if p.flags.c_contiguous else flat.reshape(p.shape[::-1]).T
    return buffers


def aligned_zeros(size: int, kind: Any) -> Any:
    """Return a NumPy array of `size` zeros of the dtype `kind` that begins where a line of cache does."""
    bytes_ = np.zeros(size * kind.itemsize + ALIGNMENT, np.uint8)
    offset = -bytes_.__array_interface__["data"][0] % ALIGNMENT
    return bytes_[offset : offset + size * kind.itemsize].view(kind)
