"""Signals that another thread sends at random, as a user would."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import signal
import sys
import threading
import time
import zlib
from collections.abc import Callable
from functools import partial
from typing import Any

import cuda_on_cpu
import pytest
from interrupted import SUBJECTS, assert_whole, gradients, history, in_context, optimizer_after
from moments import InterruptError

RUNS = int(os.environ.get("LARS_INTERRUPTS", "4"))


def interrupted(action: Callable[[], Any], delay: float) -> bool:
    """Do an action, and send a signal after some seconds; return whether it has ended the action."""
    begun, sent, ended = threading.Event(), threading.Event(), False

    def handler(number: int, frame: Any) -> None:
        raise InterruptError

    def send() -> None:
        begun.wait()
        end = time.perf_counter() + delay
        while time.perf_counter() < end:
            pass
        os.kill(os.getpid(), signal.SIGINT)
        sent.set()

    sender, before = threading.Thread(target=send), signal.signal(signal.SIGINT, handler)
    sender.start()
    gc.disable()  # others have callbacks there, which swallow what is raised in them
    try:
        begun.set()
        action()
        ended = True
        sent.wait()
        time.sleep(0.001)
    except InterruptError:
        pass
    finally:
        gc.enable()
        sender.join()
        assert signal.getsignal(signal.SIGINT) is handler, "the handler is not in place again"
        signal.signal(signal.SIGINT, before)
    return not ended


@pytest.mark.parametrize("name", SUBJECTS)
def test_a_step_is_whole_whenever_a_signal_comes(name: str) -> None:
    if name.startswith("cuda") and (reason := cuda_on_cpu.missing()):
        pytest.skip(reason)
    subject, rng = SUBJECTS[name], random.Random(zlib.crc32(name.encode()))
    history(name)
    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    ended = taken = 0
    with in_context(name), contextlib.ExitStack() as stack:
        stack.callback(sys.setswitchinterval, switch)
        for run in range(RUNS):
            number = run % 3
            optimizer, grads = optimizer_after(name, number), gradients(subject, number)
            start = time.perf_counter()
            subject.step(optimizer, grads)
            whole = time.perf_counter() - start
            optimizer = optimizer_after(name, number)
            ended += interrupted(partial(subject.step, optimizer, grads), rng.uniform(0, 1.2 * whole))
            taken += assert_whole(name, optimizer, number)
    print(f"{name}: {RUNS} signals, {ended} during the step; {taken} steps were taken")
