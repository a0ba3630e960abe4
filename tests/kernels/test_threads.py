"""Shared work: nothing is left undone, nothing is done twice, and no thread is still at work when a call returns."""

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

from lars_array.kernels import threads
from lars_array.kernels.threads import Job, ThreadPool, run_on_threads


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> ThreadPool:
    """A pool of which no thread has started."""
    own = ThreadPool()
    monkeypatch.setattr(threads, "_pool", own)
    return own


class InterruptError(Exception):
    """What the signal raises: no other code catches it."""


def is_pool_thread() -> bool:
    return threading.current_thread().name.startswith("lars-array")


def test_an_interrupt_waits_for_the_other_threads() -> None:
    done: list[str] = []
    begun = threading.Event()

    def work() -> None:
        if not is_pool_thread():
            begun.wait(10)
            raise KeyboardInterrupt
        begun.set()
        time.sleep(0.2)
        done.append("thread")

    with pytest.raises(KeyboardInterrupt):
        run_on_threads(work, 2)
    assert done == ["thread"]


def test_an_exception_in_another_thread_is_raised() -> None:
    begun = threading.Event()

    def work() -> None:
        if is_pool_thread():
            begun.set()
            raise MemoryError("no room")
        begun.wait(10)

    with pytest.raises(MemoryError, match="no room"):
        run_on_threads(work, 2)
    run_on_threads(lambda: None, 2)  # and the thread is still there


def test_one_thread_needs_no_pool(fresh: ThreadPool) -> None:
    calls: list[bool] = []
    run_on_threads(lambda: calls.append(is_pool_thread()), 1)
    assert calls == [False] and fresh.count == 0


def test_there_are_as_many_threads_as_were_ever_needed(fresh: ThreadPool) -> None:
    for count in (2, 4, 3):
        meeting = threading.Barrier(count, timeout=10)  # nobody passes before all are there
        run_on_threads(meeting.wait, count)
    assert fresh.count == 3


def test_a_late_thread_does_nothing_and_keeps_nothing(fresh: ThreadPool, monkeypatch: pytest.MonkeyPatch) -> None:
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
    run_on_threads(work, 3)
    assert work.calls == 1 and fresh.queue.qsize() == 2
    late = [fresh.queue.get() for _ in range(2)]
    for job in late:
        job.do()
    assert work.calls == 1
    del work
    gc.collect()
    assert known() is None


def test_nothing_piles_up_where_there_are_no_threads(fresh: ThreadPool, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", fails)
    calls: list[int] = []
    for _ in range(3):
        run_on_threads(lambda: calls.append(1), 4)
    assert len(calls) == 3 and fresh.queue.qsize() == 0


def test_an_exception_in_another_thread_keeps_nothing(fresh: ThreadPool) -> None:
    class Work:
        begun = threading.Event()

        def __call__(self) -> None:
            if is_pool_thread():
                self.begun.set()
                raise MemoryError("no room")
            self.begun.wait(10)

    work = Work()
    known = weakref.ref(work)
    gc.disable()
    try:
        with pytest.raises(MemoryError) as caught:
            run_on_threads(work, 2)
        del work, caught
        assert known() is None
    finally:
        gc.enable()


def test_a_handler_that_comes_while_threads_start_may_ask_for_some_too(monkeypatch: pytest.MonkeyPatch) -> None:
    start, own = threading.Thread.start, ThreadPool()

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


def test_interrupts_at_any_moment_leave_no_thread_at_work(interrupts: Callable[[float], None]) -> None:
    run_on_threads(lambda: None, 3)
    struck = 0
    for k in range(600):
        at_work: list[int] = []

        def work(at_work: list[int] = at_work) -> None:
            if is_pool_thread():
                at_work.append(1)
            time.sleep(0.0001)
            if is_pool_thread():
                at_work.pop()

        try:
            interrupts(1e-6 + (k % 60) * 1e-5)
            run_on_threads(work, 3)
            interrupts(0)
        except InterruptError:
            struck += 1
        assert not at_work
    assert struck > 50


# The interpreter has begun to end when the last one goes, and a thread that is started then is waited for without end.
LAST = """
import os, sys
from lars_array.kernels.threads import run_on_threads

class Last:
    def __init__(self, run_on_threads, write):
        self.run_on_threads, self.write = run_on_threads, write
    def __del__(self):
        self.run_on_threads(lambda: self.write(1, b"done\\n"), 3)

kept = sys.modules["kept"] = type(sys)("kept")
kept.last = Last(run_on_threads, os.write)
"""
PLAIN = "from lars_array.kernels.threads import run_on_threads; run_on_threads(lambda: None, 4); print('done')"


@pytest.mark.parametrize("code", [PLAIN, LAST])
def test_threads_keep_no_program_from_ending(code: str) -> None:
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert (done.stdout, done.stderr) == ("done\n", "")
    assert time.monotonic() - start < 30
