"""`Recorder` and the counts that it reads, over `lars_torch.LARS`."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from cuda_on_cpu import answer_whether_on_accelerator
from torch import nn

import lars_torch._state
from lars_array import Recorder
from lars_torch import LARS

HYPER: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))


def set_gradients(net: nn.Module, step: int, *, bad: bool = False) -> None:
    for k, p in enumerate(net.parameters()):
        p.grad = torch.full_like(p, float("nan") if bad and k == 1 else 1.0 + step + k)


def assert_row(recorder: Recorder, row: int, optimizer: LARS) -> None:
    """A row of the record is what the optimizer reports of its last step."""
    norms, ratios = optimizer.norms(), optimizer.trust_ratios()
    blank = (np.nan, np.nan)
    wanted = [[*norms.get(name, blank), ratios.get(name, np.nan)] for name in recorder.layers]
    arrays = recorder.parameter_norms, recorder.gradient_norms, recorder.trust_ratios
    np.testing.assert_array_equal(np.stack([array[row] for array in arrays], axis=-1), wanted)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_each_step_is_recorded(compiled: bool) -> None:
    net = model()
    optimizer = LARS(net.parameters(), **HYPER)
    recorder = Recorder(optimizer)
    step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
    for k in range(3):
        set_gradients(net, k)
        step()
        recorder.record()
        assert_row(recorder, k, optimizer)
    assert recorder.steps.tolist() == [0, 1, 2]
    assert recorder.layers == ["0", "1", "2", "3"]


@pytest.mark.parametrize("nonfinite", ["skip", "raise"])
def test_skipped_and_rejected_steps_are_neither_counted_nor_recorded(nonfinite: str) -> None:
    net = model()
    optimizer = LARS(net.parameters(), **HYPER, nonfinite=nonfinite)
    recorder = Recorder(optimizer)
    for k in range(4):
        set_gradients(net, k, bad=k in (0, 2))
        if k in (0, 2) and nonfinite == "raise":
            with pytest.raises(ValueError, match="non-finite"):
                optimizer.step()
        else:
            optimizer.step()
        recorder.record()
    assert optimizer.steps == 2
    assert recorder.steps.tolist() == [0, 1]
    assert_row(recorder, 1, optimizer)


def test_a_parameter_may_get_its_first_gradient_later_and_names_may_repeat() -> None:
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6):
        pytest.skip("parameters have no names")
    net = model()
    named = [("w" if p.ndim > 1 else name, p) for name, p in net.named_parameters()]
    optimizer = LARS(named, **HYPER)
    recorder = Recorder(optimizer)
    for k in range(3):
        set_gradients(net, k)
        if k == 0:
            net[0].weight.grad = None
        optimizer.step()
        recorder.record()
        assert_row(recorder, k, optimizer)
    assert recorder.layers == ["0.bias", "w (2)", "2.bias", "w (0)"]
    assert np.isnan(recorder.trust_ratios).sum() == 1
    assert optimizer.steps == 3


def test_a_checkpoint_starts_the_count_again_and_a_number_may_be_given() -> None:
    net = model()
    optimizer = LARS(net.parameters(), **HYPER)
    recorder = Recorder(optimizer, every=2)
    for k in range(3):
        set_gradients(net, k)
        optimizer.step()
        recorder.record()
    for start in (None, 40):
        optimizer.load_state_dict(optimizer.state_dict())
        recorder.record(start)
        for k in range(3):
            set_gradients(net, k)
            optimizer.step()
            recorder.record(None if start is None else start + k)
    assert optimizer.steps == 3
    assert recorder.steps.tolist() == [0, 2, 0, 2, 40, 42]


def test_neither_the_model_nor_its_gradients_are_kept_alive() -> None:
    net = model()
    optimizer = LARS(net.parameters(), **HYPER)
    recorder = Recorder(optimizer)
    set_gradients(net, 0)
    optimizer.step()
    recorder.record()
    watched = [weakref.ref(x) for p in net.parameters() for x in (p, p.grad)] + [weakref.ref(optimizer)]
    del net, optimizer
    gc.collect()
    assert not any(x() is not None for x in watched)
    assert recorder.trust_ratios.shape == (1, 4)


def test_copies_of_the_optimizer_count_their_own_steps() -> None:
    net = model()
    optimizer = LARS(net.parameters(), **HYPER)
    set_gradients(net, 0)
    optimizer.step()
    twin = copy.deepcopy(optimizer)
    assert (optimizer.steps, twin.steps) == (1, 0)
    for p in twin.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    twin.step()
    assert (optimizer.steps, twin.steps) == (1, 1)


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have torch's tensors count as lying on a device, where they stay tensors."""
    answer_whether_on_accelerator(monkeypatch, lambda x: isinstance(x, torch.Tensor))
    monkeypatch.setattr(lars_torch._state, "library_of", lambda device, tensors: "torch")


def test_steps_that_a_device_skips_are_not_recorded_and_not_counted_once_that_is_known(pretended: None) -> None:
    net = model()
    optimizer = LARS(net.parameters(), **HYPER, nonfinite="skip")
    recorder = Recorder(optimizer)
    for k in range(6):
        set_gradients(net, k, bad=k in (0, 3))
        if k < 2:
            net[2].weight.grad = None  # with its first gradient the state on the device is made anew
        optimizer.step()
        recorder.record()
    assert optimizer.steps == 5, "that the first is skipped was known when the state was made anew"
    assert recorder.steps.tolist() == [0, 1, 2, 3]
    np.testing.assert_allclose(recorder.gradient_norms[:, recorder.layers.index("0")] / 20**0.5, [2, 3, 5, 6])
    optimizer.synchronize()
    assert (optimizer.steps, optimizer.skipped_steps) == (4, 2)


def test_tensorboard_can_be_written(tmp_path: Any) -> None:
    tensorboard = pytest.importorskip("torch.utils.tensorboard", exc_type=ImportError)
    net = model()
    optimizer = LARS(net.parameters(), **HYPER)
    recorder = Recorder(optimizer)
    set_gradients(net, 0)
    optimizer.step()
    recorder.record()
    with tensorboard.SummaryWriter(tmp_path) as writer:
        recorder.to_tensorboard(writer)
    assert list(tmp_path.iterdir())


def test_last_lr_is_that_of_the_groups() -> None:
    first, second = model().children(), torch.ones(2, requires_grad=True)
    groups = [{"params": next(first).parameters()}, {"params": [second], "lr": torch.tensor(0.25)}]
    optimizer = LARS(groups, lr=0.5)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    assert optimizer.last_lr == [0.5, 0.25]
    second.grad = torch.ones(2)
    optimizer.step()
    schedule.step()
    assert optimizer.last_lr == [float(lr) for lr in schedule.get_last_lr()] == [0.25, 0.125]
    assert {type(lr) for lr in optimizer.last_lr} == {float}
