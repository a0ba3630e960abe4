"""The registry, rules of one's own, and what holds for every rule. The originals' trajectories are in `golden`."""

from __future__ import annotations

from typing import Any

import array_api_strict
import numpy as np
import pytest
from assertions import assert_close, assert_refused, assert_same, to_numpy

from lars_array import LARS, RULES, Rule, init, lars_step, preset, register, update
from lars_array.core import resolve

ALL = sorted(RULES)
W, G = np.array([3.0, 4.0]), np.array([0.5, -0.25])
GRADS = [np.array([0.5, -0.25]), np.array([-0.125, 1.0]), np.array([0.75, 0.5])]
WD = 0.1


def direction(rule: str, p: Any, g: Any) -> Any:
    """The decayed gradient; TensorFlow's contrib leaves the decay to the loss."""
    return g if rule == "tf-contrib" else g + WD * p


def ratio_of(rule: str, **options: Any) -> Any:
    """The trust ratio, as far as one step without momentum shows it."""
    p = W.copy()
    given: dict[str, Any] = {"lr": 0.5, "weight_decay": WD, "eps": 0.0} | options
    LARS([p], rule=rule, **given).step([G])
    return np.linalg.norm(W - p) / np.linalg.norm(direction(rule, W, G)) / given["lr"]


def test_the_names_are_known() -> None:
    assert ALL == (
        "apex barlow bolts colossalai flash kozistr lightly mlperf mmselfsup moco-v3 mxnet nus nvidia open-lars optax "
        "paddle paper simclr simclr-popular solo tf-contrib tf-models tf-models-popular tf-tpu timm tinygrad "
        "tinygrad-popular torch-optimizer vicreg"
    ).split(" ")


@pytest.mark.parametrize("rule", ALL)
def test_the_ratio_by_hand(rule: str) -> None:
    denominator = np.linalg.norm(G) + WD * np.linalg.norm(W)
    if RULES[rule].norm_of != "gradient":
        denominator = np.linalg.norm(G + WD * W)
    assert ratio_of(rule) == pytest.approx(0.001 * 5 / denominator, rel=1e-9)
    assert ratio_of(rule, eps=0.5) == pytest.approx(0.001 * 5 / (denominator + 0.5), rel=1e-9)
    assert RULES[rule].norm_of in ("gradient", "decayed gradient", "update")


@pytest.mark.parametrize("rule", ALL)
def test_the_clip_of_larc(rule: str) -> None:
    ratio = ratio_of(rule, trust_coefficient=0.1)
    assert 0.1 < ratio < 10
    for lr in (0.1, ratio * 0.999, ratio * 1.001, 10.0):
        clipped = ratio_of(rule, trust_coefficient=0.1, trust_clip=True, lr=lr)
        assert clipped == pytest.approx(min(ratio / lr, 1), rel=1e-12)


@pytest.mark.parametrize("rule", ALL)
def test_the_bounds_of_the_ratio(rule: str) -> None:
    ratio = ratio_of(rule, trust_coefficient=0.1)
    for lowest, highest in ((0.0, np.inf), (0.0, ratio / 2), (ratio * 2, np.inf), (ratio * 3, ratio * 3)):
        bounded = ratio_of(rule, trust_coefficient=0.1, trust_bounds=(lowest, highest))
        assert bounded == pytest.approx(min(max(ratio, lowest), highest), rel=1e-12)
    # The bounds come before the clip.
    both = ratio_of(rule, trust_coefficient=0.1, trust_bounds=(ratio / 4, ratio / 4), trust_clip=True, lr=ratio)
    assert both == pytest.approx(0.25, rel=1e-12)


@pytest.mark.parametrize("rule", ALL)
def test_only_the_rule_of_nus_is_bounded_by_itself(rule: str) -> None:
    ratio = ratio_of(rule, trust_coefficient=100.0)
    own = (0.0, 50.0) if rule in ("nus", "colossalai") else None
    assert RULES[rule].trust_bounds == own
    assert bool(ratio == pytest.approx(50.0, rel=1e-12)) is (own is not None)
    assert ratio_of(rule, trust_coefficient=100.0, trust_bounds=(0.0, 1e9)) > 100


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("rule", ALL)
def test_without_adaptation_every_rule_is_sgd(rule: str, nesterov: bool) -> None:
    p, v, q = W, np.zeros(2), W.copy()
    optimizer = LARS([q], lr=0.5, momentum=0.9, weight_decay=WD, nesterov=nesterov, adapt=False, rule=rule)
    for g in [*GRADS, np.zeros(2)]:
        d = direction(rule, p, g)
        v = 0.9 * v + d
        p = p - 0.5 * (d + 0.9 * v if nesterov else v)
        optimizer.step([g])
        assert_close(q, p)
    assert optimizer.trust_ratios()["0"] == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize("rule", ALL)
def test_zeros_never_make_what_is_not_finite(rule: str) -> None:
    for p0, g in ((W * 0, G), (W, G * 0), (W * 0, G * 0), (W[:0], G[:0])):
        for weight_decay in (0.0, WD):
            p = p0.copy()
            optimizer = LARS([p], lr=0.5, momentum=0.9, weight_decay=weight_decay, eps=0.0, rule=rule)
            for _ in range(2):
                optimizer.step([g])
            assert np.all(np.isfinite(p))


