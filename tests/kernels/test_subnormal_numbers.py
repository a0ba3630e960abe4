"""Another library may have one thread flush subnormal numbers to zero: all threads of a step follow the calling one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from lars_array import LARS
from lars_array.kernels import threads

torch = pytest.importorskip("torch")


@pytest.fixture(params=[False, True], ids=["kept", "flushed"])
def flushes(request: pytest.FixtureRequest) -> Iterator[bool]:
    threads.run_on_threads(lambda: None, 4)  # threads are there before, and have the mode of their making
    if not torch.set_flush_denormal(request.param):
        pytest.skip("a processor without such a mode")
    yield request.param
    torch.set_flush_denormal(False)


@pytest.mark.parametrize("kernel", ["compiled", "blocked"])
def test_all_threads_of_a_step_treat_subnormal_numbers_alike(
    kernel: str, flushes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Any] = []
    for count in ("1", "4"):
        monkeypatch.setenv("LARS_ARRAY_THREADS", count)
        p, tiny = np.zeros(1 << 22, np.float32), np.full(1 << 22, 71362, np.int32).view(np.float32)  # 1e-40
        optimizer = LARS([p], lr=0.5, momentum=0.9, nonfinite="propagate", kernel=kernel, rescale_grad=0.5)
        for _ in range(3):
            optimizer.step([tiny])
        found.append([p.tobytes(), optimizer.state_dict()["state"]["0"]["momentum_buffer"].tobytes()])
        bits = p.view(np.int32) & 0x7FFFFFFF
        assert (bits == 0).all() if flushes else (bits != 0).all()
    assert found[0] == found[1]
