"""Arrays of a small model on the device of `cuda_on_cpu`, and what is launched for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from cuda_on_cpu import Device, far

__all__ = ["launched_names", "numbers"]


def numbers(seed: int, sizes: Sequence[int] = (5, 0, 700, 1), dtype: Any = np.float32) -> list[Any]:
    """Return arrays of normally distributed numbers."""
    rng = np.random.default_rng(seed)
    return [far(rng.standard_normal(size).astype(dtype)) for size in sizes]


def launched_names(device: Device) -> list[str]:
    """Return the names of what was launched since this was asked last, without those of float32."""
    names = [name.removesuffix("_float32_float32") for name, _ in device.launches]
    device.launches.clear()
    return names
