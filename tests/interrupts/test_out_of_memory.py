"""A step one of whose allocations fails has changed nothing, and can be taken again."""

from __future__ import annotations

import os
from functools import partial
from itertools import count

import cuda_on_cpu
import pytest
from interrupted import SUBJECTS, assert_whole, gradients, history, in_context, optimizer_after
from moments import run_out_of_memory

EVERY = int(os.environ.get("LARS_MOMENTS_EVERY", "67"))


@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("name", SUBJECTS)
def test_a_step_is_whole_whichever_allocation_fails(name: str, number: int) -> None:
    if name.startswith("cuda") and (reason := cuda_on_cpu.missing()):
        pytest.skip(reason)
    subject, failed = SUBJECTS[name], 0
    history(name)
    with in_context(name):
        for place in count(1 + number % EVERY, EVERY):
            optimizer, grads = optimizer_after(name, number), gradients(subject, number)
            if not run_out_of_memory(place, partial(subject.step, optimizer, grads)):
                break
            failed += 1
            assert_whole(name, optimizer, number)
    assert failed or EVERY > 1
    print(f"{name}, step {number}: {failed} failed")
