"""Norms, trust ratios, `repr`, and that none of it costs a pass over memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from assertions import assert_close, to_numpy

from lars_array import LARS, Norms
from lars_array._stepper import arrays as step_arrays
from lars_array.kernels import blocked

# Norms: w 5, b 1; their gradients 0.5 and 0.25.
W, B = np.array([[3.0, 4.0]]), np.array([0.6, 0.8])
GW, GB = np.array([[0.3, 0.4]]), np.array([0.15, 0.2])
RAW_W, RAW_B = 0.001 * 5 / (0.5 + 0.1 * 5), 0.001 * 1 / (0.25 + 0.1 * 1)


def ratios_after(steps: int = 1, **options: Any) -> dict[str, float]:
    """The parameters are put back before each step, so that ratios are those of the numbers above."""
    params = {"w": W.copy(), "b": B.copy()}
    optimizer = LARS(params, **{"lr": 0.5, "weight_decay": 0.1, "eps": 0.0} | options)
    for _ in range(steps):
        params["w"][...], params["b"][...] = W, B
        optimizer.step({"w": GW, "b": GB})
    return optimizer.trust_ratios()


def assert_ratios(ours: dict[str, float], w: float, b: float) -> None:
    assert list(ours) == ["w", "b"]
    assert all(type(ratio) is float for ratio in ours.values())
    assert_close(np.array(list(ours.values())), np.array([w, b]), 1e-12)


def test_nothing_is_known_before_the_first_step() -> None:
    optimizer = LARS([W.copy()], lr=0.1)
    assert optimizer.norms() == {}
    assert optimizer.trust_ratios() == {}


def test_norms_are_those_before_the_step(xp: Any) -> None:
    if "jax" in xp.__name__:
        pytest.skip("JAX arrays can't be written to")
    params = {"w": xp.asarray([[3.0, 4.0]], dtype=xp.float64), "b": xp.asarray([0.6, 0.8], dtype=xp.float64)}
    optimizer = LARS(params, lr=0.5, weight_decay=0.1, eps=0.0)
    optimizer.step([xp.asarray([[0.3, 0.4]], dtype=xp.float64), xp.asarray([0.15, 0.2], dtype=xp.float64)])
    norms = optimizer.norms()
    assert all(type(norm) is Norms and type(norm.parameter) is float for norm in norms.values())
    assert_close(np.array([norms["w"], norms["b"]]), np.array([[5.0, 0.5], [1.0, 0.25]]), 1e-15)
    assert_ratios(optimizer.trust_ratios(), RAW_W, RAW_B)
    after = float(np.linalg.norm(to_numpy(params["w"])))
    optimizer.step([xp.asarray([[0.0, 0.4]], dtype=xp.float64), None])
    assert list(optimizer.norms()) == ["w"]
    assert optimizer.norms()["w"] == pytest.approx((after, 0.4), rel=1e-15)


def test_norms_are_of_the_gradient_as_given() -> None:
    optimizer = LARS([W.copy()], lr=0.5, maximize=True, rescale_grad=4.0, max_grad_norm=0.1)
    optimizer.step([GW])
    assert optimizer.norms() == {"0": pytest.approx((5.0, 0.5), rel=1e-15)}


def test_norms_are_not_of_what_a_rule_divides_by() -> None:
    for rule in ("barlow", "simclr-popular"):
        optimizer = LARS([W.copy()], lr=0.5, momentum=0.9, weight_decay=0.1, rule=rule)
        optimizer.step([GW])
        assert optimizer.norms() == {"0": pytest.approx((5.0, 0.5), rel=1e-15)}


def test_norms_of_a_refused_or_skipped_step_are_not_reported() -> None:
    optimizer = LARS([W.copy()], lr=0.5, nonfinite="skip")
    optimizer.step([GW * np.inf])
    assert optimizer.norms() == {} == optimizer.trust_ratios()
    optimizer.step([GW])
    optimizer.step([GW * np.inf])
    assert optimizer.norms() == {"0": pytest.approx((5.0, 0.5), rel=1e-15)}


def test_trust_ratios_by_hand() -> None:
    assert_ratios(ratios_after(), RAW_W, RAW_B)
    assert_ratios(ratios_after(eps=1.0), 0.005 / 2, 0.001 / 1.35)
    assert_ratios(ratios_after(trust_coefficient=0.1), 100 * RAW_W, 100 * RAW_B)
    assert_ratios(ratios_after(lr=0.0), RAW_W, RAW_B)
    assert_ratios(ratios_after(maximize=True), RAW_W, RAW_B)
    assert_ratios(ratios_after(rescale_grad=2.0), 0.005 / 1.5, 0.001 / 0.6)
    assert_ratios(ratios_after(max_grad_norm=np.hypot(0.5, 0.25) / 2), 0.005 / 0.75, 0.001 / 0.225)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize(
    "momentum",
    [
        {"momentum": 0.9},
        {"momentum": 0.9, "nesterov": True},
        {"momentum": 0.9, "dampening": 1.0},
        {"momentum": 0.9, "dampening": 0.5},
        {"momentum": 0.9, "lr": 0.0},
        {"momentum": 0.9, "lr": 0.0, "nesterov": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("rule", ["flash", "timm", "apex", "kozistr", "paper", "nvidia", "nus", "tf-contrib", "paddle"])
def test_momentum_has_no_part_in_the_ratio(rule: str, momentum: dict[str, Any], steps: int) -> None:
    assert_ratios(ratios_after(steps, rule=rule, **momentum), RAW_W, RAW_B)


def test_a_layer_that_is_not_adapted_has_the_ratio_1() -> None:
    assert_ratios(ratios_after(adapt=False), 1, 1)
    assert_ratios(ratios_after(adapt=False, nesterov=True, momentum=0.9, lr=0.0, rule="paper"), 1, 1)
    assert_ratios(ratios_after(weight_decay=0.0), 1, 1)
    assert_ratios(ratios_after(weight_decay=0.0, always_adapt=True), 0.001 * 5 / 0.5, 0.001 / 0.25)


def test_the_ratio_of_larc_is_relative_to_the_learning_rate() -> None:
    assert_ratios(ratios_after(trust_clip=True), RAW_W / 0.5, RAW_B / 0.5)
    assert_ratios(ratios_after(trust_clip=True, lr=0.004), 1, RAW_B / 0.004)
    assert_ratios(ratios_after(trust_clip=True, lr=0.001), 1, 1)


def test_the_ratio_of_larc_at_the_start_of_a_warm_up_is_that_of_the_step_taken() -> None:
    assert_ratios(ratios_after(trust_clip=True, lr=1e-300), 1, 1)
    assert_ratios(ratios_after(trust_clip=True, lr=0.0), 1, 1)


def test_the_ratio_is_the_one_after_its_bounds() -> None:
    assert_ratios(ratios_after(trust_bounds=(0.004, 1.0)), RAW_W, 0.004)
    assert_ratios(ratios_after(trust_bounds=[0.0, 0.004]), 0.004, RAW_B)
    assert_ratios(ratios_after(trust_bounds=(2.0, 3.0), trust_clip=True), 1, 1)


def test_the_popular_rule_divides_by_the_norm_of_the_update() -> None:
    d = 0.5 + 0.1 * 5  # gradients are parallel to parameters here
    assert_ratios(ratios_after(rule="simclr-popular"), 0.005 / d, 0.001 / 0.35)
    assert_ratios(ratios_after(2, rule="simclr-popular", momentum=0.9), 0.005 / (1.9 * d), 0.001 / (1.9 * 0.35))
    # v' = 1.9 d after two steps, and the update is d + 0.9 v'.
    both = {"momentum": 0.9, "nesterov": True}
    assert_ratios(ratios_after(2, rule="simclr-popular", **both), 0.005 / (2.71 * d), 0.001 / (2.71 * 0.35))


@pytest.mark.parametrize(
    ("options", "passes"),
    [
        ({}, 1),
        ({"momentum": 0.9, "nesterov": True}, 1),
        ({"max_grad_norm": 0.1}, 1),
        ({"rule": "barlow"}, 1),
        ({"rule": "simclr-popular", "momentum": 0.9}, 1),
        ({"nonfinite": "propagate"}, 1),
        ({"nonfinite": "skip"}, 1),
        # By how much gradients are clipped is known only after the first look.
        ({"rule": "barlow", "max_grad_norm": 0.1}, 2),
    ],
    ids=str,
)
def test_a_step_takes_one_look_at_memory_and_one_write(
    options: dict[str, Any], passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def counted(name: str, original: Any) -> Any:
        return lambda *arguments, **options: (calls.append(name), original(*arguments, **options))[1]

    for name in ("sums", "writer"):
        monkeypatch.setattr(blocked.Kernel, name, counted(name, getattr(blocked.Kernel, name)))
    optimizer = LARS([W.copy(), B.copy()], lr=0.5, weight_decay=0.1, kernel="blocked", **options)
    assert calls == []
    optimizer.step([GW, GB])
    assert calls == ["sums"] * passes + ["writer"]
    optimizer.norms()
    optimizer.trust_ratios()
    optimizer.state_dict()
    repr(optimizer)
    assert len(calls) == passes + 1


def test_memory_ranges_are_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Any] = []
    original = step_arrays.MemoryRanges

    def counted(names: Any, *arrays: Any) -> Any:
        found.append(sum(x is not None for of_kind in arrays for x in of_kind))
        return original(names, *arrays)

    monkeypatch.setattr(step_arrays, "MemoryRanges", counted)
    optimizer = LARS([W.copy(), B.copy()], lr=0.5, momentum=0.9)
    for _ in range(4):
        optimizer.step([GW, GB])
    assert found == [4]  # with the momentum buffers that the first step makes


def test_repr_shows_what_differs_from_the_defaults() -> None:
    optimizer = LARS([{"params": [W.copy(), B.copy()], "rule": "timm"}, {"params": [B.copy()]}], lr=0.5, momentum=0.9)
    lines = ["LARS(", "  group 0: 2 parameters, lr=0.5, momentum=0.9, rule='timm'"]
    lines += ["  group 1: 1 parameters, lr=0.5, momentum=0.9 (SGD: its layers are not adapted)", ")"]
    assert repr(optimizer) == "\n".join(lines)
    optimizer.param_groups[1].update(eps=0.0, trust_bounds=(0.0, 1.0), momentum=0)
    lines[2] = "  group 1: 1 parameters, lr=0.5, eps=0.0, trust_bounds=(0.0, 1.0) (SGD: its layers are not adapted)"
    assert repr(optimizer) == "\n".join(lines)
    optimizer.param_groups[1].update(weight_decay=0.1)
    lines[2] = "  group 1: 1 parameters, lr=0.5, weight_decay=0.1, eps=0.0, trust_bounds=(0.0, 1.0)"
    assert repr(optimizer) == "\n".join(lines)
