"""Parameters and gradients: random, and the same again whenever they are asked for.

A long array repeats its first block: drawing a billion numbers for each contestant would take most of the time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from benchmarks.shapes import Shape

__all__ = ["BLOCK", "GRADIENT", "PARAMETER", "blocks", "make"]

PARAMETER, GRADIENT = 0, 1
SCALES = (0.05, 0.001)  # so far apart that weight decay of 1e-4 is seen in the fourth digit of an update
BLOCK = 1_000_003  # elements; no multiple of it is a place where a kernel would cut an array


def blocks(layer: int, kind: int, size: int) -> Iterator[Any]:
    """Yield the elements of an array in blocks, so that a check needs no second copy of it.

    Parameters
    ----------
    layer : int
        Which of a case's arrays.
    kind : {PARAMETER, GRADIENT}
        Which of the layer's.
    size : int
        How many elements it has.

    Yields
    ------
    ndarray of shape (at most BLOCK,)
        float32, to be read only.
    """
    block = np.random.default_rng([layer, kind]).standard_normal(min(BLOCK, size), dtype=np.float32)
    block *= np.float32(SCALES[kind])
    for start in range(0, size, BLOCK):
        yield block[: size - start]


def make(shapes: Sequence[Shape], kind: int) -> list[Any]:
    """Return the parameters or the gradients of a case.

    Parameters
    ----------
    shapes : sequence of tuple of int
        One shape a layer.
    kind : {PARAMETER, GRADIENT}
        Which.

    Returns
    -------
    list of ndarray
        float32.
    """
    arrays = []
    for layer, shape in enumerate(shapes):
        flat = np.empty(math.prod(shape), np.float32)
        for number, block in enumerate(blocks(layer, kind, flat.size)):
            flat[number * BLOCK :][: block.size] = block
        arrays.append(flat.reshape(shape))
    return arrays