def test_rules_that_differ_by_group_are_as_in_optimizers_of_their_own() -> None:
    rules = [*ALL, lambda S, hyper, xp: RULES["timm"].function(S, hyper, xp)]
    rng = np.random.default_rng(3)
    initial = [rng.normal(size=4) for _ in rules]
    together, apart = [p.copy() for p in initial], [p.copy() for p in initial]
    hyper: dict[str, Any] = {"lr": 0.5, "momentum": 0.9, "weight_decay": WD}
    one = LARS([{"params": [p], "rule": rule} for p, rule in zip(together, rules, strict=True)], **hyper)
    many = [LARS([p], rule=rule, **hyper) for p, rule in zip(apart, rules, strict=True)]
    for _ in range(3):
        grads = [rng.normal(size=4) for _ in rules]
        one.step(grads)
        for optimizer, g in zip(many, grads, strict=True):
            optimizer.step([g])
        assert_same(together, apart)


def half_sgd(S: Any, hyper: Any, xp: Any) -> Any:
    """p' = p - lr (g / ||d||), d being what the third sum is of."""
    zero = xp.zeros_like(hyper.lr)
    lam = hyper.lr / xp.sqrt(S[:, 2])
    return xp.stack([zero, zero, zero, zero, lam, zero], axis=1)


@pytest.mark.parametrize(
    ("rule", "norm"),
    [
        (half_sgd, np.linalg.norm(G + WD * W)),
        (Rule(half_sgd), np.linalg.norm(G)),
        (Rule(half_sgd, "decayed gradient"), np.linalg.norm(G + WD * W)),
        (Rule(half_sgd, norm_of="update"), np.linalg.norm(G + WD * W)),
    ],
    ids=["function", "gradient", "decayed gradient", "update"],
)
def test_a_rule_of_ones_own(rule: Any, norm: float, xp: Any) -> None:
    p, g = xp.asarray(W, copy=True), xp.asarray(G)
    expected = W - 0.5 * G / norm
    assert_close(lars_step(p, g, lr=0.5, weight_decay=WD, rule=rule)[0], expected)
    assert_close(update([p], [g], init([p]), lr=0.5, weight_decay=WD, rule=rule)[0][0], expected)
    if "jax" in xp.__name__:
        return
    optimizer = LARS([p], lr=0.5, weight_decay=WD, rule=rule)
    optimizer.step([g])
    assert_close(p, expected)
    assert "momentum_buffer" not in optimizer.state_dict()["state"]["0"]


def test_a_rule_may_be_any_callable() -> None:
    class Scaled:
        """Equal ones are not hashable, as dataclasses are not."""

        def __eq__(self, other: object) -> bool:
            return isinstance(other, Scaled)

        __hash__ = None  # type: ignore[assignment]

        def __call__(self, S: Any, hyper: Any, xp: Any) -> Any:
            return half_sgd(S, hyper, xp)

    p = W.copy()
    LARS([p], lr=0.5, weight_decay=WD, rule=Scaled()).step([G])
    assert_close(p, W - 0.5 * G / np.linalg.norm(G + WD * W))


def test_a_rule_may_ask_for_a_buffer_without_momentum() -> None:
    p = W.copy()
    optimizer = LARS([p], lr=0.5, rule=Rule(RULES["flash"].function, keeps_buffer=True))
    optimizer.step([G])
    assert_same(optimizer.state_dict()["state"]["0"]["momentum_buffer"], G)


def test_a_rule_that_returns_another_shape() -> None:
    p = W.copy()
    message = "a rule must return an array of shape (1, 6); got shape (6,)"
    optimizer = LARS([p], lr=0.5, rule=lambda S, hyper, xp: xp.zeros(6))
    assert_refused(lambda: optimizer.step([G]), ValueError, message, optimizer, p)


def test_a_rule_with_a_norm_that_is_not_known() -> None:
    # "decayed", say: the third sum would be of something else than its author believes.
    p = W.copy()
    with pytest.raises(ValueError, match="norm_of"):
        LARS([p], lr=0.5, rule=Rule(half_sgd, norm_of="decayed")).step([G])


def test_a_rule_that_uses_only_the_standard_runs_under_array_api_strict() -> None:
    for rule in ALL:
        p = array_api_strict.asarray(W, copy=True)
        g = array_api_strict.asarray(G)
        optimizer = LARS([p], lr=0.5, momentum=0.9, weight_decay=WD, rule=rule)
        optimizer.step([g])
        q = W.copy()
        LARS([q], lr=0.5, momentum=0.9, weight_decay=WD, rule=rule).step([G])
        assert_close(to_numpy(p), q, 1e-14)


def test_registration(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("mine", "mine-too", "quite-new"):
        monkeypatch.setitem(RULES, name, None)
        del RULES[name]
    assert register("mine", "mine-too", norm_of="decayed gradient", keeps_buffer=True)(half_sgd) is half_sgd
    assert RULES["mine"] == RULES["mine-too"] == Rule(half_sgd, "decayed gradient", True, False, None)
    p = W.copy()
    LARS([p], lr=0.5, weight_decay=WD, **preset("mine")).step([G])
    assert_close(p, W - 0.5 * G / np.linalg.norm(G + WD * W))
    assert_refused(lambda: register("mine")(half_sgd), ValueError, "rule names must be new; 'mine' is taken")
    assert_refused(lambda: register("flash")(half_sgd), ValueError, "rule names must be new; 'flash' is taken")
    with pytest.raises(ValueError, match="'timm' is taken"):
        register("quite-new", "timm")(half_sgd)
    assert "quite-new" not in RULES, "half of a refused registration was done"


def test_resolution() -> None:
    rule = Rule(half_sgd, keeps_buffer=True)
    assert resolve(rule) is rule
    assert resolve("timm") is RULES["timm"]
    assert resolve(half_sgd) == Rule(half_sgd, "decayed gradient", False, False, None)
    names = ", ".join(ALL)
    assert_refused(lambda: resolve("LARC"), ValueError, f"rule must be one of {names}, or a function; got 'LARC'")
    assert_refused(lambda: resolve(3), TypeError, "rule must be a name, a function or a Rule; got 3")
