"""`lars_step`: one layer as a pure function, on every namespace, and traced by JAX."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
from assertions import assert_close, assert_refused, assert_same, flash_step, to_numpy

from lars_array import RULES, NonFiniteError, lars_step

P, G, V = np.array([3.0, 4.0]), np.array([0.3, -0.25]), np.array([0.01, 0.02])
HYPER: dict[str, Any] = {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.1}


def three(xp: Any, kind: str = "float64") -> list[Any]:
    return [xp.asarray(x, dtype=getattr(xp, kind), copy=True) for x in (P, G, V)]


def test_the_signature() -> None:
    parameters = inspect.signature(lars_step).parameters
    positional = [p.name for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == ["p", "g", "v"]
    assert parameters["v"].default is None
    assert {p.name: p.default for p in parameters.values() if p.kind is p.KEYWORD_ONLY} == {
        "lr": inspect.Parameter.empty,
        "momentum": 0,
        "dampening": 0,
        "weight_decay": 0,
        "nesterov": False,
        "trust_coefficient": 0.001,
        "eps": 1e-8,
        "previous_lr": None,
        "nonfinite": "propagate",
    }


@pytest.mark.parametrize(
    "options",
    [
        {"lr": 0.5},
        HYPER,
        HYPER | {"nesterov": True},
        HYPER | {"dampening": 0.25},
        HYPER | {"trust_coefficient": 0.5, "eps": 2.0},
        {"lr": 0.5, "weight_decay": 0.1},
    ],
    ids=str,
)
def test_it_is_the_step_of_flash(options: dict[str, Any], xp: Any) -> None:
    p, g, v = three(xp)
    for given in (None, v) if "momentum" in options else (None,):
        expected_p, expected_v = flash_step(P, G, None if given is None else V, **options)
        new_p, new_v = lars_step(p, g, given, **options)
        assert_close(new_p, expected_p)
        if "momentum" in options:
            assert_close(new_v, expected_v)
        else:
            assert new_v is None
    for x, before in zip((p, g, v), (P, G, V), strict=True):
        assert_same(to_numpy(x), before)


def test_a_buffer_that_is_not_asked_for_is_handed_back(xp: Any) -> None:
    p, g, v = three(xp)
    new_p, new_v = lars_step(p, g, v, lr=0.5, weight_decay=0.1)
    assert_close(new_p, flash_step(P, G, lr=0.5, weight_decay=0.1)[0])
    assert_same(to_numpy(new_v), V)
    for nonfinite in ("skip", "raise"):
        assert_same(to_numpy(lars_step(p, g, v, lr=0.5, nonfinite=nonfinite)[1]), V)
    assert lars_step(p, g, None, lr=0.5, nonfinite="skip")[1] is None


def test_the_defaults_are_those_that_leave_sgd() -> None:
    assert_close(lars_step(P, G, lr=0.5)[0], P - 0.5 * G)
    adapted = lars_step(P, G, lr=0.5, always_adapt=True)[0]
    assert_close(adapted, P - 0.5 * 0.001 * 5 / (np.linalg.norm(G) + 1e-8) * G, 1e-15)
    damped = lars_step(P, G, V, lr=0.5, momentum=0.9)[1]
    assert_close(damped, 0.9 * V + G)


def test_a_rule_may_want_a_buffer_without_momentum(xp: Any) -> None:
    p, g, _ = three(xp)
    assert_close(lars_step(p, g, lr=0.5, adapt=False, rule="barlow")[1], G)


def test_the_options_of_the_optimizer_are_taken(xp: Any) -> None:
    p, g, _ = three(xp)
    norm = np.linalg.norm(G)
    for options, expected in [
        ({"maximize": True}, P + 0.5 * G),
        ({"rescale_grad": 0.25}, P - 0.125 * G),
        ({"max_grad_norm": 0.125}, P - 0.5 * G * (0.125 / norm)),
        ({"always_adapt": True, "trust_bounds": (0.25, 1.0)}, P - 0.5 * 0.25 * G),
        ({"always_adapt": True, "trust_bounds": (0.25, 0.25), "trust_clip": True}, P - 0.5 * 0.5 * G),
        ({"rule": "timm"}, P - 0.5 * G),
    ]:
        assert_close(lars_step(p, g, lr=0.5, **options)[0], expected)


def test_the_learning_rate_before_corrects_the_momentum(xp: Any) -> None:
    p, g, v = three(xp)
    into = lars_step(p, g, None, **HYPER, rule="nvidia")[1]
    for previous_lr, factor in ((None, 1.0), (0.5, 1.0), (0.25, 2.0), (0, 1.0), (xp.asarray(1.0), 0.5)):
        new_v = lars_step(p, g, v, **HYPER, rule="nvidia", previous_lr=previous_lr)[1]
        assert_close(new_v, 0.9 * factor * V + to_numpy(into))


def test_the_learning_rate_may_be_a_schedule() -> None:
    expected = lars_step(P, G, V, **HYPER)
    assert_same(lars_step(P, G, V, **HYPER | {"lr": lambda step: 0.5 - step}), expected)


@pytest.mark.parametrize("spoilt", ["gradient", "parameter"])
def test_what_is_not_finite(spoilt: str, xp: Any) -> None:
    p, g, v = three(xp)
    bad = xp.asarray([1.0, float("nan")], dtype=xp.float64)
    p, g = (p, bad) if spoilt == "gradient" else (bad, g)
    message = f"the {spoilt} of 'p' has 1 non-finite entries of 2; nothing was changed"
    raising = HYPER | {"nonfinite": "raise"}
    assert_refused(lambda: lars_step(p, g, v, **raising), NonFiniteError, message, *map(to_numpy, (p, g, v)))
    new_p, new_v = lars_step(p, g, v, **HYPER, nonfinite="skip")
    assert_same([to_numpy(new_p), to_numpy(new_v)], [to_numpy(p), V])
    for options in ({}, {"nonfinite": "propagate"}):
        new_p, new_v = lars_step(p, g, v, **HYPER, **options)
        assert np.any(np.isnan(to_numpy(new_p)))
        assert np.any(np.isnan(to_numpy(new_v)))


@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
def test_what_is_finite_goes_through(nonfinite: str, xp: Any) -> None:
    p, g, v = three(xp)
    ours, plain = lars_step(p, g, v, **HYPER, nonfinite=nonfinite), lars_step(p, g, v, **HYPER)
    assert_same([to_numpy(x) for x in ours], [to_numpy(x) for x in plain])


def test_a_skipped_first_step_leaves_a_buffer_of_zeros() -> None:
    # Whether it was skipped is not known under jit, so None can't come back.
    new_p, new_v = lars_step(P, G * np.nan, None, **HYPER, nonfinite="skip")
    assert_same([new_p, new_v], [P, np.zeros(2)])


def test_types_are_kept(xp: Any) -> None:
    for kind in ("float32", "complex64", "complex128"):
        p, g, v = three(xp, kind)
        for given in (None, v):
            new_p, new_v = lars_step(p, g, given, **HYPER)
            assert new_p.dtype == p.dtype == new_v.dtype
            expected = flash_step(P, G, None if given is None else V, **HYPER)
            assert_close(to_numpy(new_p), expected[0], 1e-6)
            assert_close(to_numpy(new_v), expected[1], 1e-5)
        assert lars_step(p, g, None, **HYPER, nonfinite="skip")[0].dtype == p.dtype


def test_half_precision_has_a_single_precision_buffer() -> None:
    p, g, _ = three(np, "float16")
    new_p, new_v = lars_step(p, g, None, **HYPER)
    assert (new_p.dtype, new_v.dtype) == (np.float16, np.float32)
    assert_close(new_v, flash_step(P, G, **HYPER)[1], 1e-3)


def test_what_does_not_fit_is_refused() -> None:
    dtype = "must be of one of the real types float64, float32, float16, bfloat16; got dtype('int64')"
    shape = "must have the parameter's shape (2,); got "
    for arguments, kind, message in [
        (([3.0, 4.0], G), TypeError, "parameter 'p' must be an array; got [3.0, 4.0]"),
        ((P, [0.1, 0.2]), TypeError, "the gradient of 'p' must be an array; got [0.1, 0.2]"),
        ((P, G.astype(np.int64)), TypeError, f"the gradient of 'p' {dtype}"),
        ((P, G[:1]), ValueError, f"the gradient of 'p' {shape}(1,)"),
        ((P, G, np.ones((3, 2))), ValueError, f"the momentum buffer of 'p' {shape}(3, 2)"),
        ((P, G, np.ones(1)), ValueError, f"the momentum buffer of 'p' {shape}(1,)"),
    ]:
        assert_refused(lambda a=arguments: lars_step(*a, **HYPER), kind, message, P, G)
    with pytest.raises(TypeError, match=r"^the momentum buffer of 'p' must "):
        lars_step(P, G, V.astype(np.float32), **HYPER)


@pytest.mark.parametrize("rule", sorted(RULES))
def test_it_may_be_traced(rule: str) -> None:
    jax = pytest.importorskip("jax")

    def step(p: Any, g: Any, v: Any, lr: Any, momentum: Any) -> Any:
        return lars_step(p, g, v, lr=lr, momentum=momentum, weight_decay=0.1, rule=rule, previous_lr=lr / 2)

    with jax.enable_x64(True):
        arguments = [jax.numpy.asarray(x) for x in (P, G, V, 0.5, 0.9)]
        eager = lars_step(P, G, V, **HYPER, rule=rule, previous_lr=0.25)
        for ours, expected in zip(jax.jit(step)(*arguments), eager, strict=True):
            assert_close(ours, expected)
        p, v = jax.jit(lambda p, g, lr: lars_step(p, g, None, lr=lr, momentum=0.9, nonfinite="skip"))(
            arguments[0], arguments[1] * jax.numpy.nan, 0.5
        )
        assert_same([to_numpy(p), to_numpy(v)], [P, np.zeros(2)])


def test_it_may_be_differentiated() -> None:
    jax = pytest.importorskip("jax")

    def loss(p: Any, g: Any, lr: Any) -> Any:
        return jax.numpy.sum(lars_step(p, g, None, lr=lr, momentum=0.9, weight_decay=0.1)[0] ** 2)

    with jax.enable_x64(True):
        arguments = [jax.numpy.asarray(x) for x in (P, G, 0.5)]
        slopes = jax.grad(loss, argnums=(0, 1, 2))(*arguments)
        for k, slope in enumerate(slopes):
            direction = jax.numpy.ones_like(arguments[k])
            ends = [[x + sign * 1e-6 * direction if i == k else x for i, x in enumerate(arguments)] for sign in (1, -1)]
            expected = (loss(*ends[0]) - loss(*ends[1])) / 2e-6
            assert_close(jax.numpy.sum(slope), expected, 1e-6)


def test_slopes_are_finite_where_a_norm_is_zero() -> None:
    jax = pytest.importorskip("jax")
    with jax.enable_x64(True):
        p, g = jax.numpy.asarray(P), jax.numpy.zeros(2)
        slope = jax.grad(lambda p: jax.numpy.sum(lars_step(p, g, None, **HYPER)[0]))(p)
        assert_same(to_numpy(slope), np.ones(2))
