"""`param_groups`: which layers are decayed and which are adapted."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from assertions import assert_close, assert_refused, flash_run

from lars_array import LARS, init, is_bias_or_norm, param_groups, update

SHAPES = {"conv.weight": (2, 2), "conv.bias": (3,), "bn.scale": (), "head.weight": (1, 2), "head.bias": (1,)}


def parameters() -> dict[str, Any]:
    return {name: np.full(shape, 2.0) for name, shape in SHAPES.items()}


OPTIONS = {
    (True, True): {"weight_decay": 0.5},
    (True, False): {"weight_decay": 0.5, "adapt": False},
    (False, True): {"weight_decay": 0.0, "always_adapt": True},
    (False, False): {"weight_decay": 0.0, "adapt": False},
}


def assert_groups(groups: list[dict[str, Any]], expected: dict[tuple[bool, bool], list[str]]) -> None:
    """Compare with names by (decays, adapts), in order."""
    assert [list(group["params"]) for group in groups] == list(expected.values())
    assert [{key: value for key, value in group.items() if key != "params"} for group in groups] == [
        OPTIONS[decays_and_adapts] for decays_and_adapts in expected
    ]


BIASES = ["conv.bias", "bn.scale", "head.bias"]
WEIGHTS = ["conv.weight", "head.weight"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {(True, True): WEIGHTS, (False, False): BIASES}),
        ({"no_decay": None, "no_adapt": None}, {(True, True): list(SHAPES)}),
        ({"no_decay": None}, {(True, True): WEIGHTS, (True, False): BIASES}),
        ({"no_adapt": None}, {(True, True): WEIGHTS, (False, True): BIASES}),
        ({"no_decay": lambda name, p: True, "no_adapt": lambda name, p: True}, {(False, False): list(SHAPES)}),
        (
            {"no_decay": ["bias$", "^bn"], "no_adapt": ["bias", "head"]},
            {
                (True, True): ["conv.weight"],
                (False, False): ["conv.bias", "head.bias"],
                (False, True): ["bn.scale"],
                (True, False): ["head.weight"],
            },
        ),
        (
            {"no_decay": (x for x in [re.compile("BN|HEAD", re.IGNORECASE)]), "no_adapt": []},
            {(True, True): ["conv.weight", "conv.bias"], (False, True): ["bn.scale", "head.weight", "head.bias"]},
        ),
        (
            {"no_decay": lambda name, p: p.size == 1, "no_adapt": lambda name, p: name.startswith("head")},
            {
                (True, True): ["conv.weight", "conv.bias"],
                (False, True): ["bn.scale"],
                (True, False): ["head.weight"],
                (False, False): ["head.bias"],
            },
        ),
    ],
)
def test_decay_and_adaptation_are_chosen_independently(options: Any, expected: Any) -> None:
    params = parameters()
    groups = param_groups(params, 0.5, **options)
    assert_groups(groups, expected)
    assert all(p is params[name] for group in groups for name, p in group["params"].items())


def test_names_are_kept_in_all_forms() -> None:
    params = parameters()
    for form in (params, list(params.items()), (pair for pair in params.items())):
        optimizer = LARS(param_groups(form, 0.5), lr=0.1)
        assert [group["names"] for group in optimizer.param_groups] == [WEIGHTS, BIASES]
    unnamed = LARS(param_groups(params.values(), 0.5), lr=0.1)
    assert [group["names"] for group in unnamed.param_groups] == [["0", "3"], ["1", "2", "4"]]


def test_a_predicate_is_asked_once_for_each_parameter() -> None:
    asked: list[Any] = []
    params = parameters()
    param_groups(params, 0.5, no_decay=lambda name, p: asked.append((name, id(p))), no_adapt=None)
    assert asked == [(name, id(p)) for name, p in params.items()]


def test_is_bias_or_norm(xp: Any) -> None:
    verdicts = [is_bias_or_norm("", xp.ones(shape)) for shape in ((), (3,), (1, 3), (1, 1, 1))]
    assert verdicts == [True, True, False, False]
    named = [
        is_bias_or_norm(name, xp.ones((2, 3))) for name in ("bias", "a.bias", "bias.a", "a.relative_bias", "unbias")
    ]
    assert named == [True, True, False, False, False]


def test_a_layer_that_is_adapted_but_not_decayed_really_is() -> None:
    # Of flash's rule such a layer would not be, and exclusion from decay would be exclusion from both.
    w, b = np.array([[3.0, 4.0]]), np.array([0.6, 0.8])
    params = {"w": w, "b": b}
    groups = param_groups(params, 0.1, no_decay=["b"], no_adapt=None)
    optimizer = LARS(groups, lr=0.5, eps=0.0)
    g, h = np.array([[0.3, 0.4]]), np.array([0.0, 0.25])
    functional, _ = update(groups, [g, h], init(groups), lr=0.5, eps=0.0)
    optimizer.step({"w": g, "b": h})
    ratio = 0.001 * 1.0 / 0.25
    assert_close(b, np.array([0.6, 0.8]) - 0.5 * ratio * h)
    assert_close(w, flash_run(np.array([[3.0, 4.0]]), [g], lr=0.5, weight_decay=0.1, eps=0.0))
    assert_close(np.array(list(optimizer.trust_ratios().values())), np.array([0.005, ratio]), 1e-12)
    assert_close(functional[1]["params"]["b"], b)


def test_a_layer_that_is_neither_takes_steps_of_sgd_and_one_that_is_only_decayed_of_sgd_with_decay() -> None:
    p = {"w": np.ones((2, 2)), "b": np.full(2, 3.0), "c": np.full(2, 3.0)}
    groups = param_groups(p, 0.1, no_decay=["b"], no_adapt=["b", "c"])
    LARS(groups, lr=0.5).step({"w": np.ones((2, 2)), "b": np.full(2, 0.25), "c": np.full(2, 0.25)})
    assert_close(p["b"], np.full(2, 3.0 - 0.5 * 0.25))
    assert_close(p["c"], np.full(2, 3.0 - 0.5 * (0.25 + 0.1 * 3.0)))


def test_what_is_no_such_thing() -> None:
    p = np.ones(2)
    groups = [{"params": [p]}]
    again = param_groups([p], 0.1)
    must = "no_decay must be a predicate, a list of regular expressions or None; got "
    already = "params must not be groups already; give the parameters themselves"
    for call, kind, message in [
        (lambda: param_groups(groups, 0.1), TypeError, already),
        (lambda: param_groups(again, 0.1), TypeError, already),
        (lambda: param_groups([], 0.1), ValueError, "optimizer got an empty parameter list"),
        (lambda: param_groups([p], 0.1, no_decay="bias"), TypeError, f"{must}'bias'"),
        (lambda: param_groups([p], 0.1, no_decay=3), TypeError, f"{must}3"),
        (lambda: param_groups([p], 0.1, no_decay=True), TypeError, f"{must}True"),
        (
            lambda: param_groups([p], 0.1, no_adapt="bias"),
            TypeError,
            "no_adapt must be a predicate, a list of regular expressions or None; got 'bias'",
        ),
        (
            lambda: param_groups([p], 0.1, no_adapt=["a", "("]),
            ValueError,
            "no_adapt must hold regular expressions; '(': missing ), unterminated subpattern at position 0",
        ),
        (
            lambda: param_groups([p], 0.1, no_adapt=["*.bias"]),
            ValueError,
            "no_adapt must hold regular expressions; '*.bias': nothing to repeat at position 0; "
            "any text is '.*' in them",
        ),
        (lambda: param_groups([p], 0.1, no_decay=[int]), TypeError, f"{must}<class 'int'>"),
    ]:
        assert_refused(call, kind, message, p)
    with pytest.raises(TypeError, match=r"^no_decay must "):
        param_groups([p], 0.1, no_decay=[3])


def test_the_weight_decay_is_checked_when_an_optimizer_is_made() -> None:
    groups = param_groups([np.ones((2, 2))], -1.0)
    assert_refused(lambda: LARS(groups, lr=0.1), ValueError, "Invalid weight_decay value: -1.0")


@pytest.mark.parametrize(
    ("pattern", "way"),
    [
        ("bais", "'bias'"),
        ("conv.wieght", "'conv.weight'"),
        (re.compile("^xyz$"), "names are conv.weight, conv.bias, bn.scale, head.weight, head.bias"),
        ("LayerNorm", "names are conv.weight"),
    ],
)
@pytest.mark.parametrize("option", ["no_decay", "no_adapt"])
def test_a_pattern_that_matches_nothing_is_told(pattern: Any, way: str, option: str) -> None:
    text = pattern if isinstance(pattern, str) else pattern.pattern
    with pytest.warns(UserWarning, match=f"^no parameter matches {re.escape(repr(text))} of {option}; ") as caught:
        groups = param_groups(parameters(), 0.5, **{option: [pattern, "head"]})
    assert way in str(caught[0].message) and len(caught) == 1
    assert {name for group in groups for name in group["params"]} == set(SHAPES)


def test_patterns_and_predicates_stand_together() -> None:
    groups = param_groups(parameters(), 0.5, no_decay=[is_bias_or_norm, "head"], no_adapt=None)
    assert_groups(
        groups, {(True, True): ["conv.weight"], (False, True): ["conv.bias", "bn.scale", "head.weight", "head.bias"]}
    )
