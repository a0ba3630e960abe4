"""Whether CUDA kernels compiled for the CPU are right: asked in processes of their own, since some end them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cuda_on_cpu
import numpy as np
import pytest
from cuda_on_cpu import far

from lars_array import LARS
from lars_array.kernels.cuda import tables


def is_right(path: Path, order: int, offset: int = 0) -> bool:
    """Return whether a few steps, and one that is not to be taken, end as those of the portable kernel do.

    Parameters begin `offset` elements behind aligned places.
    """
    rng = np.random.default_rng(0)
    sizes = [5, 1000, 0, 130, 3]
    with cuda_on_cpu.pretended(order=order, path=path), pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "PIECE_LENGTH", 4 * cuda_on_cpu.THREADS + 8)
        here = [rng.standard_normal(size).astype(np.float32) for size in sizes]
        there = [far(np.concatenate([np.zeros(offset, p.dtype), p]))[offset:] for p in here]
        options: Any = {"lr": 0.3, "momentum": 0.9, "weight_decay": 0.1, "nonfinite": "skip", "trust_coefficient": 1.0}
        ours, theirs = LARS(there, **options), LARS(here, **options, kernel="portable")
        for step in range(4):
            grads = [rng.standard_normal(size).astype(np.float32) for size in sizes]
            if step == 2:
                grads[3][7] = np.nan
            ours.step([far(g) for g in grads])
            theirs.step(grads)
    return all(np.allclose(np.asarray(p), q, rtol=1e-6, atol=0) for p, q in zip(there, here, strict=True))
