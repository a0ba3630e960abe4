"""Threads that lend a hand: nothing is left undone, nothing done twice, and nobody at work when a call has returned."""

from __future__ import annotations

import gc
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from lars_array.kernels import helpers
from lars_array.kernels.helpers import Helpers, Job, together


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Helpers:
    """Helpers of which none has started."""
    own = Helpers()
    monkeypatch.setattr(helpers, "_helpers", own)
    return own


class InterruptError(Exception):
    """What the signal raises: no other code catches it."""


def is_helper() -> bool:
    return threading.current_thread().name.startswith("lars-array")


def test_an_interrupt_waits_for_the_helpers() -> None:
    done: list[str] = []
    begun = threading.Event()

    def work() -> None:
        if not is_helper():
            begun.wait(10)
            raise KeyboardInterrupt
        begun.set()
        time.sleep(0.2)
        done.append("helper")

    with pytest.raises(KeyboardInterrupt):
        together(work, 2)
    assert done == ["helper"]


def test_what_a_helper_raises_is_raised() -> None:
    begun = threading.Event()

    def work() -> None:
        if is_helper():
            begun.set()
            raise MemoryError("no room")
        begun.wait(10)

    with pytest.raises(MemoryError, match="no room"):
        together(work, 2)
    together(lambda: None, 2)  # and the helper is still there


def test_one_thread_asks_for_no_helper(fresh: Helpers) -> None:
    calls: list[bool] = []
    together(lambda: calls.append(is_helper()), 1)
    assert calls == [False] and fresh.count == 0


def test_there_are_as_many_helpers_as_were_ever_asked_for(fresh: Helpers) -> None:
    for count in (2, 4, 3):
        meeting = threading.Barrier(count, timeout=10)  # nobody passes before all are there
        together(meeting.wait, count)
    assert fresh.count == 3


def test_who_comes_late_finds_nothing_and_keeps_nothing(fresh: Helpers, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    class Work:
        calls = 0

        def __call__(self) -> None:
            self.calls += 1

    monkeypatch.setattr(threading.Thread, "start", fails)
    fresh.count = 2  # who are busy elsewhere
    work = Work()
    known = weakref.ref(work)
    together(work, 3)
    assert work.calls == 1 and fresh.queue.qsize() == 2
    late = [fresh.queue.get() for _ in range(2)]
    for job in late:
        job.do()
    assert work.calls == 1
    del work
    gc.collect()
    assert known() is None


def test_nothing_piles_up_where_there_are_no_threads(fresh: Helpers, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", fails)
    calls: list[int] = []
    for _ in range(3):
        together(lambda: calls.append(1), 4)
    assert len(calls) == 3 and fresh.queue.qsize() == 0


def test_what_a_helper_raises_keeps_nothing(fresh: Helpers) -> None:
    class Work:
        begun = threading.Event()

        def __call__(self) -> None:
            if is_helper():
                self.begun.set()
                raise MemoryError("no room")
            self.begun.wait(10)

    work = Work()
    known = weakref.ref(work)
    gc.disable()
    try:
        with pytest.raises(MemoryError) as caught:
            together(work, 2)
        del work, caught
        assert known() is None
    finally:
        gc.enable()


def test_a_handler_that_comes_while_threads_start_may_ask_for_some_too(monkeypatch: pytest.MonkeyPatch) -> None:
    start, own = threading.Thread.start, Helpers()

    def interrupted(thread: threading.Thread) -> None:
        monkeypatch.setattr(threading.Thread, "start", start)
        own.offer([Job(lambda: None), Job(lambda: None)])
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    job = Job(lambda: None)
    starter = threading.Thread(target=lambda: own.offer([job]), daemon=True)
    start(starter)
    starter.join(10)
    assert not starter.is_alive()


def test_a_job_is_done_once_or_taken_back() -> None:
    calls: list[int] = []
    job = Job(lambda: calls.append(1))
    job.do()
    job.wait()
    job.wait()
    assert calls == [1]
    job = Job(lambda: calls.append(2))
    job.wait()
    job.wait()
    job.do()
    assert calls == [1]


@pytest.fixture
def interrupts() -> Iterator[Callable[[float], None]]:
    """Have an `InterruptError` raised in the main thread after some seconds, as Ctrl+C would be."""
    if not hasattr(signal, "setitimer"):
        pytest.skip("a platform without timers")

    def strike(number: int, frame: Any) -> None:
        raise InterruptError

    before = signal.signal(signal.SIGALRM, strike)
    gc.disable()  # others have callbacks there, which swallow what is raised in them
    try:
        yield lambda seconds: (signal.setitimer(signal.ITIMER_REAL, seconds), None)[1]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        gc.enable()


def test_interrupts_at_any_moment_leave_nobody_at_work(interrupts: Callable[[float], None]) -> None:
    together(lambda: None, 3)
    struck = 0
    for k in range(600):
        at_work: list[int] = []

        def work(at_work: list[int] = at_work) -> None:
            if is_helper():
                at_work.append(1)
            time.sleep(0.0001)
            if is_helper():
                at_work.pop()

        try:
            interrupts(1e-6 + (k % 60) * 1e-5)
            together(work, 3)
            interrupts(0)
        except InterruptError:
            struck += 1
        assert not at_work
    assert struck > 50


# The interpreter has begun to end when the last one goes, and a thread that is started then is waited for without end.
LAST = """
import os, sys
from lars_array.kernels.helpers import together

class Last:
    def __init__(self, together, write):
        self.together, self.write = together, write
    def __del__(self):
        self.together(lambda: self.write(1, b"done\\n"), 3)

kept = sys.modules["kept"] = type(sys)("kept")
kept.last = Last(together, os.write)
"""
PLAIN = "from lars_array.kernels.helpers import together; together(lambda: None, 4); print('done')"


@pytest.mark.parametrize("code", [PLAIN, LAST])
def test_helpers_keep_no_program_from_ending(code: str) -> None:
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert (done.stdout, done.stderr) == ("done\n", "")
    assert time.monotonic() - start < 30
