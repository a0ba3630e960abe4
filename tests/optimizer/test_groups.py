"""`LARS` with groups: overrides, changes between the steps, learning rates of all kinds, groups added later."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
from assertions import assert_close, assert_refused, assert_same, flash_run, flash_step

from lars_array import LARS, warmup_cosine

W, B = np.array([[3.0, 4.0]]), np.array([0.6, 0.8])
GW, GB = np.array([[0.3, 0.4]]), np.array([0.05, -0.12])
HYPER: dict[str, Any] = {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.1}

OVERRIDES: list[dict[str, Any]] = [
    {"lr": 0.25},
    {"lr": warmup_cosine(1.0, 10, 3)},
    {"momentum": 0.5},
    {"momentum": 0},
    {"dampening": 0.5},
    {"weight_decay": 0.2},
    {"weight_decay": 0},
    {"nesterov": True},
    {"trust_coefficient": 0.01},
    {"eps": 1.0},
    {"rule": "optax"},
    {"trust_clip": True, "lr": 0.001},
    {"trust_bounds": (0.5, 1.0)},
    {"always_adapt": True, "weight_decay": 0.0},
    {"adapt": False},
    {"maximize": True},
    {"rescale_grad": 0.125},
]


@pytest.mark.parametrize("override", OVERRIDES, ids=str)
def test_a_group_may_override_it_and_then_it_counts_for_this_group_alone(override: dict[str, Any]) -> None:
    together, apart = [W.copy(), B.copy()], [W.copy(), B.copy()]
    one = LARS([{"params": [together[0]]}, {"params": [together[1]], **override}], **HYPER)
    two = LARS([apart[0]], **HYPER), LARS([apart[1]], **HYPER | override)
    plain = B.copy()
    same_for_all = LARS([plain], **HYPER)
    for _ in range(3):
        one.step([GW, GB])
        two[0].step([GW])
        two[1].step([GB])
        same_for_all.step([GB])
    assert_same(together, apart)
    assert not np.array_equal(together[1], plain)
    assert {key: one.param_groups[1][key] for key in override} == override
    assert {key: one.param_groups[0][key] for key in HYPER} == HYPER


def test_the_gradients_of_all_groups_make_the_norm_that_is_clipped() -> None:
    w, b = W.copy(), B.copy()
    groups = [{"params": {"w": w}}, {"params": {"b": b}, "max_grad_norm": 0.1}]
    LARS(groups, **HYPER).step([GW, GB])
    norm = np.sqrt(np.sum(GW**2) + np.sum(GB**2))
    assert_close(w, flash_step(W, GW, **HYPER)[0])
    assert_close(b, flash_step(B, GB * (0.1 / norm), **HYPER)[0])


def test_a_group_may_override_what_is_done_about_nonfinite_gradients() -> None:
    w, b = W.copy(), B.copy()
    groups = [{"params": [w], "nonfinite": "propagate"}, {"params": [b], "nonfinite": "skip"}]
    optimizer = LARS(groups, **HYPER)
    optimizer.step([GW, GB * np.inf])
    assert_same([w, b], [W, B])
    assert (optimizer.steps, optimizer.skipped_steps) == (0, 1)
    assert optimizer.state_dict()["state"] == {"0": {"previous_lr": 0.0}, "1": {"previous_lr": 0.0}}
    optimizer.step([GW * np.nan, GB])
    assert (optimizer.steps, optimizer.skipped_steps) == (1, 1)
    assert np.all(np.isnan(w))
    assert_close(b, flash_step(B, GB, **HYPER)[0])


def test_with_propagate_everywhere_nothing_is_asked() -> None:
    w = W.copy()
    optimizer = LARS([w], **HYPER, nonfinite="propagate")
    optimizer.step([GW * np.nan])
    assert np.all(np.isnan(w))
    assert (optimizer.steps, optimizer.skipped_steps) == (1, 0)


@pytest.mark.parametrize("kernel", ["blocked", "portable"])
def test_an_infinite_gradient_goes_through_too_and_is_not_lost(kernel: str) -> None:
    w = W.copy()  # flash: the ratio is 0, and 0 times infinity is nan
    LARS([w], **HYPER, nonfinite="propagate", kernel=kernel).step([np.array([[np.inf, 0.4]])])
    assert_same(np.isfinite(w), np.array([[False, True]]))


def test_hyper_parameters_may_be_changed_between_steps() -> None:
    changes: dict[str, list[Any]] = {
        "lr": [0.5, 0.25, 0.0, 1.0],
        "momentum": [0.9, 0.5, 0.8, 0.9],
        "dampening": [0.0, 0.25, 0.5, 0.0],
        "weight_decay": [0.1, 0.2, 0.0, 0.1],
        "nesterov": [True, False, False, True],
        "trust_coefficient": [0.001, 0.002, 0.003, 0.01],
        "eps": [1e-8, 1e-3, 1.0, 0.0],
    }
    p = W.copy()
    optimizer = LARS([p], lr=1.0)
    for t in range(4):
        optimizer.param_groups[0].update({key: values[t] for key, values in changes.items()})
        optimizer.step([GW * (t + 1)])
    assert_close(p, flash_run(W, [GW * (t + 1) for t in range(4)], **changes))


def test_momentum_that_is_switched_off_and_on_finds_its_buffer_again() -> None:
    p = W.copy()
    optimizer = LARS([p], **HYPER)
    momenta = [0.9, 0, 0.9]
    for momentum in momenta:
        optimizer.param_groups[0]["momentum"] = momentum
        before = optimizer.state_dict()["state"]["0"].get("momentum_buffer")
        optimizer.step([GW])
        if momentum == 0:
            assert_same(optimizer.state_dict()["state"]["0"]["momentum_buffer"], before)
    assert_close(p, flash_run(W, [GW] * 3, **HYPER | {"momentum": momenta}))


def test_there_is_no_buffer_without_momentum() -> None:
    optimizer = LARS([W.copy()], lr=0.5, weight_decay=0.1)
    optimizer.step([GW])
    assert optimizer.state_dict()["state"] == {"0": {"previous_lr": 0.5}}


def test_the_learning_rate_may_be_a_function_of_the_step() -> None:
    seen = []

    def lr(step: int) -> float:
        seen.append(step)
        return 1.0 / (1 + step)

    p = W.copy()
    optimizer = LARS([p], lr=lr, weight_decay=0.1)
    assert set(seen) == {0}
    for _ in range(3):
        seen.clear()
        optimizer.step([GW])
        assert seen == [optimizer.steps - 1]
    assert_close(p, flash_run(W, [GW] * 3, lr=[1.0, 1 / 2, 1 / 3], weight_decay=0.1))
    assert optimizer.param_groups[0]["lr"] is lr
    assert optimizer.state_dict()["state"]["0"]["previous_lr"] == 1 / 3


def test_last_lr_has_the_rates_of_the_last_step() -> None:
    schedule = warmup_cosine(1.0, 10, 4)
    groups = [{"params": [W.copy()], "lr": schedule}, {"params": [B.copy()], "lr": np.float32(0.25)}]
    optimizer = LARS(groups, lr=0.5, nonfinite="skip")
    assert optimizer.last_lr == [schedule(0), 0.25]
    for step, bad in ((0, False), (1, False), (1, True), (2, False)):
        optimizer.step([GW * np.inf if bad else GW, GB])
        assert optimizer.last_lr == [schedule(step), 0.25]
    assert {type(lr) for lr in optimizer.last_lr} == {float}
    optimizer.param_groups[1]["lr"] = 0.125
    assert optimizer.last_lr == [schedule(2), 0.125]
    optimizer.load_state_dict(optimizer.state_dict() | {"steps": 8})
    assert optimizer.last_lr == [schedule(7), 0.125]


def test_a_skipped_step_does_not_move_the_schedule() -> None:
    p = W.copy()
    optimizer = LARS([p], lr=lambda step: 1.0 + step, weight_decay=0.1, nonfinite="skip")
    for g in (GW, GW * np.inf, GW):
        optimizer.step([g])
    assert_close(p, flash_run(W, [GW] * 2, lr=[1.0, 2.0], weight_decay=0.1))
    assert (optimizer.steps, optimizer.skipped_steps) == (2, 1)


def test_two_steps_are_counted_as_two_and_so_are_two_skipped_ones() -> None:
    optimizer = LARS([W.copy()], lr=0.1, nonfinite="skip")
    for g in (GW, GW, GW * np.nan, GW * np.nan):
        optimizer.step([g])
    assert (optimizer.steps, optimizer.skipped_steps) == (2, 2)


def test_numbers_may_be_arrays_of_no_dimension() -> None:
    p, lr = W.copy(), np.array(0.5)
    options = {"momentum": np.float64(0.9), "weight_decay": np.array(0.1), "nesterov": np.True_}
    optimizer = LARS([p], lr=lr, **options)
    optimizer.step([GW])
    lr[...] = 0.25
    optimizer.step([GW])
    hyper: dict[str, Any] = {"lr": [0.5, 0.25], "momentum": 0.9, "weight_decay": 0.1, "nesterov": True}
    assert_close(p, flash_run(W, [GW] * 2, **hyper))
    assert "lr=array(0.25)" in repr(optimizer)


def test_a_schedule_may_return_an_array_but_not_one_that_is_no_learning_rate() -> None:
    p = W.copy()
    optimizer = LARS([p], lr=lambda step: np.array(0.5), weight_decay=0.1)
    optimizer.step([GW])
    assert_close(p, flash_step(W, GW, lr=0.5, weight_decay=0.1)[0])
    assert type(optimizer.state_dict()["state"]["0"]["previous_lr"]) is float
    refused = "Invalid learning rate: -1.0"
    assert_refused(lambda: LARS([p], lr=lambda step: np.array(-1.0)), ValueError, refused)


def test_a_group_added_later_starts_afresh() -> None:
    w, b = W.copy(), B.copy()
    optimizer = LARS([w], **HYPER | {"dampening": 0.5})
    optimizer.step([GW])
    assert optimizer.add_param_group({"params": [b], "lr": 1.0}) is None
    assert optimizer.param_groups[1]["names"] == ["1"]
    assert {key: optimizer.param_groups[1][key] for key in ("lr", "momentum")} == {"lr": 1.0, "momentum": 0.9}
    assert optimizer.state_dict()["state"]["1"] == {"previous_lr": 0.0}
    for _ in range(2):
        optimizer.step([GW, GB])
    assert_close(w, flash_run(W, [GW] * 3, **HYPER, dampening=0.5))
    assert_close(b, flash_run(B, [GB] * 2, **HYPER | {"lr": 1.0, "dampening": 0.5}))


def test_defaults_reach_groups_added_later_and_changes_of_other_groups_do_not() -> None:
    optimizer = LARS({"w": W.copy()}, **HYPER, trust_coefficient=0.25)
    optimizer.param_groups[0]["trust_coefficient"] = 0.5
    optimizer.add_param_group({"params": {"b": B.copy(), "c": B.copy()}})
    assert optimizer.param_groups[1]["trust_coefficient"] == 0.25
    assert optimizer.param_groups[1]["names"] == ["b", "c"]
    optimizer.add_param_group({"params": [("d", B.copy())]})
    optimizer.step({"w": GW, "b": None, "c": GB, "d": GB})
    assert list(optimizer.norms()) == ["w", "c", "d"]


def test_a_group_that_does_not_fit_is_not_added() -> None:
    w, b = W.copy(), B.copy()
    optimizer = LARS({"w": w}, **HYPER)
    optimizer.step([GW])
    no_lr = LARS([{"params": {"w": w}, "lr": 0.5}])
    unspecified = "parameter group 1 didn't specify a value of required optimization parameter lr"
    twice = "every parameter must be given once; parameter 'v' and parameter 'w' are the same array"
    grouped = "group must be a mapping with the key 'params'; got "
    for which, group, kind, message in [
        (optimizer, [b], TypeError, grouped + repr([b])),
        (optimizer, {}, ValueError, "a parameter group must have the key 'params'; got the keys []"),
        (optimizer, {"b": b}, ValueError, "a parameter group must have the key 'params'; got the keys ['b']"),
        (optimizer, {"params": []}, ValueError, "optimizer got an empty parameter list"),
        (optimizer, {"params": {"w": b}}, ValueError, "names of parameters must differ; got 'w' twice"),
        (optimizer, {"params": {"v": w}}, ValueError, twice),
        (optimizer, {"params": [b], "lr": -1.0}, ValueError, "Invalid learning rate: -1.0 (parameter group 1)"),
        (
            optimizer,
            {"params": [b], "lr": lambda step: -step},
            ValueError,
            "Invalid learning rate: -1 (parameter group 1)",
        ),
        (no_lr, {"params": [b]}, ValueError, unspecified),
        (copy.deepcopy(no_lr), {"params": [b]}, ValueError, unspecified),
    ]:
        assert_refused(lambda which=which, group=group: which.add_param_group(group), kind, message, which, w, b)
    optimizer.add_param_group({"params": {"b": b}})
    optimizer.step([GW, GB])
    assert_close(b, flash_step(B, GB, **HYPER)[0])


def test_groups_are_not_modified_and_a_schedule_that_fails_changes_nothing() -> None:
    w = W.copy()
    given = [{"params": [w], "lr": {0: 0.5}.__getitem__}]
    optimizer = LARS(given, momentum=0.9)
    optimizer.step([GW])
    assert list(given[0]) == ["params", "lr"]
    assert_refused(lambda: optimizer.step([GW]), KeyError, "1", optimizer, w)


def test_groups_are_not_added_or_removed_by_hand() -> None:
    p, q = np.ones(2), np.ones(3)
    optimizer = LARS([{"params": [p]}, {"params": [q]}], lr=0.1)
    group = optimizer.param_groups.pop()
    message = r"^parameter groups must be added by add_param_group, and not be removed; got 1 groups, not 2$"
    with pytest.raises(ValueError, match=message):
        optimizer.step([np.ones(2), np.ones(3)])
    optimizer.param_groups += [group, dict(group)]
    with pytest.raises(ValueError, match="got 3 groups, not 2"):
        optimizer.step([np.ones(2), np.ones(3)])
    assert p.tolist() == [1.0] * 2 and q.tolist() == [1.0] * 3
