"""A tighter limit than `flat_pass`: the same loop over memory in huge pages, by threads that are awake."""

from __future__ import annotations

import functools
import mmap
from typing import Any

import numpy as np

from benchmarks.contestant import DECAY, LR, MOMENTUM, Run

__all__ = ["build"]

HUGE = 1 << 21  # bytes of a huge page


def build(params: list[Any], grads: list[Any]) -> Run:
    """SGD with momentum and weight decay over one array, by numba's own threads."""
    loop = _loop()
    size = sum(p.size for p in params)
    p, g, v = (_in_huge_pages(size) for _ in range(3))
    np.concatenate([x.reshape(-1) for x in params], out=p)
    np.concatenate([x.reshape(-1) for x in grads], out=g)
    v[:] = 0
    factors = tuple(np.float32(x) for x in (MOMENTUM, 1.0, DECAY, LR))
    return Run(lambda: loop(p, g, v, *factors), lambda: [p])


def _in_huge_pages(size: int) -> Any:
    """Return a float32 array of which the system has been asked to keep in huge pages."""
    memory = mmap.mmap(-1, 4 * size + HUGE)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.float32, size)


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
