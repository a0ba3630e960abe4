"""`Recorder` on a device: nothing is waited for, later steps change nothing, and steps not taken are left out.

The CUDA kernel is run on the CPU; torch's tensors, for the portable one, are only said to lie on a device.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import cuda_on_cpu
import numpy as np
import pytest
from pretended_devices import Device, pretended

from lars_array import LARS, Recorder

HYPER: dict[str, Any] = {
    "lr": 0.5,
    "momentum": 0.9,
    "weight_decay": 0.1,
    "max_grad_norm": 1.0,
}


@pytest.fixture(params=["torch", "cuda"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    yield from pretended(request.param, monkeypatch)


def model() -> dict[str, Any]:
    return {"w": np.array([[3.0, 4.0]]), "b": np.array([0.6, 0.8])}


def gradients(step: int, *, bad: bool = False) -> dict[str, Any]:
    w = np.array([[np.nan, 1.0]]) if bad else np.array([[3.0, 4.0]]) / (step + 1)
    return {"w": w, "b": np.array([0.15, 0.2]) + step}


def assert_alike(far: Recorder, near: Recorder, rtol: float = 1e-12) -> None:
    assert far.steps.tolist() == near.steps.tolist()
    assert far.layers == near.layers
    for name in ("parameter_norms", "gradient_norms", "trust_ratios"):
        np.testing.assert_allclose(getattr(far, name), getattr(near, name), rtol, err_msg=name)


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("bad", [(), (0,), (2, 3), (5,)], ids=str)
def test_it_records_what_steps_on_the_host_have(device: Device, bad: tuple[int, ...], every: int) -> None:
    here = model()
    there = {name: device.put(p) for name, p in here.items()}
    near, far = LARS(here, **HYPER, nonfinite="skip"), LARS(there, **HYPER, nonfinite="skip")
    one, other = Recorder(near), Recorder(far)
    for step in range(6):
        grads = gradients(step, bad=step in bad)
        for optimizer in (near, far):  # not by a schedule, which on a device moves on until a skipped step is reported
            optimizer.param_groups[0].update(lr=0.5 / (step + 1), weight_decay=0.1 + step)
        near.step(grads)
        one.record(None if every == 1 else step)
        with device.unread():
            far.step({name: device.put(g) for name, g in grads.items()})
            other.record(None if every == 1 else step)
    wanted = [step for step in range(6) if step not in bad]
    assert one.steps.tolist() == (list(range(len(wanted))) if every == 1 else wanted)
    assert_alike(other, one)


def test_every_leaves_out_the_others(device: Device) -> None:
    optimizer = LARS({name: device.put(p) for name, p in model().items()}, **HYPER)
    recorder = Recorder(optimizer, every=2)
    for step in range(5):
        optimizer.step({name: device.put(g) for name, g in gradients(step).items()})
        recorder.record()
    assert recorder.steps.tolist() == [0, 2, 4]
    np.testing.assert_allclose(recorder.gradient_norms[:, 0], [5, 5 / 3, 1], 1e-12)


def test_a_step_is_recorded_once(device: Device) -> None:
    optimizer = LARS({name: device.put(p) for name, p in model().items()}, **HYPER)
    recorder = Recorder(optimizer)
    optimizer.step({name: device.put(g) for name, g in gradients(0).items()})
    recorder.record()
    recorder.record()
    assert recorder.steps.tolist() == [0]


@pytest.mark.skipif(bool(cuda_on_cpu.missing()), reason=str(cuda_on_cpu.missing()))
def test_steps_that_a_graph_replays_are_recorded_though_the_host_does_not_count_them() -> None:
    with cuda_on_cpu.pretended():
        optimizer = LARS({name: cuda_on_cpu.far(p) for name, p in model().items()}, **HYPER)
        recorder, numbered = Recorder(optimizer), Recorder(optimizer, every=2)
        for step in range(5):
            sent = {name: cuda_on_cpu.far(g) for name, g in gradients(step).items()}
            if step == 0:
                optimizer.step(sent)
            else:  # as a replay: the same launches, by nobody who counts them
                optimizer._stepper.step(optimizer._state, list(sent.values()), optimizer._read_groups())
                optimizer._state.device._queued -= 1
            recorder.record()
            numbered.record(step)
        assert optimizer.steps == 1
        assert recorder.steps.tolist() == [0, 1, 2, 3, 4]
        assert numbered.steps.tolist() == [0, 2, 4]
        np.testing.assert_allclose(recorder.gradient_norms[:, 0], [5 / k for k in range(1, 6)], 1e-12)


def test_a_recorder_made_after_skipped_steps_numbers_the_next_ones(device: Device) -> None:
    optimizer = LARS({name: device.put(p) for name, p in model().items()}, **HYPER, nonfinite="skip")
    for bad in (False, True, False, True):
        optimizer.step({name: device.put(g) for name, g in gradients(0, bad=bad).items()})
    recorder = Recorder(optimizer)
    recorder.record()
    for bad in (True, False):
        optimizer.step({name: device.put(g) for name, g in gradients(0, bad=bad).items()})
        recorder.record()
    assert recorder.steps.tolist() == [2]


def test_numbers_are_right_after_the_device_has_reported_skipped_steps(device: Device) -> None:
    optimizer = LARS({name: device.put(p) for name, p in model().items()}, **HYPER, nonfinite="skip")
    recorder = Recorder(optimizer)
    for bad in (False, True, False, True, False):
        optimizer.step({name: device.put(g) for name, g in gradients(0, bad=bad).items()})
        recorder.record()
        if bad:
            optimizer.synchronize()
    assert recorder.steps.tolist() == [0, 1, 2]


def test_a_state_that_is_loaded_goes_on_with_its_number(device: Device) -> None:
    optimizer = LARS({name: device.put(p) for name, p in model().items()}, **HYPER, nonfinite="skip")
    recorder = Recorder(optimizer)

    def step(*, bad: bool = False) -> None:
        optimizer.step({name: device.put(g) for name, g in gradients(0, bad=bad).items()})
        recorder.record()

    step()
    step()
    for start, bad in ((10, False), (0, False), (20, True)):
        optimizer.load_state_dict(optimizer.state_dict() | {"steps": start})
        step(bad=bad)
        step()
    assert recorder.steps.tolist() == [0, 1, 10, 11, 0, 1, 20]


def test_parameters_are_not_kept_alive(device: Device) -> None:
    params = {name: device.put(p) for name, p in model().items()}
    optimizer = LARS(params, **HYPER)
    recorder = Recorder(optimizer)
    grads = {name: device.put(g) for name, g in gradients(0).items()}
    optimizer.step(grads)
    recorder.record()
    watched = [weakref.ref(x) for x in (*params.values(), *grads.values(), optimizer)]
    del params, grads, optimizer
    gc.collect()
    assert [x() for x in watched] == [None] * 5
    np.testing.assert_allclose(recorder.gradient_norms, [[5, 0.25]], 1e-12)
