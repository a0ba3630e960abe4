"""A step over ResNet-50's parameters makes next to nothing: everything it needs is there after the first."""

from __future__ import annotations

import gc
import tracemalloc
from pathlib import Path

import pytest
import torch

from benchmarks.shapes import resnet50
from lars_torch import LARS

MIB = 2**20
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def memory(entry: str) -> int:
    """Return bytes that the kernel says this process has, VmRSS, or had at most, VmHWM."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(entry))
    return 1024 * int(line.split()[1])


@pytest.fixture(scope="module")
def optimizer() -> LARS:
    params = [torch.nn.Parameter(torch.full(shape, 0.01)) for shape in resnet50()]
    optimizer = LARS(params, lr=0.1, momentum=0.9, weight_decay=1e-4)
    for _ in range(2):
        new_gradients(optimizer)
        optimizer.step()
    return optimizer


def new_gradients(optimizer: LARS) -> None:
    optimizer.zero_grad(set_to_none=True)
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.full_like(p, 0.001)
    gc.collect()


@pytest.mark.parametrize("new", [False, True], ids=["gradients stay", "new gradients"])
def test_python_allocates_less_than_a_mebibyte(optimizer: LARS, new: bool) -> None:
    tracemalloc.start()
    try:
        for _ in range(2):  # what is kept for one step may replace what was kept for the one before
            if new:
                new_gradients(optimizer)
            tracemalloc.reset_peak()
            before, _ = tracemalloc.get_traced_memory()
            optimizer.step()
        after, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak - before < MIB
    assert after - before < MIB / 8


@pytest.mark.skipif(not CLEAR.exists(), reason="needs Linux, which can forget how much memory a process had at most")
@pytest.mark.parametrize("new", [False, True], ids=["gradients stay", "new gradients"])
def test_the_process_grows_by_less_than_a_mebibyte(optimizer: LARS, new: bool) -> None:
    if new:
        new_gradients(optimizer)
    optimizer.step()
    if new:
        new_gradients(optimizer)
    CLEAR.write_text("5")
    before = memory("VmRSS")
    optimizer.step()
    assert memory("VmHWM") - before < MIB


@pytest.mark.skipif(not CLEAR.exists(), reason="needs Linux, which can forget how much memory a process had at most")
def test_a_copy_would_be_seen(optimizer: LARS) -> None:
    CLEAR.write_text("5")
    before = memory("VmRSS")
    torch.ones(16 * MIB)  # more than malloc keeps of what was freed before
    assert memory("VmHWM") - before > MIB
