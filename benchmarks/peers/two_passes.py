"""The limit of LARS: the memory that it must read and write, layer by layer, with little arithmetic and no waiting.

The ratio of a layer is known only after its p and g were read once. A layer that fits into no cache of one core is
therefore read twice, and the second time at best from the cache that all cores share. Here each thread takes the same
share of every layer, in huge pages, and goes on without the sums of the others, which LARS must wait for.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from benchmarks.contestant import DECAY, LR, MOMENTUM, Run
from benchmarks.machine import cores
from benchmarks.peers.tight_pass import in_huge_pages

__all__ = ["build"]


def build(params: list[Any], grads: list[Any]) -> Run:
    """SGD with momentum and weight decay after the sums of squares of p and g, which nothing uses."""
    loop = _loop()
    p, v = in_huge_pages(params), in_huge_pages(params)
    g = in_huge_pages(grads)
    v[:] = 0
    sizes = np.array([x.size for x in params])
    starts, threads = np.cumsum(sizes) - sizes, cores()
    edges = np.array([starts + sizes * k // threads for k in range(threads + 1)])
    sums, factors = np.zeros(threads), tuple(np.float32(x) for x in (MOMENTUM, 1.0, DECAY, LR))
    return Run(lambda: loop(p, g, v, edges, sums, *factors), lambda: [p])


@functools.cache
def _loop() -> Any:
    import numba

    @numba.njit(fastmath={"reassoc", "contract"})
    def squares(p, g):  # type: ignore[no-untyped-def]
        total = 0.0
        for i in range(p.size):
            x, y = np.float64(p[i]), np.float64(g[i])
            total += x * x + y * y
        return total

    @numba.njit(fastmath={"contract"})
    def update(p, g, v, m, a, b, k):  # type: ignore[no-untyped-def]
        for i in range(p.size):
            new = m * v[i] + a * g[i] + b * p[i]
            v[i] = new
            p[i] = p[i] - k * new

    @numba.njit(nogil=True, parallel=True)
    def loop(p, g, v, edges, sums, m, a, b, k):  # type: ignore[no-untyped-def]
        for thread in numba.prange(len(sums)):
            for layer in range(edges.shape[1]):
                own = slice(edges[thread, layer], edges[thread + 1, layer])
                sums[thread] += squares(p[own], g[own])
                update(p[own], g[own], v[own], m, a, b, k)

    return loop
