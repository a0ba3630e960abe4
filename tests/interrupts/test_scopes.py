"""Handlers of signals wait in a scope from `defer_signals` on, and nowhere else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from lars_array import LARS, _interrupts
from lars_array._interrupts import SignalScope, defer_signals


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in _interrupts.SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_signal_is_handled_when_the_scope_ends() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt):
        with SignalScope():
            defer_signals()
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            done.append("all of it")
    assert done == ["all of it"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with SignalScope():  # and is not handled again
        defer_signals()


def test_a_signal_before_that_is_handled_at_once() -> None:
    with SignalScope(), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
        pytest.fail("it went on")
    defer_signals()  # outside of a scope: nothing would handle it later
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("number", _interrupts.SIGNALS)
def test_all_handlers_of_python_wait(number: int) -> None:
    calls: list[int] = []
    signal.signal(number, lambda number, frame: calls.append(number))
    with SignalScope():
        defer_signals()
        signal.raise_signal(number)
        assert not calls
    assert calls == [number]


def test_each_handler_is_called_although_another_raises() -> None:
    calls: list[int] = []

    def stop(number: int, frame: Any) -> None:
        calls.append(number)
        raise SystemExit(number)

    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, stop)
    with pytest.raises(SystemExit):
        with SignalScope():
            defer_signals()
            for number in (signal.SIGTERM, signal.SIGUSR1):
                signal.raise_signal(number)
    assert sorted(calls) == sorted([signal.SIGTERM, signal.SIGUSR1])
    assert signal.getsignal(signal.SIGTERM) is stop


def test_the_systems_actions_and_other_handlers_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    with SignalScope():
        defer_signals()
        assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGUSR2) is signal.SIG_DFL

    class OfC:
        """As if a library had set handlers in C, which Python neither knows nor could set again."""

        SIG_DFL, SIG_IGN = 0, 1

        @staticmethod
        def getsignal(number: int) -> None:
            return None

        @staticmethod
        def signal(number: int, handler: Any) -> None:
            pytest.fail("it was replaced")

    monkeypatch.setattr(_interrupts, "_signal", OfC)
    with SignalScope():
        defer_signals()


def test_a_handler_may_take_a_step_and_so_may_other_threads() -> None:
    def optimizer() -> LARS:
        return LARS([np.ones(3)], lr=0.1, momentum=0.9, weight_decay=0.1)

    other, taken = optimizer(), optimizer()
    signal.signal(signal.SIGINT, lambda *_: other.step([np.ones(3)]))
    with SignalScope():
        defer_signals()
        signal.raise_signal(signal.SIGINT)
        thread = threading.Thread(target=lambda: taken.step([np.ones(3)]))
        thread.start()
        thread.join()
        assert (other.steps, taken.steps) == (0, 1)
    assert other.steps == 1
    signal.signal(signal.SIGWINCH, lambda *_: other.step([np.ones(3)]))  # one that does not wait
    calls: list[int] = []
    signal.signal(signal.SIGINT, lambda *_: calls.append(other.steps))
    with SignalScope():
        defer_signals()
        signal.raise_signal(signal.SIGWINCH)
        signal.raise_signal(signal.SIGINT)
        assert not calls and other.steps == 2
    assert calls == [2]
    signal.signal(signal.SIGWINCH, signal.SIG_DFL)


def forked(body: str, around: str) -> None:
    """Fork in a thread other than the main one, around which `around` is; the child runs `body`, which sets `code`."""
    script = f"""
import contextlib, os, signal, threading
from lars_array._interrupts import SignalScope, defer_signals, uninterrupted

statuses = []

def fork():
    child = os.fork()
    if child:
        statuses.append(os.waitpid(child, 0)[1])
        return
    code = 1
    try:
{textwrap.indent(textwrap.dedent(body).strip(), " " * 8)}
    except KeyboardInterrupt:
        code = 0 if code == 2 else 3
    os._exit(code)

with {around}:
    thread = threading.Thread(target=fork)
    thread.start()
    thread.join()
assert statuses == [0], statuses
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, timeout=60)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a platform without fork")
def test_the_thread_that_has_forked_is_the_main_one_of_its_child() -> None:
    body = """
        with SignalScope():
            defer_signals()
            signal.raise_signal(signal.SIGINT)
            code = 2
    """
    forked(body, "contextlib.nullcontext()")


def test_a_step_that_waits_for_other_processes_is_interrupted_at_once() -> None:
    """Ctrl+C must end a run one of whose processes is gone."""

    def wait(table: Any) -> None:
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
        time.sleep(60)

    p = np.ones(3)
    optimizer = LARS([p], lr=0.1, momentum=0.9, all_reduce=wait)
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        optimizer.step([np.ones(3)])
    assert time.monotonic() - start < 30
    assert optimizer.steps == 0 and (p == 1).all()


def test_a_rule_is_interrupted_at_once() -> None:
    def slow(S: Any, hyper: Any, xp: Any) -> Any:
        if isinstance(S, np.ndarray):
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
            time.sleep(60)
        raise TypeError("no tape")

    optimizer = LARS([np.ones(3)], lr=0.1, momentum=0.9, rule=slow)
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        optimizer.step([np.ones(3)])
    assert time.monotonic() - start < 30 and optimizer.steps == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_in_a_child_forked_by_another_thread_meanwhile_handlers_are_in_place() -> None:
    body = """
        code = 2
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(1000):
            pass
        code = 1
    """
    forked(body, "uninterrupted()")


def test_handlers_of_a_scope_that_could_not_end_are_put_in_place_by_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise MemoryError

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        with SignalScope():
            defer_signals()
            patch.setattr(_interrupts, "_restore", fail)
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    with pytest.raises(KeyboardInterrupt):  # the signal is not lost either
        with SignalScope():
            defer_signals()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
