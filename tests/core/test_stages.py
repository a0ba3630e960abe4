"""The stages by themselves: sums, coefficients, apply, on every namespace and by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from assertions import assert_close, to_numpy

from lars_array import RULES, Rule, apply, coefficients, sums
from lars_array.core import Hyper, difference, flash, gradient_factor, plan, update_weights
from lars_array.hyperparams import DEFAULTS, at_step, inputs_of

# Norms 5, 0.5; 13, 0.
P = [np.array([3.0, 4.0]), np.array([[5.0], [12.0]])]
G = [np.array([0.3, 0.4]), np.zeros((2, 1))]
V = [np.array([1.0, -2.0]), np.array([[2.0], [0.5]])]


def arrays(xp: Any, values: list[Any]) -> list[Any]:
    return [None if x is None else xp.asarray(x) for x in values]


def hyper_of(*layers: dict[str, Any], xp: Any = np, first: bool = False, previous_lr: float = 0.5) -> Hyper:
    """One group a layer."""
    groups = [at_step({"lr": 0.5} | options, 0) for options in layers]
    n = len(groups)
    return inputs_of(groups, list(range(n)), [first] * n, [previous_lr] * n, like=xp.zeros(1), xp=xp).hyper


def flash_row(S: list[float], first: bool = False, **options: Any) -> Any:
    """Return (m, alpha, beta, kappa, lambda, mu) of flash for one layer."""
    return flash(np.array([S]), hyper_of({"eps": 0.0} | options, first=first), np)[0]


def assert_row(row: Any, m: float, alpha: float, beta: float, kappa: float, lam: float, mu: float) -> None:
    assert_close(row, np.array([m, alpha, beta, kappa, lam, mu]), 1e-15)
    assert np.all((row == 0) == (np.array([m, alpha, beta, kappa, lam, mu]) == 0))


def test_sums_without_an_operand_repeat_the_second(xp: Any) -> None:
    S = sums(arrays(xp, P), arrays(xp, G), [None, None], xp=xp)
    assert tuple(S.shape) == (2, 3)
    assert S.dtype == xp.float64
    assert_close(S, np.array([[25.0, 0.25, 0.25], [169.0, 0.0, 0.0]]), 1e-15)


def test_the_third_sum_is_of_the_operand(xp: Any) -> None:
    gamma, w, h = (xp.asarray(x, dtype=xp.float64) for x in ([2.0, 1.0], [0.1, 0.25], [0.5, -1.0]))
    buffers = [V[0], None]
    S = sums(arrays(xp, P), arrays(xp, G), arrays(xp, buffers), (gamma, w, h), xp=xp)
    d = [2 * G[0] + 0.1 * P[0] + 0.5 * V[0], 0.25 * P[1]]
    expected = [[np.sum(p**2), np.sum(g**2), np.sum(x**2)] for p, g, x in zip(P, G, d, strict=True)]
    assert_close(S, np.array(expected), 1e-15)
    S = sums(arrays(xp, P), arrays(xp, G), arrays(xp, V), (gamma, w, None), xp=xp)
    d = [2 * G[0] + 0.1 * P[0], 0.25 * P[1]]
    assert_close(S[:, 2], np.array([np.sum(x**2) for x in d]), 1e-15)


def test_sums_of_complex_arrays_are_over_both_parts(xp: Any) -> None:
    p, g, v = (xp.asarray([x], dtype=xp.complex64) for x in (3 + 4j, 1 - 2j, 2j))
    operand = tuple(xp.asarray([x], dtype=xp.float64) for x in (2.0, 1.0, 0.5))
    S = sums([p], [g], [v], operand, xp=xp)
    assert S.dtype == xp.float64
    assert_close(S, np.array([[25.0, 5.0, 5.0**2 + 1.0]]), 1e-15)  # 5 + 1j


def test_sums_are_accumulated_wide(xp: Any) -> None:
    p = xp.asarray([3e30, 4e30], dtype=xp.float32)
    S = sums([p], [p], [None], xp=xp)
    assert_close(S[:, :2] / 1e60, np.array([[25.0, 25.0]]), 1e-6)


def test_a_namespace_may_be_older_than_the_inspection_of_namespaces() -> None:
    class Numpy20:
        def __getattr__(self, name: str) -> Any:
            if name == "__array_namespace_info__":
                raise AttributeError(name)
            return getattr(np, name)

    p = np.asarray([3e30, 4e30], np.float32)
    assert np.array_equal(sums([p], [p], [None], xp=Numpy20()), sums([p], [p], [None], xp=np))


def test_sequences_of_different_lengths_are_refused() -> None:
    for lengths in ((1, 2, 2), (2, 1, 2), (2, 2, 1)):
        with pytest.raises(ValueError, match="argument"):
            sums(P[: lengths[0]], G[: lengths[1]], V[: lengths[2]], xp=np)


def test_the_affine_map() -> None:
    assert difference(2.0, 3.0, 5.0, 7.0, 11.0, 13.0, 17.0, 19.0, 23.0) == (1701.0, 94.0)


def test_apply_by_hand(xp: Any) -> None:
    c = xp.asarray([0.5, 2.0, 0.25, 0.125, 3.0, 0.0625], dtype=xp.float64)
    p, g, v = (xp.asarray(x) for x in (P[0], G[0], V[0]))
    new_p, new_v = apply(p, g, v, c, xp=xp)
    expected_v = 0.5 * V[0] + 2 * G[0] + 0.25 * P[0]
    assert_close(new_v, expected_v, 1e-15)
    assert_close(new_p, P[0] - (0.125 * expected_v + 3 * G[0] + 0.0625 * P[0]), 1e-15)
    assert (new_p.dtype, new_v.dtype) == (xp.float64, xp.float64)
    for x, before in zip((p, g, v), (P[0], G[0], V[0]), strict=True):
        assert np.array_equal(to_numpy(x), before)
    new_p, new_v = apply(p, g, None, c, xp=xp)
    assert new_v is None  # no buffer is a buffer of zeros that is not kept
    without = 2 * G[0] + 0.25 * P[0]
    assert_close(new_p, P[0] - (0.125 * without + 3 * G[0] + 0.0625 * P[0]), 1e-15)


@pytest.mark.parametrize("kind", ["float32", "complex64", "complex128", "float16"])
def test_apply_keeps_types(kind: str, xp: Any) -> None:
    if kind == "float16" and not hasattr(xp, kind):
        pytest.skip("no float16")
    wide = {"float16": "float32"}.get(kind, kind)
    p, g = (xp.asarray(x, dtype=getattr(xp, kind)) for x in ([3.0, 4.0], [0.25, 0.5]))
    v = xp.asarray([1.0, 2.0], dtype=getattr(xp, wide))
    c = xp.asarray([0.5, 2.0, 0.25, 0.125, 3.0, 0.0625], dtype=xp.float64)
    new_p, new_v = apply(p, g, v, c, xp=xp)
    assert (new_p.dtype, new_v.dtype) == (p.dtype, v.dtype)
    assert_close(to_numpy(new_v), np.array([1.75, 3.0]), 1e-6)
    assert_close(to_numpy(new_p), np.array([3 - 0.21875 - 0.75 - 0.1875, 4 - 0.375 - 1.5 - 0.25]), 1e-3)
    assert apply(p, g, None, c, xp=xp)[0].dtype == p.dtype


def test_flash_without_momentum_puts_the_step_in_lambda_and_mu() -> None:
    r = 0.001 * 5 / (0.5 + 0.1 * 5)
    assert_row(flash_row([25.0, 0.25, 9.0], weight_decay=0.1), 0, r, 0.1 * r, 0, 0.5 * r, 0.5 * r * 0.1)
    assert_row(flash_row([25.0, 0.25, 9.0]), 0, 1, 0, 0, 0.5, 0)


def test_flash_with_momentum_puts_it_in_the_buffer() -> None:
    r = 0.001 * 5 / (0.5 + 0.1 * 5)
    given: dict[str, Any] = {"momentum": 0.9, "weight_decay": 0.1}
    assert_row(flash_row([25.0, 0.25, 9.0], **given), 0.9, r, 0.1 * r, 0.5, 0, 0)
    damped = given | {"dampening": 0.25}
    assert_row(flash_row([25.0, 0.25, 9.0], **damped), 0.9, 0.75 * r, 0.75 * 0.1 * r, 0.5, 0, 0)
    assert_row(flash_row([25.0, 0.25, 9.0], first=True, **damped), 0.9, r, 0.1 * r, 0.5, 0, 0)
    nesterov = flash_row([25.0, 0.25, 9.0], nesterov=True, **given)
    assert_row(nesterov, 0.9, r, 0.1 * r, 0.45, 0.5 * r, 0.5 * r * 0.1)


def test_flash_where_a_norm_is_zero_has_neither_ratio_nor_decay() -> None:
    given: dict[str, Any] = {"momentum": 0.9, "weight_decay": 0.1}
    for S in ([0.0, 0.25, 1.0], [25.0, 0.0, 1.0], [0.0, 0.0, 0.0]):
        assert_row(flash_row(S, **given), 0.9, 1, 0, 0.5, 0, 0)
        assert_row(flash_row(S, always_adapt=True, **given), 0.9, 1, 0, 0.5, 0, 0)
        # Told not to adapt, it is SGD, and SGD decays whatever the gradient.
        assert_row(flash_row(S, adapt=False, **given), 0.9, 1, 0.1, 0.5, 0, 0)


def test_flash_adapts_where_there_is_decay_or_it_is_told_to() -> None:
    S = [25.0, 0.25, 9.0]
    assert_row(flash_row(S, momentum=0.9), 0.9, 1, 0, 0.5, 0, 0)
    assert_row(flash_row(S, momentum=0.9, always_adapt=True), 0.9, 0.01, 0, 0.5, 0, 0)
    assert_row(flash_row(S, momentum=0.9, weight_decay=0.1, adapt=False), 0.9, 1, 0.1, 0.5, 0, 0)
    assert_row(flash_row(S, momentum=0.9, always_adapt=True, eps=0.75), 0.9, 0.004, 0, 0.5, 0, 0)
    assert_row(flash_row(S, momentum=0.9, always_adapt=True, trust_coefficient=0.5), 0.9, 5, 0, 0.5, 0, 0)
    assert_row(flash_row(S, momentum=0.9, always_adapt=True, trust_clip=True), 0.9, 0.02, 0, 0.5, 0, 0)


def test_coefficients_are_made_for_all_layers_at_once(xp: Any) -> None:
    options = [{"weight_decay": 0.1}, {"weight_decay": 0.1, "momentum": 0.9}, {"momentum": 0.5, "lr": 0.25}]
    hyper = hyper_of(*options, xp=xp)
    S = xp.asarray([[25.0, 0.25, 9.0], [169.0, 4.0, 1.0], [1.0, 1.0, 1.0]], dtype=xp.float64)
    gamma = xp.asarray([1.0, -2.0, 0.5], dtype=xp.float64)
    rules = [RULES["flash"], RULES["barlow"], RULES["flash"]]
    C = coefficients(S, hyper, rules, gamma, xp=xp)
    assert C.dtype == xp.float64
    rows = to_numpy(C)
    r, q = 0.001 * 5 / (0.5 + 0.5 + 1e-8), 0.001 * 13 / (1 + 1e-8)
    assert_row(rows[0], 0, r, 0.1 * r, 0, 0.5 * r, 0.5 * 0.1 * r)
    assert_row(rows[1], 0.9, -2 * q, 0.1 * q, 0.5, 0, 0)
    assert_row(rows[2], 0.5, 0.5, 0, 0.25, 0, 0)


def test_rules_see_gradients_already_multiplied() -> None:
    seen = []

    def spy(S: Any, hyper: Any, xp: Any) -> Any:
        seen.append(S.copy())
        return np.ones((1, 6))

    S, gamma = np.array([[25.0, 0.25, 9.0]]), np.array([-3.0])
    C = coefficients(S, hyper_of({}), [Rule(spy)], gamma, xp=np)
    assert_close(seen[0], np.array([[25.0, 2.25, 9.0]]), 0)
    assert_row(C[0], 1, -3, 1, 1, -3, 1)
    assert_close(S, np.array([[25.0, 0.25, 9.0]]), 0)


def test_the_factor_of_the_gradients(xp: Any) -> None:
    options = [{"maximize": True, "rescale_grad": 0.5}, {"max_grad_norm": 1.5}, {"max_grad_norm": 2.5}]
    hyper = hyper_of(*options, xp=xp)
    assert_close(gradient_factor(hyper, None, xp=xp), np.array([-0.5, 1.0, 1.0]), 0)
    # The norm of all gradients, each multiplied by its rescale_grad first: sqrt(0.25 * 4 + 2 + 1) = 2.
    S = xp.asarray([[9.0, 4.0, 9.0], [9.0, 2.0, 9.0], [9.0, 1.0, 9.0]], dtype=xp.float64)
    assert_close(gradient_factor(hyper, S, xp=xp), np.array([-0.5, 0.75, 1.0]), 1e-15)
    assert_close(gradient_factor(hyper, 0 * S, xp=xp), np.array([-0.5, 1.0, 1.0]), 0)


def test_a_norm_that_is_just_the_limit_is_not_clipped() -> None:
    gamma = gradient_factor(hyper_of({"max_grad_norm": 2.0}), np.array([[1.0, 4.0, 0.0]]), xp=np)
    assert gamma.tolist() == [1.0]


def test_the_weights_of_the_update() -> None:
    options = [{}, {"momentum": 0.5}, {"momentum": 0.5, "dampening": 0.25}, {"momentum": 0.5, "nesterov": True}]
    a, h = update_weights(hyper_of(*options), np)
    assert (a.tolist(), h.tolist()) == ([1.0, 1.0, 0.75, 1.5], [0.0, 0.5, 0.5, 0.25])
    a, h = update_weights(hyper_of(*options, first=True), np)
    assert (a.tolist(), h.tolist()) == ([1.0, 1.0, 1.0, 1.5], [0.0, 0.5, 0.5, 0.25])


@pytest.mark.parametrize(
    ("options", "operands"),
    [
        ([{}, {"weight_decay": 0.1}], [None]),
        ([{"max_grad_norm": 9.0}, {}], [None]),
        (
            [{"rule": "barlow", "weight_decay": 0.1, "maximize": True}, {"weight_decay": 0.2}],
            [([-1, 1], [0.1, 0], None)],
        ),
        (
            [{"rule": "simclr-popular", "weight_decay": 0.1, "momentum": 0.5, "nesterov": True, "rescale_grad": 2.0},
             {"rule": "optax", "weight_decay": 0.2, "momentum": 0.5}],
            [([3, 1], [0.15, 0.2], [0.25, 0])],
        ),
        ([{"rule": "simclr-popular", "momentum": 0.5}, {"momentum": 0.25}], [([1, 1], [0, 0], [0.5, 0])]),
        ([{"rule": "barlow", "weight_decay": 0.1}, {"max_grad_norm": 1.0}], [None, ([1, 0.5], [0.1, 0], None)]),
    ],
)  # fmt: skip
def test_what_is_asked_of_memory(options: list[dict[str, Any]], operands: list[Any]) -> None:
    asked = []

    def measure(operand: Any) -> Any:
        asked.append(operand if operand is None else tuple(x if x is None else x.tolist() for x in operand))
        return np.array([[4.0, 2.0, 3.0], [9.0, 2.0, 5.0]])

    groups = [DEFAULTS | {"lr": 0.5} | given for given in options]
    inputs = inputs_of(groups, [0, 1], [False] * 2, [0.5] * 2, like=np.zeros(1), xp=np)
    step = plan(inputs, measure, xp=np)
    assert [x if x is None else tuple(y if y is None else pytest.approx(y) for y in x) for x in operands] == asked
    assert step.rules == [RULES[group["rule"]] for group in groups]
    assert_close(step.S, np.array([[4.0, 2.0, 3.0], [9.0, 2.0, 5.0]]), 0)
    assert_close(step.C, coefficients(step.S, step.hyper, step.rules, step.gamma, xp=np), 0)
