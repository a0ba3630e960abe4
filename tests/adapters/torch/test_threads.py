"""Steps run on the threads of torch, where its OpenMP can be found."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from lars_array.kernels import threads
from lars_torch import LARS, _state, _threads

SIZES = (1 << 19, 3, 70_000)  # worth several threads

pytestmark = pytest.mark.skipif(_threads._parallel() is None, reason="torch has no GOMP_parallel")


@pytest.fixture(autouse=True)
def four_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("LARS_ARRAY_THREADS", "4")
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def steps() -> list[torch.Tensor]:
    """Return parameters after three steps."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(size, generator=generator).requires_grad_() for size in SIZES]
    own = LARS(params, lr=0.1, momentum=0.9, weight_decay=1e-4)
    for _ in range(3):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        own.step()
    return [p.detach() for p in params]


def test_steps_run_on_them_with_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[int] = []
    real = _threads.run_on_torch_threads

    def watched(work: Any, count: int) -> bool:
        def noted() -> None:
            found.append(threading.get_ident())
            work()

        return real(noted, count)

    monkeypatch.setattr(_state, "run_on_torch_threads", watched)
    monkeypatch.setattr(threads._pool, "offer", lambda jobs: pytest.fail("threads of lars_array were used"))
    on_theirs = steps()
    monkeypatch.undo()
    assert len(set(found)) > 1 and not set(found) & {x.ident for x in threading.enumerate() if "lars" in x.name}
    monkeypatch.setattr(_state, "run_on_torch_threads", lambda work, count: False)
    assert all(map(torch.equal, on_theirs, steps()))


def thread_count() -> int:
    """Return how many threads this process has, once those that are ending have ended."""
    found = -1
    while found != (now := len(os.listdir("/proc/self/task"))):
        found = now
        time.sleep(0.05)
    return found


@pytest.mark.parametrize(("theirs", "ours"), [(4, 2), (2, 4), (3, 3)])
def test_there_are_as_many_as_torch_has(theirs: int, ours: int) -> None:
    torch.set_num_threads(theirs)
    assert _threads.run_on_torch_threads(lambda: None, 2)
    before, calls = thread_count(), []
    assert _threads.run_on_torch_threads(lambda: calls.append(1), ours)
    assert thread_count() == before
    assert len(calls) == min(theirs, ours)


def test_with_one_thread_of_torch_there_are_none() -> None:
    torch.set_num_threads(1)
    assert not _threads.run_on_torch_threads(lambda: pytest.fail("it was called"), 2)


def test_an_error_on_one_of_them_is_raised_when_all_have_ended() -> None:
    ended: list[int] = []

    def work() -> None:
        ended.append(1)
        raise ArithmeticError("of a thread")

    with pytest.raises(ArithmeticError, match="of a thread"):
        _threads.run_on_torch_threads(work, 4)
    assert 1 <= len(ended) <= 4


def test_they_treat_subnormal_numbers_afterwards_as_before() -> None:
    tiny = torch.full((1 << 20,), 1e-40)
    expected = torch.count_nonzero(tiny * 0.5)
    torch.set_flush_denormal(True)
    try:
        steps()
    finally:
        torch.set_flush_denormal(False)
    assert torch.count_nonzero(tiny * 0.5) == expected == len(tiny)


def test_a_forked_process_uses_its_own() -> None:
    code = f"""
import os, sys
sys.path[:0] = {sys.path!r}
os.environ["LARS_ARRAY_THREADS"] = "4"
import torch
from lars_torch import LARS
torch.set_num_threads(4)
p = torch.ones(1 << 20).requires_grad_()
p.grad = torch.ones(1 << 20)
own = LARS([p], lr=0.1, momentum=0.9, weight_decay=1e-4)
own.step()
child = os.fork()
own.step()
if child == 0:
    os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=120)
