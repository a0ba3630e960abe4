"""Clipping by the global norm, and what becomes of steps that are not finite."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from references import assert_same_bits, tolerance
from strategies import FEW, any_options, assert_results_close, layers_of, run, seeds

from lars_array import LARS, RULES, NonFiniteError, init, update


def clipped_by_hand(gradients: list[Any], limit: float, rescale: float = 1.0) -> list[Any]:
    """Return each step's gradients, rescaled, then scaled down to a norm of `limit` where theirs is larger."""
    done = []
    for grads in gradients:
        norm = rescale * np.sqrt(sum(np.sum(np.abs(g.astype("c16")) ** 2) for g in grads.values()))
        factor = rescale * min(1.0, limit / norm)
        done.append({name: np.asarray(g * factor).astype(g.dtype) for name, g in grads.items()})
    return done


@pytest.mark.parametrize("dtype", ["f8", "f4", "c16"])
@pytest.mark.parametrize("kernel", ["blocked", "portable"])
@pytest.mark.parametrize("rule", RULES)
def test_clipping_is_clipping_by_hand_for_every_rule(rule: str, kernel: str, dtype: str) -> None:
    params, gradients = layers_of(11, dtype)
    options: dict[str, Any] = {"rule": rule, "lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "trust_coefficient": 1.0}
    options |= {"kernel": kernel}
    for limit in (1.0, 1e6):
        want = run(params, clipped_by_hand(gradients, limit), **options)
        ours = run(params, gradients, **options, max_grad_norm=limit)
        assert_results_close(ours, want, tolerance(dtype, 64), f"{rule}, {limit},", 1e-3)
        assert_differ(ours, run(params, gradients, **options), limit < 10)


def assert_differ(ours: dict[str, Any], theirs: dict[str, Any], expected: bool) -> None:
    """Make sure that clipping did something at all, or nothing."""
    differ = any(not np.array_equal(ours[name], x) for name, x in theirs.items())
    assert differ == expected


@FEW
@given(seeds, any_options, st.floats(1e-3, 100), st.lists(st.sampled_from(sorted(RULES)), min_size=3, max_size=3))
def test_the_norm_is_of_all_groups_together(seed: int, options: Any, limit: float, rules: list[str]) -> None:
    params, gradients = layers_of(seed)
    groups = [
        (["kernel", "scalar"], {"rule": rules[0]}),
        (["bias"], {"rule": rules[1]}),
        (["fresh", "long"], {"rule": rules[2]}),
    ]
    by_hand = clipped_by_hand(gradients, limit, options["rescale_grad"])
    want, *before = (
        run(params, by_hand[:steps], groups=groups, **options | {"rescale_grad": 1.0}) for steps in (3, 2, 1)
    )
    # A ratio of 1 / lr takes a single number to 0 but for its last digit, on which the next ratio depends.
    assume(all(abs(then["scalar"]) > 1e-9 for then in before))
    ours = run(params, gradients, groups=groups, **options, max_grad_norm=limit)
    assert_results_close(ours, want, 1e-10, "", 1e-3)


def test_a_group_without_clipping_still_counts() -> None:
    params, gradients = layers_of(5)
    groups = [(["kernel", "scalar", "bias"], {"max_grad_norm": 1.0}), (["fresh", "long"], {})]
    ours = run(params, gradients, groups=groups, lr=0.1, momentum=0.9)
    clipped, free = (
        run(params, clipped_by_hand(gradients, 1.0), lr=0.1, momentum=0.9),
        run(params, gradients, lr=0.1, momentum=0.9),
    )
    want = {name: (clipped if name.removeprefix("v ") in groups[0][0] else free)[name] for name in ours}
    assert_results_close(ours, want, 1e-12)


BAD = [np.nan, np.inf, -np.inf]


def spoiled(bad: float, dtype: str) -> tuple[LARS, dict[str, Any], dict[str, Any]]:
    params, (first, second) = layers_of(2, dtype, steps=2)
    optimizer = LARS(params, lr=0.1, momentum=0.9, weight_decay=0.1, nonfinite="skip")
    optimizer.step(first)
    second["long"][-1] = bad
    return optimizer, params, second


def everything(optimizer: LARS, params: dict[str, Any]) -> list[bytes]:
    """Return all that a step could change, but the count of skipped ones."""
    state = optimizer.state_dict()["state"]
    buffers = [own["momentum_buffer"] for own in state.values()]
    numbers = np.array([optimizer.steps, *(own["previous_lr"] for own in state.values())])
    return [x.tobytes() for x in (*params.values(), *buffers, numbers)]


@pytest.mark.parametrize("dtype", ["f8", "f4", "f2", "c8"])
@pytest.mark.parametrize("bad", BAD)
def test_a_skipped_step_changes_nothing_but_the_count(bad: float, dtype: str) -> None:
    optimizer, params, grads = spoiled(bad, dtype)
    before = everything(optimizer, params)
    optimizer.step(grads)
    optimizer.step(grads)
    assert everything(optimizer, params) == before
    assert (optimizer.steps, optimizer.skipped_steps) == (1, 2)
    grads["long"][-1] = 0.5
    optimizer.step(grads)
    assert (optimizer.steps, optimizer.skipped_steps) == (2, 2)
    assert everything(optimizer, params) != before


@pytest.mark.parametrize("bad", BAD)
def test_a_refused_step_changes_nothing_and_a_propagated_one_goes_through(bad: float) -> None:
    optimizer, params, grads = spoiled(bad, "f4")
    before = everything(optimizer, params)
    optimizer.param_groups[0]["nonfinite"] = "raise"
    with pytest.raises(NonFiniteError, match="gradient of 'long' has 1 non-finite entries of 1100"):
        optimizer.step(grads)
    assert everything(optimizer, params) == before
    assert (optimizer.steps, optimizer.skipped_steps) == (1, 0)
    optimizer.param_groups[0]["nonfinite"] = "propagate"
    optimizer.step(grads)
    assert (optimizer.steps, optimizer.skipped_steps) == (2, 0)
    assert not np.isfinite(params["long"]).all()
    assert np.isfinite(params["kernel"]).all()  # other layers have norms of their own


@pytest.mark.parametrize(
    "policies", [("propagate", "raise"), ("propagate", "skip"), ("skip", "raise"), ("raise", "skip")]
)
def test_groups_may_differ_in_what_they_do(policies: tuple[str, str]) -> None:
    for bad_group in (0, 1):
        params = [np.ones(3), np.ones(3)]
        groups = [{"params": {n: p}, "nonfinite": policy} for n, p, policy in zip("ab", params, policies, strict=True)]
        optimizer = LARS(groups, lr=0.1)
        grads = [np.ones(3), np.ones(3)]
        grads[bad_group][1] = np.nan
        if policies[bad_group] == "raise":
            with pytest.raises(NonFiniteError, match=f"gradient of {'ab'[bad_group]!r}"):
                optimizer.step(grads)
        else:
            optimizer.step(grads)
        taken = policies[bad_group] == "propagate"
        assert (optimizer.steps, optimizer.skipped_steps) == (int(taken), int(policies[bad_group] == "skip"))
        assert np.all(params[1 - bad_group] == (0.9 if taken else 1.0))


@pytest.mark.parametrize("bad", BAD)
def test_a_skipped_update_returns_what_it_was_given(bad: float) -> None:
    params, (first, second) = layers_of(2, steps=2)
    for named in (params, first, second):
        del named["scalar"]
    second["long"][-1] = bad
    now, state = update(params, first, init(params), lr=0.1, momentum=0.9)
    then, after = update(now, second, state, lr=0.2, momentum=0.9, nonfinite="skip")
    for name, p in now.items():
        assert_same_bits(then[name], p, name)
        assert_same_bits(after.momentum_buffers[name], state.momentum_buffers[name], name)
    for ours, theirs in ((after.step, state.step), (after.first, state.first), (after.previous_lr, state.previous_lr)):
        assert_same_bits(np.asarray(ours), np.asarray(theirs))
