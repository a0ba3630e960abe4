"""Steps on a device: the host never waits, and the device decides whether a step is taken.

There is no such device here: see `pretended_devices`.
"""

from __future__ import annotations

import contextlib
import copy
import pickle
import sys
from collections.abc import Iterator
from typing import Any

import array_api_strict
import numpy as np
import pytest
from assertions import assert_close, assert_same, fingerprint, to_numpy
from pretended_devices import DEVICES, Device, pretended

from lars_array import LARS, RULES, NonFiniteError, hyperparams, kernels
from lars_array.core import Hyper
from lars_array.kernels.base import Gradients, KernelArrays
from lars_array.state import device as device_state
from lars_array.state.counts import PinnedCounts, StepCounts
from lars_array.state.device import DeviceState
from lars_array.state.device_rows import vectors

SHAPES = {"w": (4, 3), "b": (3,), "last": (5,)}
HYPER: dict[str, Any] = {"lr": 0.3, "momentum": 0.9, "weight_decay": 0.01, "trust_coefficient": 0.1}


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    yield from pretended(request.param, monkeypatch)


def numbers(seed: int, scale: float = 1.0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {name: scale * rng.standard_normal(shape) for name, shape in SHAPES.items()}


class Pair:
    """The same optimizer over NumPy arrays and over arrays on a device, held to each other step by step."""

    def __init__(self, device: Device, groups: Any = None, **hyper: Any) -> None:
        self.device = device
        self.here = numbers(0)
        self.there = {name: device.put(p) for name, p in self.here.items()}
        shared = HYPER | hyper

        def make(params: Any) -> LARS:
            given = (
                params if groups is None else [{"params": {n: params[n] for n in names}, **o} for names, o in groups]
            )
            return LARS(given, **shared)

        self.near, self.far = make(self.here), make(self.there)

    def step(self, grads: Any, **options: Any) -> None:
        sent = {name: None if g is None else self.device.put(g) for name, g in grads.items()}
        found = {name: self.device.put(np.asarray(x)) for name, x in options.items()}
        with contextlib.suppress(NonFiniteError):
            self.near.step(grads, **options)
        with self.device.unread():
            self.far.step(sent, **found)

    def assert_alike(self) -> None:
        for name, p in self.here.items():
            assert_close(self.there[name], p)
        ours, theirs = self.far.state_dict(), self.near.state_dict()
        assert (ours["steps"], ours["skipped_steps"]) == (theirs["steps"], theirs["skipped_steps"])
        for name, state in theirs["state"].items():
            assert ours["state"][name].keys() == state.keys()
            for key, value in state.items():
                assert_close(ours["state"][name][key], value)


MANY: dict[str, dict[str, Any]] = {
    "plain": {},
    "nesterov": {"nesterov": True},
    "dampening": {"dampening": 0.4},
    "no momentum": {"momentum": 0},
    "clipped": {"max_grad_norm": 0.5},
    "clipped, third sum": {"max_grad_norm": 0.5, "rule": "optax"},
    "bounds": {"trust_bounds": (0.01, 0.02), "trust_clip": True},
    "maximize": {"maximize": True, "rescale_grad": 0.5},
    "propagate": {"nonfinite": "propagate"},
    "skip": {"nonfinite": "skip"},
    "schedule": {"lr": lambda t: 0.1 * (t + 1), "rule": "nvidia"},
    **{f"rule {name}": {"rule": name} for name in sorted(RULES)},
}


@pytest.mark.parametrize("what", MANY)
def test_a_step_reads_nothing_and_is_numpys(device: Device, what: str) -> None:
    pair = Pair(device, **MANY[what])
    for seed in range(1, 5):
        pair.step(numbers(seed))
    pair.assert_alike()
    assert_close(list(pair.far.norms()["w"]), list(pair.near.norms()["w"]))
    assert_close(list(pair.far.trust_ratios().values()), list(pair.near.trust_ratios().values()))


def test_groups_of_several_rules_and_policies(device: Device) -> None:
    groups = [(["w"], {"rule": "timm", "nonfinite": "propagate"}), (["b"], {"lr": 0.1}), (["last"], {"momentum": 0})]
    pair = Pair(device, groups, nonfinite="skip")
    for seed in range(1, 4):
        pair.step(numbers(seed))
    pair.assert_alike()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("policy", ["skip", "raise"])
def test_a_step_that_is_not_finite_changes_nothing(device: Device, policy: str, bad: float) -> None:
    pair = Pair(device, nonfinite=policy, lr=lambda t: 0.1 * (t + 1))
    pair.step(numbers(1))
    broken = numbers(2)
    broken["b"][1] = bad
    before = fingerprint(pair.there)
    pair.step(broken)
    assert fingerprint(pair.there) == before
    if policy == "raise":
        with pytest.raises(NonFiniteError) as caught:
            pair.far.synchronize()
        expected = "the norm of the gradient of 'b' was not finite in an earlier step, which changed nothing"
        assert str(caught.value) == expected
    pair.far.synchronize()  # says everything once
    pair.step(numbers(3))
    pair.assert_alike()
    assert pair.far.steps == 2
    assert pair.far.skipped_steps == (policy == "skip")


@pytest.mark.parametrize("policy", ["skip", "raise"])
def test_a_wide_gradient_that_its_narrow_parameter_cannot_take_changes_nothing(device: Device, policy: str) -> None:
    """Its squares have a finite sum in float64, and the rule does not read it."""
    p = device.put(np.ones(3, np.float32))
    optimizer = LARS([p], 0.1, momentum=0.9, nonfinite=policy)
    optimizer.step([device.put(np.full(3, 1e100))])
    with contextlib.suppress(NonFiniteError):
        optimizer.synchronize()
    assert_same(p, np.ones(3, np.float32))
    assert (optimizer.steps, optimizer.skipped_steps) == (0, int(policy == "skip"))


@pytest.mark.parametrize(("name", "reason"), [("w", "norm of the parameter"), ("w", "update")])
def test_the_error_says_what_was_not_finite(device: Device, name: str, reason: str) -> None:
    pair = Pair(device)
    broken = numbers(1)
    if reason != "update":
        pair.there[name][0, 0] = np.nan
    else:
        pair.far.param_groups[0] |= {"rule": "paper", "lr": 1e300, "trust_coefficient": 1e300}
    pair.far.step({key: device.put(g) for key, g in broken.items()})
    with pytest.raises(NonFiniteError, match=f"the {reason} of '{name}'"):
        pair.far.synchronize()


def test_steps_go_on_after_a_rejected_one(device: Device) -> None:
    """By order of the layers: "raise" wins over "skip", and "propagate" is not asked."""
    groups = [(["w"], {"nonfinite": "skip"}), (["b"], {"nonfinite": "propagate"}), (["last"], {})]
    pair = Pair(device, groups)
    broken = {name: np.full(shape, np.nan) for name, shape in SHAPES.items()}
    pair.step(numbers(1) | {"b": broken["b"]})
    pair.step(numbers(2) | {"w": broken["w"]})
    pair.step(broken)
    with pytest.raises(NonFiniteError, match="'last'"):
        pair.far.synchronize()
    for name in ("w", "last"):
        assert_close(pair.there[name], pair.here[name])
    assert np.isnan(to_numpy(pair.there["b"])).all()
    assert (pair.far.steps, pair.far.skipped_steps) == (pair.near.steps, pair.near.skipped_steps) == (1, 1)


class Late(PinnedCounts):
    """Counts that arrive when `arrived` is set."""

    arrived = False

    def read(self, *, wait: bool) -> StepCounts | None:
        return super().read(wait=wait or self.arrived)


def test_the_first_call_after_the_counts_have_arrived_raises(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_state, "PinnedCounts", Late)
    pair = Pair(device)
    pair.step(numbers(1) | {"w": np.full(SHAPES["w"], np.nan)})
    pair.step(numbers(2))
    assert pair.far.steps == 2, "nothing is known yet"
    monkeypatch.setattr(Late, "arrived", True)
    before = fingerprint(pair.there)
    with pytest.raises(NonFiniteError, match="the gradient of 'w'"):
        pair.far.step({name: device.put(g) for name, g in numbers(3).items()})
    assert fingerprint(pair.there) == before
    monkeypatch.setattr(Late, "arrived", False)
    pair.step(numbers(4))
    pair.assert_alike()


@pytest.mark.parametrize("policy", ["propagate", "skip", "raise"])
def test_what_a_loss_scaler_has_found_skips_the_step(device: Device, policy: str) -> None:
    pair = Pair(device, nonfinite=policy)
    pair.step(numbers(1), found_inf=0.0)
    before = fingerprint(pair.there)
    pair.step({name: np.full(shape, np.inf) for name, shape in SHAPES.items()}, found_inf=1.0)
    assert fingerprint(pair.there) == before
    pair.step(numbers(2), found_inf=0.0)
    pair.assert_alike()
    assert pair.far.skipped_steps == pair.near.skipped_steps == 1


@pytest.mark.parametrize("found", [True, 1.0, np.float32(1), np.array(1.0)])
def test_what_was_found_may_be_known_here(device: Device, found: Any) -> None:
    pair = Pair(device)
    grads = {name: device.put(g) for name, g in numbers(1).items()}
    before = fingerprint(pair.there)
    pair.far.step(grads, found_inf=found)
    assert fingerprint(pair.there) == before
    with device.unread():
        pair.far.step(grads, found_inf=type(found)(0) if not isinstance(found, np.ndarray) else np.array(0.0))
    pair.far.synchronize()
    assert (pair.far.steps, pair.far.skipped_steps) == (1, 1)


def test_steps_of_a_graph_are_counted(device: Device) -> None:
    """The device counts them; here one is captured and not taken, and two are replayed."""
    pair = Pair(device, nonfinite="skip")
    for seed in (1, 2, 3):
        pair.step(numbers(seed))
    assert pair.far._state.device is not None
    counts = pair.far._state.device.counts
    counts[...] = counts + device.put(np.array([1, 1, 0, 0]))
    assert (pair.far.steps, pair.far.skipped_steps) == (3, 0)
    pair.far.synchronize()
    assert (pair.far.steps, pair.far.skipped_steps) == (4, 1)
    pair.far.synchronize()
    pair.step(numbers(4))
    pair.far.synchronize()
    assert (pair.far.steps, pair.far.skipped_steps) == (5, 1)


def test_layers_come_and_go(device: Device) -> None:
    """What only the device knows, last learning rates and unused buffers, goes along."""
    pair = Pair(device, rule="nvidia", dampening=0.5, lr=lambda t: 0.1 * (t + 1))
    for seed, absent in enumerate([["b"], [], ["w", "last"], ["b"], [], []], start=1):
        pair.step({name: None if name in absent else g for name, g in numbers(seed).items()})
    pair.assert_alike()
    extra = np.ones(2)
    pair.near.add_param_group({"params": {"extra": extra}, "lr": 0.1})
    there = device.put(extra)
    pair.far.add_param_group({"params": {"extra": there}, "lr": 0.1})
    pair.here["extra"], pair.there["extra"] = extra, there
    pair.step(numbers(9) | {"extra": np.ones(2)})
    pair.assert_alike()


def test_momentum_can_be_switched_off_and_on(device: Device) -> None:
    pair = Pair(device, momentum=0, dampening=0.5)
    for momentum in (0, 0.9, 0, 0.9):
        pair.near.param_groups[0]["momentum"] = pair.far.param_groups[0]["momentum"] = momentum
        pair.step(numbers(3))
    pair.assert_alike()


def test_state_can_be_saved_and_copied(device: Device) -> None:
    pair = Pair(device, rule="nvidia", lr=0.3)
    pair.step(numbers(1))
    pair.step(numbers(2))
    saved = pair.far.state_dict()
    again = Pair(device, rule="nvidia", lr=0.1)
    again.far.load_state_dict(saved)
    assert_same(again.far.state_dict(), saved)
    assert_same(copy.deepcopy(pair.far).state_dict(), saved)
    if not isinstance(pair.there["w"], array_api_strict._array_object.Array):  # its arrays can't be pickled
        assert_same(pickle.loads(pickle.dumps(pair.far)).state_dict(), saved)
    pair.step(numbers(3))
    pair.assert_alike()


def test_hyper_parameters_may_lie_on_the_device(device: Device) -> None:
    pair = Pair(device)
    lr, scale = device.put(np.array(0.3)), device.put(np.array(1.0))
    pair.far.param_groups[0] |= {"lr": lr, "rescale_grad": scale}
    for value in (0.3, 0.2, 0.1):
        lr[...], scale[...] = value, 10 * value
        pair.near.param_groups[0] |= {"lr": value, "rescale_grad": 10 * value}
        pair.step(numbers(3))
    for name, p in pair.here.items():
        assert_close(pair.there[name], p)


def test_arrays_that_a_graph_may_have_captured_stay(device: Device) -> None:
    pair = Pair(device, nonfinite="skip")
    pair.step(numbers(1))

    def kept() -> list[Any]:
        program, state = pair.far._stepper._programs[0], pair.far._state.device
        assert program is not None and state is not None
        tables = getattr(program._kernel, "_steps", None)  # of the CUDA kernel
        fields = {} if tables is None else tables[1]._fields
        own = [fields[name] for name in sorted(fields) if hasattr(fields[name], "shape")]
        assert len(own) > 10 or tables is None
        return [program, program._kernel, state, state.first, state.previous_lr, state.counts, state.hyper, *own]

    before, buffers = kept(), list(pair.far._state.buffers)
    pair.far.param_groups[0]["lr"] = 0.05
    pair.step(numbers(2))
    pair.far.state_dict()
    pair.far.synchronize()
    pair.step(numbers(3))
    assert all(a is b for a, b in zip(before, kept(), strict=True))
    assert all(a is b for a, b in zip(buffers, pair.far._state.buffers, strict=True))


def test_only_changed_hyper_parameters_are_written() -> None:
    class Watched:
        def __init__(self) -> None:
            self.writes: list[Any] = []

        def __setitem__(self, key: Any, value: Any) -> None:
            self.writes.append((key[0].start, key[1].start, value))

    options, fields = hyperparams.complete({"lr": 0.1}), hyperparams.GROUP_FIELDS
    state = DeviceState([True], [0.0], like=array_api_strict.zeros(1))
    state.write([options, options], captured=False)
    assert_same(state.hyper[0, :], np.array([float(x) for x in hyperparams.row_values(options)]))
    watched: Any = Watched()
    state.hyper = watched
    state.write([options, options | {"lr": 0.2, "nesterov": True}], captured=False)
    assert watched.writes == [(1, fields.index("lr"), 0.2), (1, fields.index("nesterov"), 1.0)]
    on_device = array_api_strict.asarray(0.5)
    for _ in range(2):
        state.write([options | {"lr": on_device}, options | {"lr": 0.2, "nesterov": True}], captured=False)
    assert watched.writes[2:] == 2 * [(0, fields.index("lr"), on_device)], "its value may be another one each time"


def test_a_number_that_is_changed_in_place_is_written_again() -> None:
    class Changing(float):
        value = 0.5

        def __float__(self) -> float:
            return self.value

    lr = Changing()
    state = DeviceState([True], [0.0], like=array_api_strict.zeros(1))
    state.write([hyperparams.complete({"lr": lr})], captured=False)
    for value in (0.5, 0.25, 0.125):
        lr.value = value
        state.write([hyperparams.complete({"lr": lr})], captured=False)
        assert float(state.hyper[0, hyperparams.GROUP_FIELDS.index("lr")]) == value


def test_numbers_that_replays_write_are_written_in_every_step() -> None:
    """The host does not know which of them was written last."""
    written = []

    class Watched:
        def __setitem__(self, key: Any, value: Any) -> None:
            written.append(value)

    options = hyperparams.complete({"lr": 0.1})
    state = DeviceState([True], [0.0], like=array_api_strict.zeros(1))
    state.write([options], captured=False)
    state.hyper = Watched()
    for lr, captured in ((0.1, True), (0.2, True), (0.2, False), (0.1, False), (0.1, False)):
        state.write([options | {"lr": lr}], captured=captured)
    assert written == [0.2, 0.2, 0.1, 0.1]


def test_vectors_have_the_values_of_groups_and_parameters() -> None:
    """By row: here two of the second parameter, which has the first group, and one of the first."""
    xp = array_api_strict
    groups = [hyperparams.complete({"lr": lr, "nesterov": lr < 1, "momentum": 0.9}) for lr in (0.1, 2.0)]
    state = DeviceState([True, False], [0.0, 0.5], like=xp.zeros(1))
    state.write(groups, captured=False)
    index = xp.asarray([0, 0, 1]), xp.asarray([1, 1, 0])
    hyper = vectors(state.hyper, state.first, state.previous_lr, *index, sys.float_info.max, xp=xp)
    assert isinstance(hyper, Hyper)
    assert_same(hyper.lr, np.array([0.1, 0.1, 2.0]))
    assert_same(hyper.nesterov, np.array([True, True, False]))
    assert_same(hyper.first, np.array([False, False, True]))
    assert_same(hyper.previous_lr, np.array([0.5, 0.5, 0.0]))


def test_synchronize_is_nothing_in_numpy() -> None:
    optimizer = LARS([np.ones(2)], lr=0.1)
    optimizer.step([np.ones(2)])
    optimizer.synchronize()
    assert optimizer.steps == 1


def test_the_portable_kernel_writes_nothing_where_a_step_is_not_taken() -> None:
    p, v, g = np.ones(5), np.ones(5), np.full(5, np.nan)
    half, master = np.ones(5, np.float16), np.full(5, 2.0, np.float32)
    arrays = KernelArrays([p, half], [g, g], [v, None], [None, master])
    kernel = kernels.choose([p], "portable")(arrays, np)
    before = fingerprint([p, v, half, master])
    kernel.apply(Gradients(None, lambda: [g, g]), np.ones((2, 6)), np.asarray(False))
    assert fingerprint([p, v, half, master]) == before
    kernel.apply(Gradients(None, lambda: [np.ones(5)] * 2), np.ones((2, 6)), np.asarray(True))
    assert all(a != b for a, b in zip(fingerprint([p, v, half, master])[1:], before[1:], strict=True))


def test_a_loss_scaler_skips_in_numpy_too() -> None:
    p = np.ones(2)
    optimizer = LARS([p], lr=0.1, nonfinite="propagate")
    optimizer.step([np.full(2, np.nan)], found_inf=True)
    assert_same([p, optimizer.steps, optimizer.skipped_steps], [np.ones(2), 0, 1])


def half(device: Device, value: float, size: int) -> Any:
    try:
        return device.put(np.full(size, value, np.float16))
    except TypeError as error:
        pytest.skip(f"this library has no half precision: {error}")


def test_a_refused_step_forgets_no_master(device: Device) -> None:
    one, nan = half(device, 1.0, 3), half(device, np.nan, 3)
    optimizer = LARS({"w": half(device, 1.0, 3)}, lr=1e-5, master_weights=True)
    for _ in range(3):
        optimizer.step([one])
    before = to_numpy(optimizer.state_dict()["state"]["w"]["master"])
    optimizer.param_groups[0]["master_weights"] = False
    optimizer.step([nan])
    with pytest.raises(NonFiniteError):
        optimizer.synchronize()
    np.testing.assert_array_equal(to_numpy(optimizer.state_dict()["state"]["w"]["master"]), before)
    optimizer.step([one])
    assert "master" not in optimizer.state_dict()["state"]["w"]


def test_a_refused_step_makes_no_master(device: Device) -> None:
    p = half(device, 1.0, 2)
    optimizer = LARS({"w": p}, lr=0.125, master_weights=True)
    optimizer.step([half(device, np.nan, 2)])
    with pytest.raises(NonFiniteError):
        optimizer.synchronize()
    assert "master" not in optimizer.state_dict()["state"]["w"]
    p[...] = 100.0
    optimizer.step([half(device, 1.0, 2)])
    optimizer.synchronize()
    assert to_numpy(p).tolist() == [99.875, 99.875]
