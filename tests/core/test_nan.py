"""What a NaN or an infinity does to its layer and to others, with nonfinite="propagate"."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from ways import NAMES, WAYS

from lars_array import init, lars_step, update

BASE: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no eps": {"eps": 0.0},
    "no momentum": {"momentum": 0.0},
    "trust_clip": {"trust_clip": True},
    "trust_bounds": {"trust_bounds": (0.01, 0.1)},
    "nesterov": {"nesterov": True},
}


@pytest.mark.parametrize("rule", NAMES)
@pytest.mark.parametrize("way", [way for way in WAYS if way != "jax"])
def test_one_nan_makes_its_layer_nan(way: str, rule: str) -> None:
    """As the arithmetic of flash and optax does. Other originals, such as barlow's, take a NaN norm for zero."""
    good = np.linspace(1, 2, 6, dtype="f4")
    bad = good.copy()
    bad[2] = np.nan
    for options in [OPTIONS["plain"]] if way == "jax, jitted" else OPTIONS.values():
        with np.errstate(all="ignore"):
            assert np.isnan(WAYS[way](good, [bad], **BASE | options, rule=rule)[0]).all(), f"gradient, {options}"
            assert np.isnan(WAYS[way](bad, [good], **BASE | options, rule=rule)[0]).all(), f"parameter, {options}"


@pytest.mark.parametrize("way", [way for way in WAYS if way != "jax"])
def test_a_layer_that_is_not_adapted_has_a_nan_only_where_its_gradient_has_one(way: str) -> None:
    good = np.linspace(1, 2, 6, dtype="f4")
    bad = good.copy()
    bad[2] = np.nan
    p = WAYS[way](good, [bad], lr=0.1, momentum=0.9)[0]  # flash without weight decay is SGD
    assert np.isnan(p[2]) and np.isfinite(np.delete(p, 2)).all()


@pytest.mark.parametrize("rule", NAMES)
@pytest.mark.parametrize("way", [way for way in WAYS if way not in ("jax", "jax, jitted")])
def test_an_infinite_gradient_gives_a_ratio_of_zero(way: str, rule: str) -> None:
    """As in all originals: the entry becomes NaN, the others take no step; but an update's norm has all of v in it."""
    good = np.linspace(1, 2, 6, dtype="f4")
    bad = good.copy()
    bad[2] = np.inf
    with np.errstate(all="ignore"):
        p = WAYS[way](good, [bad], **BASE, rule=rule)[0]
    assert not np.isfinite(p[2])
    np.testing.assert_array_equal(np.delete(p, 2), np.delete(good, 2))


@pytest.mark.parametrize("rule", ["flash", "optax", "simclr-popular"])
@pytest.mark.parametrize("way", [way for way in WAYS if way != "jax"])
def test_clipping_by_a_norm_that_is_nan_or_infinite(way: str, rule: str) -> None:
    """As torch's clip_grad_norm_ and optax.clip_by_global_norm: NaN for all; 0 times a finite gradient is 0."""
    p = np.linspace(1, 2, 6)
    bad, huge = p.copy(), np.full(6, 1e200)
    bad[2] = np.nan
    given = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.0, "rule": rule, "max_grad_norm": 1.0}
    with np.errstate(all="ignore"):
        assert np.isnan(WAYS[way](p, [bad], **given)[0]).all()
        np.testing.assert_array_equal(WAYS[way](p, [huge], **given)[0], p)


@pytest.mark.parametrize("rule", NAMES)
def test_a_float64_gradient_beyond_float32_is_skipped_under_x64(rule: str) -> None:
    """What is finite is decided in the type that is computed in, by every function that takes JAX arrays."""
    jax, lars_jax = pytest.importorskip("jax"), pytest.importorskip("lars_jax")
    given: dict[str, Any] = {**BASE, "rule": rule, "nonfinite": "skip"}
    with jax.enable_x64(True):
        for kind, beyond in (("float32", 1e39), ("float32", 1e160), ("bfloat16", -1e39)):
            params = {"w": jax.numpy.ones(3, kind), "b": jax.numpy.ones((), kind)}
            grads = {"w": jax.numpy.array([1.0, beyond, 1.0]), "b": jax.numpy.array(1.0)}
            solver = lars_jax.lars(given["lr"], **{name: x for name, x in given.items() if name != "lr"})
            for step in (solver.update, jax.jit(solver.update)):
                updates, state = step(grads, solver.init(params), params)
                assert int(state.count) == 0 and not any(bool(x.any()) for x in jax.tree.leaves((updates, state.trace)))
            new, after = update(params, grads, init(params), **given)
            assert int(after.step) == 0 and bool((new["w"] == 1).all() and (new["b"] == 1).all())
            assert bool((lars_step(params["w"], grads["w"], **given)[0] == 1).all())
            optimizer = lars_jax.LARS(params, **given)
            optimizer.step(grads)
            assert (optimizer.steps, optimizer.skipped_steps) == (0, 1)
