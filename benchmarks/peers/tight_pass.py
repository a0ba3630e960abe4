"""A tighter limit than `flat_pass`: the same loop over memory in huge pages, by threads that are awake."""

from __future__ import annotations

import functools
import mmap
from typing import Any

import numpy as np

from benchmarks.contestant import DECAY, LR, MOMENTUM, Run

__all__ = ["build", "in_huge_pages"]

HUGE = 1 << 21  # bytes of a huge page


def build(params: list[Any], grads: list[Any]) -> Run:
    """SGD with momentum and weight decay over one array, by numba's own threads."""
    loop = _loop()
    p, g, v = in_huge_pages(params), in_huge_pages(grads), in_huge_pages(params)
    v[:] = 0
    factors = tuple(np.float32(x) for x in (MOMENTUM, 1.0, DECAY, LR))
    return Run(lambda: loop(p, g, v, *factors), lambda: [p])


def in_huge_pages(arrays: list[Any]) -> Any:
    """Return the elements of all in one float32 array, which the system has been asked to keep in huge pages."""
    size = sum(x.size for x in arrays)
    memory = mmap.mmap(-1, 4 * size + HUGE)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.concatenate([x.reshape(-1) for x in arrays], out=np.frombuffer(memory, np.float32, size))


@functools.cache
def _loop() -> Any:
    import numba

    @numba.njit(nogil=True, parallel=True, fastmath={"contract"})
    def loop(p, g, v, m, a, b, k):  # type: ignore[no-untyped-def]
        for i in numba.prange(p.size):
            new = m * v[i] + a * g[i] + b * p[i]
            v[i] = new
            p[i] = p[i] - k * new

    return loop
