"""A tape says what its rule says, to the bit, or there is none."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from references import assert_same_bits

from lars_array import LARS, RULES, Hyper, Rule
from lars_array.core import coefficients, momentum_form, norms, resolve
from lars_array.kernels import tape as tape_module
from lars_array.kernels.compiled.loops import _coefficients
from lars_array.kernels.tape import INPUTS, OPERATIONS, Tape, record

LAYERS = 4000
ODD = [0.0, -0.0, 1.0, 1e-300, 1e300, math.inf, math.nan, 5e-324]


def some_layers(seed: int = 0) -> tuple[Any, Hyper, Any]:
    """Return sums, hyper-parameters and gamma of layers such as there are, and of some such as there ought not be."""
    rng = np.random.default_rng(seed)

    def numbers(*choices: float) -> Any:
        drawn = 10.0 ** rng.uniform(-6, 3, LAYERS)
        return np.where(rng.random(LAYERS) < 0.3, rng.choice(np.array(choices), LAYERS), drawn)

    def booleans() -> Any:
        return rng.random(LAYERS) < 0.5

    fields = {name: numbers(0.0, 0.9, 1.0) for name in Hyper._fields}
    fields |= {name: booleans() for name in ("nesterov", "trust_clip", "always_adapt", "adapt", "maximize", "first")}
    fields |= {"trust_upper": numbers(math.inf), "max_grad_norm": numbers(math.inf)}
    S = np.stack([numbers(*ODD) for _ in range(3)], axis=1)
    return S, Hyper(**fields), rng.choice([-1.0, 1.0], LAYERS) * numbers(1.0)


def played(tape: Tape, S: Any, hyper: Hyper, gamma: Any) -> Any:
    """Return what compiled code makes of a tape."""
    C = np.empty((len(S), 6))
    given = np.stack([gamma, *hyper], axis=1)
    registers = np.empty(3 + given.shape[1] + len(tape.constants) + len(tape.operations))
    for row in range(len(S)):
        previous_lr = hyper.previous_lr[row]
        _coefficients(S[row], given[row], previous_lr, tape.operations, tape.constants, tape.outputs, registers, C[row])
    return C


def assert_tape_is_rule(rule: Rule) -> None:
    tape = record(rule)
    assert tape is not None, "it should have been recorded"
    S, hyper, gamma = some_layers()
    with np.errstate(all="ignore"):
        want = coefficients(S, hyper, [rule] * LAYERS, gamma, xp=np)
    # Which nan it is, is nobody's business.
    ours, theirs = (np.where(np.isnan(C), np.nan, C) for C in (played(tape, S, hyper, gamma), want))
    assert_same_bits(ours, theirs, str(rule))
    assert np.isfinite(ours).all(axis=1).mean() > 0.3


@pytest.mark.parametrize("name", RULES)
def test_every_rule_has_a_tape_that_gives_its_bits(name: str) -> None:
    assert_tape_is_rule(RULES[name])


def _sgd(scale: Callable[[Any, Hyper, Any], Any]) -> Rule:
    """Return a rule of a user's: SGD with a learning rate that is scaled by something."""

    def function(S: Any, hyper: Hyper, xp: Any) -> Any:
        ratio = scale(S, hyper, xp)
        return momentum_form(ratio, hyper.lr, hyper.weight_decay, hyper, xp)

    return resolve(function)


RECORDED: dict[str, Callable[[Any, Hyper, Any], Any]] = {
    "arithmetic": lambda S, h, xp: 2 - (-S[:, 0] + 1.5) * 3 / (S[:, 1] - 7) + S[:, 2] / 2,
    "numpy by name": lambda S, h, xp: np.sqrt(np.abs(S[:, 0] - np.float64(0.5))) + np.square(S[:, 1]),
    "powers": lambda S, h, xp: S[:, 0] ** 2,
    "whole S": lambda S, h, xp: (2 * xp.sqrt(S) + 1)[:, 1] + norms(S + S, xp)[0],
    "comparisons": lambda S, h, xp: xp.where(
        (S[:, 0] > S[:, 1]) & (S[:, 1] >= 0.1) | ~(S[:, 2] <= 1) & (0.5 < S[:, 0]), S[:, 0], 3.0
    ),
    "equality": lambda S, h, xp: xp.where((S[:, 0] == 1.0) | (S[:, 1] != S[:, 2]), S[:, 0], -0.0),
    "booleans": lambda S, h, xp: xp.where(xp.where(h.nesterov, h.first, ~h.adapt), h.nesterov * S[:, 0], h.eps),
    "constants": lambda S, h, xp: xp.ones_like(h.lr) + xp.zeros_like(S[:, 0]) * -0.0,
    "boolean constants": lambda S, h, xp: xp.where(h.first & xp.ones_like(h.adapt) | False, S[:, 0], S[:, 1]),
}

