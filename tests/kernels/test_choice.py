"""Which kernel is used, and on how many threads."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lars_array import LARS
from lars_array.kernels import NUMPY_KERNELS as KERNELS
from lars_array.kernels import choose, threads


def kernel_of(p: Any, kernel: str | None = None) -> type:
    """Return the kernel that takes the steps of an optimizer."""
    optimizer = LARS([p], lr=0.1, kernel=kernel)
    optimizer.step([p + 1])
    assert optimizer._stepper._programs
    return type(optimizer._stepper._programs[0]._kernel)


def test_a_kernel_can_be_forced() -> None:
    p = np.ones(3)
    for name in KERNELS:
        assert kernel_of(p, name).__module__.split(".")[2] == name
    assert kernel_of(p) is choose([p], "compiled")
    strict = pytest.importorskip("array_api_strict").ones(3)
    assert kernel_of(strict) is choose([strict], "portable")


@pytest.mark.parametrize("name", ["fast", "", "Blocked"])
def test_an_unknown_kernel_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="kernel must be one of compiled, blocked, cuda, portable"):
        LARS([np.ones(3)], lr=0.1, kernel=name)


def test_a_kernel_that_cannot_take_the_arrays_is_refused() -> None:
    strict = pytest.importorskip("array_api_strict").ones(3)
    with pytest.raises(ValueError, match="'blocked' can't be used here: it takes NumPy arrays only"):
        LARS([strict], lr=0.1, kernel="blocked")


@pytest.mark.parametrize("count", ["0", "-1", "two", " ", "1.5", "²"])
def test_a_number_of_threads_that_is_none_changes_nothing(count: str, monkeypatch: pytest.MonkeyPatch) -> None:
    p = np.ones(threads.WORTH_IT, np.float32)
    optimizer = LARS([p], lr=0.3, momentum=0.9)
    monkeypatch.setenv("LARS_ARRAY_THREADS", count)
    with pytest.raises(ValueError, match="LARS_ARRAY_THREADS"):
        optimizer.step([p * 2])
    assert np.all(p == 1) and optimizer.steps == 0
    assert "momentum_buffer" not in optimizer.state_dict()["state"]["0"]
