"""The limit: one plain compiled loop over as many elements, in one array, on all cores.

LARS can't reach it where arrays are larger than the caches: the ratio is known only after p and g were read once, so it
moves seven numbers an element (read p, g; read p, g, v, write p, v) to the five of this loop.
"""

from __future__ import annotations

import functools
import math
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np

from benchmarks.contestant import DECAY, LR, MOMENTUM, Run
from benchmarks.machine import cores

__all__ = ["build"]


def build(params: list[Any], grads: list[Any]) -> Run:
    """v = m v + a g + b p, p = p - k v: SGD, so that it can be checked."""
    loop = _loop()
    shapes = [p.shape for p in params]
    p, g = _joined(params), _joined(grads)
    v = np.zeros_like(p)
    factors = tuple(np.float32(x) for x in (MOMENTUM, 1.0, DECAY, LR))
    edges = [p.size * k // cores() for k in range(cores() + 1)]
    parts = [tuple(x[start:stop] for x in (p, g, v)) for start, stop in pairwise(edges)]
    workers = ThreadPoolExecutor(max(cores() - 1, 1), thread_name_prefix="flat-pass")

    def step() -> None:
        others = [workers.submit(loop, *part, *factors) for part in parts[1:]]
        loop(*parts[0], *factors)
        for other in others:
            other.result()

    ends = np.cumsum([math.prod(shape) for shape in shapes])[:-1]
    return Run(step, lambda: [part.reshape(shape) for part, shape in zip(np.split(p, ends), shapes)])


def _joined(arrays: list[Any]) -> Any:
    """Return one array of the elements of all, giving back each as soon as it is copied."""
    joined = np.empty(sum(x.size for x in arrays), np.float32)
    end = joined.size
    while arrays:
        last = arrays.pop().reshape(-1)
        joined[end - last.size : end] = last
        end -= last.size
    return joined


@functools.cache
def _loop() -> Any:
    import numba

    # "contract": a multiplication and an addition may be one instruction, as C compilers have it.
    @numba.njit(nogil=True, fastmath={"contract"})
    def loop(p, g, v, m, a, b, k):  # type: ignore[no-untyped-def]
        for i in range(p.size):
            v[i] = m * v[i] + a * g[i] + b * p[i]
            p[i] = p[i] - k * v[i]

    return loop