NOT_RECORDED: dict[str, Callable[[Any, Hyper, Any], Any]] = {
    "other layers": lambda S, h, xp: S[:, 0] / xp.sum(S[:, 0]),
    "a cumulative sum": lambda S, h, xp: xp.cumulative_sum(S[:, 0]),
    "one layer": lambda S, h, xp: S[0, 0] * S[:, 1],
    "a row": lambda S, h, xp: S[0] * S[:, 1],
    "values": lambda S, h, xp: S[:, 0] if S[0, 0] > 0 else S[:, 1],
    "a value by float": lambda S, h, xp: S[:, 0] * float(h.lr[0]),
    "a logarithm": lambda S, h, xp: xp.log1p(S[:, 0]),
    "a power": lambda S, h, xp: S[:, 0] ** 0.25,
    "an array of its own": lambda S, h, xp: S[:, 0] * xp.asarray([0.5]),
    "arithmetic on booleans": lambda S, h, xp: S[:, 0] * (h.first + h.nesterov),
    "where of numbers": lambda S, h, xp: xp.where(h.lr, S[:, 0], S[:, 1]),
    "bits": lambda S, h, xp: S[:, 0] * xp.where(~(xp.astype(h.first, xp.int64)) > 0, 1.0, 2.0),
    "in place": lambda S, h, xp: np.multiply(S[:, 0], 2.0, out=np.empty(len(h.lr))),
    "the number of layers": lambda S, h, xp: S[:, 0] / S.shape[0],
    "an array made of layers": lambda S, h, xp: S[:, 0] / xp.max(xp.asarray(S[:, 0])),
    "the size of an array": lambda S, h, xp: S[:, 0] * np.asarray(S[:, 0]).size,
    "a sum over a new array": lambda S, h, xp: S[:, 0] * xp.sum(xp.ones_like(S)),
    "several columns": lambda S, h, xp: S[:, 0] * len(S[:, :2]),
    "a negated boolean": lambda S, h, xp: -h.first * S[:, 0],
    "the root of a boolean": lambda S, h, xp: xp.sqrt(h.first) * S[:, 0],
    "a stacked number": lambda S, h, xp: xp.stack([0.9, h.lr], axis=1)[:, 1],
    "where with an array": lambda S, h, xp: xp.where(h.first, np.array([0.5]), S[:, 1]),
    "an error": lambda S, h, xp: 1 / 0 if isinstance(S, np.ndarray) is False else S[:, 0],
}


@pytest.mark.parametrize("name", RECORDED)
def test_what_can_be_recorded(name: str) -> None:
    assert_tape_is_rule(_sgd(RECORDED[name]))


@pytest.mark.parametrize("name", NOT_RECORDED)
def test_a_rule_that_cannot_be_recorded_is_called(name: str) -> None:
    rule = _sgd(NOT_RECORDED[name])
    assert record(rule) is None
    results = []
    for kernel in ("compiled", "portable"):
        params = [np.arange(1.0, 4.0), np.array([0.5, -2.0])]
        optimizer = LARS(params, 0.1, 0.9, rule=rule, kernel=kernel, nonfinite="propagate")
        try:
            for _ in range(2):
                optimizer.step([0.3 * p for p in params])
        except (TypeError, ValueError) as error:  # what it does may be no good for arrays either
            results.append(str(error))
        else:
            results.append(np.concatenate(params))
    assert type(results[0]) is type(results[1])
    assert results[0] == (pytest.approx(results[1]) if isinstance(results[1], np.ndarray) else results[1])


def test_a_tape_is_made_once_a_rule() -> None:
    calls: list[Any] = []
    rule = _sgd(lambda S, h, xp: (calls.append(type(S)), S[:, 0])[1])
    params = [np.ones(3)]
    optimizer = LARS(params, 0.1, rule=rule, kernel="compiled")
    for _ in range(3):
        optimizer.step([np.ones(3)])
    assert len(calls) == 2 and record(rule) is record(rule)


def test_a_tape_lives_as_long_as_its_rule() -> None:
    def half(S: Any, hyper: Hyper, xp: Any) -> Any:
        return momentum_form(0.5 * xp.ones_like(hyper.lr), hyper.lr, hyper.weight_decay, hyper, xp)

    gc.collect()
    before = len(tape_module._recorded)
    optimizer = LARS([np.ones(3)], 0.1, rule=half, kernel="compiled")
    optimizer.step([np.ones(3)])
    assert len(tape_module._recorded) == before + 1
    alive = weakref.ref(half)
    del half, optimizer
    gc.collect()
    assert alive() is None and len(tape_module._recorded) == before


def test_equal_rules_have_their_own_tapes() -> None:
    class Scale:
        def __init__(self, factor: float) -> None:
            self.factor = factor

        def __eq__(self, other: object) -> bool:
            return True

        __hash__ = None  # type: ignore[assignment]

        def __call__(self, S: Any, hyper: Any, xp: Any) -> Any:
            return momentum_form(self.factor * xp.ones_like(hyper.lr), hyper.lr, hyper.weight_decay, hyper, xp)

    a, b = np.ones(3), np.ones(3)
    groups = [{"params": [a], "rule": Scale(1.0)}, {"params": [b], "rule": Scale(3.0)}]
    LARS(groups, lr=0.1, kernel="compiled").step([np.ones(3)] * 2)
    assert a.tolist() == pytest.approx([0.9] * 3) and b.tolist() == pytest.approx([0.7] * 3)


def test_a_tape_is_small() -> None:
    for name, rule in RULES.items():
        tape = record(rule)
        assert tape is not None and len(tape.operations) <= 50, name
        size = len(INPUTS) + len(tape.constants)
        for place, (code, *registers) in enumerate(tape.operations.tolist()):
            assert 0 <= code < len(OPERATIONS)
            assert all(0 <= register < size + place for register in registers), "nothing is used before it is there"
