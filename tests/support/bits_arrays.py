"""The arrays of the recorder of bits: random, the same at each call, in all types and layouts."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from typing import Any

import ml_dtypes
import numpy as np

__all__ = ["GRADIENT_TYPES", "LAYOUTS", "MODELS", "TYPES", "arrays"]

TYPES: dict[str, Any] = {
    "float64": np.float64,
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "complex64": np.complex64,
    "complex128": np.complex128,
}
REAL = [name for name in TYPES if not name.startswith("complex")]
GRADIENT_TYPES = [pair for pair in product(REAL, REAL) if pair[0] != pair[1]]

Shapes = dict[str, tuple[int, ...]]

# "z" is all zeros. What is "long" is of more than one piece on a device.
SMALL: Shapes = {"w": (40, 30), "b": (7,), "none": (0, 3), "one": (), "k": (3, 4, 5), "z": (5,), "long": (17003,)}
MODELS: dict[str, Shapes] = {
    "small": SMALL,
    "many": {f"{i:03}": (i % 7 + 1, i % 11) if i % 3 else (101 - i,) for i in range(100)},
    "stacked": {"m": (4, 30, 5), "n": (4, 7), "e": (4, 0), "o": (1, 3, 2, 2)},
    "edges": {"a": (65535,), "b": (65536,), "c": (65537,), "d": (2, 65536), "e": (3, 65537)},
    "large": {"a": (7,), "b": (65537,), "c": (300_001,), "d": (1_100_003,), "e": (65536,), "f": (10, 3)},
}
LAYOUTS: dict[str, Callable[[Any], Any]] = {
    "C": np.ascontiguousarray,
    "F": np.asfortranarray,
    "strided": lambda x: np.repeat(x[..., None], 2, axis=-1)[..., 0] if x.ndim else x,
    "backwards": lambda x: np.ascontiguousarray(x[::-1])[::-1] if x.ndim else x,
}


def arrays(model: str, dtype: str, layout: str, seed: int) -> dict[str, Any]:
    """Return new arrays by name.

    Parameters
    ----------
    model, layout : str
        Keys of `MODELS` and `LAYOUTS`.
    dtype : str
        A key of `TYPES`; or "mixed", by turns all that are real.
    seed : int
        0 for parameters, of which "z" is all zeros; others for gradients.
    """
    rng = np.random.default_rng([seed, sum(map(ord, model))])
    kinds = [TYPES[REAL[i % len(REAL)] if dtype == "mixed" else dtype] for i in range(len(MODELS[model]))]
    found = {}
    for (name, shape), kind in zip(MODELS[model].items(), kinds, strict=True):
        numbers = rng.standard_normal((2, math.prod(shape))) * 10.0 ** rng.integers(-2, 1)
        flat = numbers[0] + 1j * numbers[1] if np.issubdtype(kind, np.complexfloating) else numbers[0]
        if name == "z" and seed == 0:
            flat = flat * 0
        x = np.asarray(LAYOUTS[layout](flat.reshape(shape).astype(kind)))
        found[name] = x if x.shape == shape else x.reshape(shape)  # NumPy makes one axis of none
    return found
