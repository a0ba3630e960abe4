"""Work for a GPU that takes long: what is asked for behind it waits, and the host must not."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["busy"]

CODE = """extern "C" __global__ void spin(long long cycles) {
    long long start = clock64();
    while (clock64() - start < cycles) { }
}"""


def busy(cp: Any, seconds: float) -> None:
    """Keep CuPy's current stream busy for about that long, at 1 to 2 GHz."""
    cp.RawKernel(CODE, "spin")((1,), (1,), (np.int64(seconds * 1.5e9),))
