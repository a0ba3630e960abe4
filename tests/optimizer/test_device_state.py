"""State on a device: nothing of it is lost, and nobody else's copy changes it."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from cuda_on_cpu import answer_whether_on_accelerator

from lars_array import LARS
from lars_array.hyperparams import GROUP_FIELDS, at_step
from lars_array.state import device as device_state
from lars_array.state.counts import ENTRIES
from lars_array.state.device import DeviceState


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have torch's tensors count as lying on a device."""
    answer_whether_on_accelerator(monkeypatch, lambda x: isinstance(x, torch.Tensor))


def test_waiting_reads_counts_of_which_no_copy_was_queued(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    state = DeviceState([True], [0.0], like=torch.ones(1))
    state._pinned.pinned = np.zeros(ENTRIES, np.int64)
    for _ in range(5):
        taken, state.counts[...] = state.decide(None, None, None, None, None)
        assert taken is None
        state.queued(may_fail=False)
    before, now, replayed = state.poll(wait=True)
    assert (before.taken, now.taken, replayed) == (0, 5, 0)
    assert state.poll(wait=False)[1].taken == 0, "the copy, which is older"


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_leaves_the_original_as_it_is(twin: Any, pretended: None) -> None:
    p = torch.ones(3)
    optimizer = LARS([p], lr=0.1, momentum=0.9, nonfinite="skip")
    optimizer.step([torch.full((3,), float("nan"))])
    device, buffers = optimizer._state.device, optimizer._state.buffers
    assert device is not None and buffers[0] is not None
    other = twin(optimizer)
    assert optimizer._state.device is device and optimizer._state.buffers is buffers
    assert other._state.buffers == [None] and other.skipped_steps == optimizer.skipped_steps == 1
    for one in (optimizer, other):
        one.step([torch.ones(3)])
        one.synchronize()
    assert optimizer.steps == other.steps == 1


def test_found_inf_on_a_device_counts_for_parameters_on_the_host(pretended: None) -> None:
    p = np.ones(3)
    optimizer = LARS([p], lr=0.1)
    optimizer.step([np.ones(3)], found_inf=torch.tensor(1.0))
    assert (optimizer.steps, optimizer.skipped_steps) == (0, 1)
    assert p.tolist() == [1.0] * 3
    optimizer.step([np.ones(3)], found_inf=torch.tensor(0.0))
    assert (optimizer.steps, optimizer.skipped_steps) == (1, 1)


def rate_of(state: DeviceState) -> float:
    return float(state.hyper[0, GROUP_FIELDS.index("lr")])


def test_numbers_that_stay_are_not_compared_again(pretended: None, monkeypatch: pytest.MonkeyPatch) -> None:
    state, groups = DeviceState([True], [0.0], like=torch.ones(1)), [at_step({"lr": 0.5}, 0)]
    state.write(groups, captured=False)
    with monkeypatch.context() as patch:
        patch.setattr(device_state, "row_values", lambda group: pytest.fail("it was compared"))
        state.write(groups, captured=False)
    state.write([at_step({"lr": 0.25}, 1)], captured=False)
    assert rate_of(state) == 0.25


def test_arrays_on_the_device_are_copied_at_each_step(pretended: None) -> None:
    lr = torch.tensor(0.5, dtype=torch.float64)
    state, groups = DeviceState([True], [0.0], like=torch.ones(1)), [at_step({"lr": lr}, 0)]
    for value in (0.5, 0.25):
        lr.fill_(value)
        state.write(groups, captured=False)
        assert rate_of(state) == value


def test_numbers_that_replays_write_are_written_at_each_step(pretended: None) -> None:
    state, groups = DeviceState([True], [0.0], like=torch.ones(1)), [at_step({"lr": 0.5}, 0)]
    state.write([at_step({"lr": 0.25}, 0)], captured=False)
    state.write(groups, captured=True)
    for _ in range(2):
        state.hyper[...] = 0.25  # a replay of another graph
        state.write(groups, captured=False)
        assert rate_of(state) == 0.5


def test_only_steps_that_were_not_taken_are_news() -> None:
    state = DeviceState([True], [0.0], like=torch.ones(1))
    assert not state.has_news, "nothing is known"
    state._pinned.pinned = np.zeros(ENTRIES, np.int64)
    for number, is_news in enumerate([False, True, True]):  # taken, skipped, rejected
        state._pinned.pinned[number] += 1
        assert state.has_news is is_news
        state.poll(wait=False)
        assert not state.has_news
