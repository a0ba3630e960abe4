"""A step that is interrupted between any two instructions was taken and counted, or nothing was."""

from __future__ import annotations

import os
from typing import Any

import cuda_on_cpu
import pytest
from interrupted import SUBJECTS, assert_whole, gradients, history, in_context, optimizer_after
from moments import moments_of, strike_at

# All of them take minutes: `make interrupts`. A prime, so that moments are others for each step.
EVERY = int(os.environ.get("LARS_MOMENTS_EVERY", "397"))


@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("name", SUBJECTS)
def test_a_step_is_whole_wherever_it_is_interrupted(name: str, number: int) -> None:
    if name.startswith("cuda") and (reason := cuda_on_cpu.missing()):
        pytest.skip(reason)
    subject = SUBJECTS[name]
    history(name)

    def action(optimizer: Any) -> Any:
        grads = gradients(subject, number)
        return lambda: subject.step(optimizer, grads)

    with in_context(name):
        for _ in range(2):  # the first time, others fill their caches
            moments = moments_of(action(optimizer_after(name, number)))
        assert len(moments) > 200
        raised = []
        for moment in moments[number * 31 % EVERY :: EVERY]:
            optimizer = optimizer_after(name, number)
            raised.append(strike_at(moment, action(optimizer)))
            assert_whole(name, optimizer, number)
        print(f"{name}, step {number}: {len(raised)} of {len(moments)} moments, {sum(raised)} raised")
        assert EVERY > len(moments) or sum(raised) > len(raised) // 2
