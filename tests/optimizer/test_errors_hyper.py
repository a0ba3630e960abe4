"""Hyper-parameters that no step is taken with, in flash's words where flash has some."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from assertions import assert_close, assert_refused

from lars_array import LARS, RULES, init, lars_step, update
from lars_array.hyperparams import ALIASES, DEFAULTS, unknown_option

HYPER: dict[str, Any] = {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.1}
KNOWN = "lr, momentum, dampening, weight_decay, nesterov, trust_coefficient, eps, rule, trust_clip, trust_bounds, "
KNOWN += "always_adapt, adapt, maximize, rescale_grad, max_grad_norm, nonfinite, layer_axes, master_weights"
NESTEROV = "Nesterov momentum requires a momentum and zero dampening"
BOUNDS = "trust_bounds must hold 0 <= lowest <= highest; got "
PAIR = "trust_bounds must be None or a pair of numbers (lowest, highest); got "
RULE = f"rule must be one of {', '.join(sorted(RULES))}, or a function; got "
NEAR = "rule must be one of lars_array.RULES, or a function; got "
NAN, INF = float("nan"), float("inf")

BIG = ("lr", "momentum", "weight_decay", "trust_coefficient", "eps", "dampening", "rescale_grad", "max_grad_norm")

VALUES: list[tuple[dict[str, Any], str]] = [
    # Flash's own.
    ({"lr": -0.1}, "Invalid learning rate: -0.1"),
    ({"momentum": -0.9}, "Invalid momentum value: -0.9"),
    ({"weight_decay": -1}, "Invalid weight_decay value: -1"),
    ({"nesterov": True, "momentum": 0}, NESTEROV),
    ({"nesterov": True, "dampening": 0.5}, NESTEROV),
    ({"nesterov": True, "dampening": -0.5}, NESTEROV),
    # Which of several comes first is flash's order.
    ({"lr": -1, "momentum": -1, "weight_decay": -1}, "Invalid learning rate: -1"),
    ({"momentum": -1, "weight_decay": -1, "nesterov": True}, "Invalid momentum value: -1"),
    ({"weight_decay": -2, "nesterov": True, "momentum": 0}, "Invalid weight_decay value: -2"),
    # What flash lets through.
    *(({"lr": x}, f"Invalid learning rate: {x}") for x in (NAN, INF, -INF)),
    *(({"momentum": x}, f"Invalid momentum value: {x}") for x in (NAN, INF)),
    *(({"weight_decay": x}, f"Invalid weight_decay value: {x}") for x in (NAN, INF)),
    *(({"dampening": x}, f"dampening must be finite; got {x}") for x in (NAN, INF, -INF)),
    *(({"trust_coefficient": x}, f"trust_coefficient must be finite and at least 0; got {x}") for x in (-1, NAN, INF)),
    *(({"eps": x}, f"eps must be finite and at least 0; got {x}") for x in (-1e-8, NAN, INF)),
    *(({"rescale_grad": x}, f"rescale_grad must be finite and above 0; got {x}") for x in (0, -1.0, NAN, INF)),
    *(({"max_grad_norm": x}, f"max_grad_norm must be above 0, or None; got {x}") for x in (0.0, -1, NAN)),
    *(({"trust_bounds": x}, f"{BOUNDS}{x!r}") for x in ((2.0, 1.0), [-1.0, 1.0], (NAN, 1.0), (0.0, NAN))),
    ({"nonfinite": "ignore"}, "nonfinite must be one of 'raise', 'skip', 'propagate'; got 'ignore'"),
    ({"nonfinite": None}, "nonfinite must be one of 'raise', 'skip', 'propagate'; got None"),
    ({"rule": "larc"}, f"{RULE}'larc'"),
    ({"rule": "larc", "nesterov": True, "dampening": 0.5}, f"{RULE}'larc'"),
    ({"rule": "falsh"}, f"{NEAR}'falsh'; did you mean 'flash'?"),
    ({"rule": "tf_contrib"}, f"{NEAR}'tf_contrib'; did you mean 'tf-contrib'?"),
    *(
        ({name: 10**400}, f"{name} must be at most 1.8e+308; got 100000000000000000...0000000000000000000")
        for name in BIG
    ),
    (
        {"trust_bounds": (0, 10**400)},
        "trust_bounds must be at most 1.8e+308; got (0, 100000000000000000...0000000000000000000)",
    ),
    ({"lr": np.array(-0.5)}, "Invalid learning rate: -0.5"),
    ({"momentum": np.float32(-0.5)}, "Invalid momentum value: -0.5"),
]
NUMBERS = ("lr", "momentum", "dampening", "weight_decay", "trust_coefficient", "eps", "rescale_grad")
BOOLEANS = ("nesterov", "trust_clip", "always_adapt", "adapt", "maximize")
KINDS: list[tuple[dict[str, Any], str]] = [
    *(({n: x}, f"{n} must be a number; got {x!r}") for n in NUMBERS for x in ("0.1", None, True, 1j, [0.1])),
    *(({"max_grad_norm": x}, f"max_grad_norm must be a number; got {x!r}") for x in ("0.1", True, 1j)),
    *(({n: np.ones(1)}, f"{n} must be a number; got array([1.])") for n in NUMBERS),
    *(({n: x}, f"{n} must be True or False; got {x!r}") for n in BOOLEANS for x in (None, 1, 0.0, "no")),
    *(({"trust_bounds": x}, f"{PAIR}{x!r}") for x in (1.0, "ab", (1.0,), (0.0, 1.0, 2.0), ("0", 1.0), (0.0, None))),
    ({"rule": None}, "rule must be a name, a function or a Rule; got None"),
    ({"rule": ["flash"]}, "rule must be a name, a function or a Rule; got ['flash']"),
]
REFUSED = [(options, ValueError, message) for options, message in VALUES]
REFUSED += [(options, TypeError, message) for options, message in KINDS]


@pytest.mark.parametrize(("options", "kind", "message"), REFUSED)
def test_a_hyper_parameter_is_refused_wherever_it_comes_from(
    options: dict[str, Any], kind: type[ValueError | TypeError], message: str
) -> None:
    w, b, g = np.array([[3.0, 4.0]]), np.array([0.6, 0.8]), np.array([[0.3, 0.4]])
    # To the constructor, as a default or in a group.
    assert_refused(lambda: LARS([w], **HYPER | options), kind, message, w)
    in_group = f"{message} (parameter group 1)"
    assert_refused(lambda: LARS([{"params": [w]}, {"params": [b], **options}], **HYPER), kind, in_group, w, b)
    # With a group that is added.
    optimizer = LARS([w], **HYPER)
    optimizer.step([g])
    group = {"params": [b], **options}
    assert_refused(lambda: optimizer.add_param_group(group), kind, in_group, optimizer, w, b)
    # In a group that was changed, when the next step is taken.
    optimizer.add_param_group({"params": [b]})
    optimizer.param_groups[1].update(options)
    assert_refused(lambda: optimizer.step([g, None]), kind, in_group, optimizer, w, g)


@pytest.mark.parametrize(("options", "kind", "message"), REFUSED)
def test_the_functions_refuse_it_too(options: dict[str, Any], kind: type[ValueError | TypeError], message: str) -> None:
    # Arrays of shape () are let through here, since they may be traced; and None is the default policy.
    if any(getattr(value, "shape", None) == () for value in options.values()) or options == {"nonfinite": None}:
        return
    w, g = np.array([[3.0, 4.0]]), np.array([[0.3, 0.4]])
    state = init([w])
    assert_refused(lambda: update([w], [g], state, **HYPER | options), kind, message, w, g, state)
    assert_refused(lambda: lars_step(w, g, None, **HYPER | options), kind, message, w, g)


@pytest.mark.parametrize(
    "options",
    [
        {"lr": 0},
        {"lr": 0.0, "momentum": 0.0, "weight_decay": 0, "eps": 0, "trust_coefficient": 0},
        {"momentum": 1.5},
        {"dampening": -1.0},
        {"dampening": 2.0},
        {"rescale_grad": 1e-30},
        {"max_grad_norm": INF},
        {"trust_bounds": (0, INF)},
        {"trust_bounds": [1.0, 1.0]},
        {"nesterov": True},
        {"nesterov": True, "dampening": 0.5, "rule": "kozistr"},
        {"nesterov": False, "momentum": 0, "dampening": 0.5},
    ],
    ids=str,
)
def test_values_at_the_edge_are_allowed(options: dict[str, Any]) -> None:
    w, g = np.array([[3.0, 4.0]]), np.array([[0.3, 0.4]])
    LARS([w], **HYPER | options).step([g])
    update([w], [g], init([w]), **HYPER | options)
    lars_step(w, g, None, **HYPER | options)
    assert np.all(np.isfinite(w))


@pytest.mark.parametrize(
    ("typo", "way"),
    [
        ("momentun", "did you mean 'momentum'?"),
        ("weightdecay", "did you mean 'weight_decay'?"),
        ("LR", f"known are {KNOWN}"),
        ("kernel", f"known are {KNOWN}"),
        ("name", f"known are {KNOWN}"),
        ("wd", "it is called weight_decay here"),
        *(
            (name, "it is called trust_coefficient here")
            for name in ("trust_coeff", "trust_coef", "eta", "eeta", "tcoef")
        ),
        ("layer_adaptation", "it is called adapt here"),
        ("lars_exclude", "use adapt=False"),
        ("is_skipped", "use adapt=False"),
        ("exclude_from_layer_adaptation", "use param_groups(..., no_adapt=...)"),
        ("weight_decay_filter", "use param_groups(..., no_decay=...)"),
        ("exclude_bias_n_norm", "use param_groups(...), which excludes biases and norms"),
    ],
)
def test_a_typo_among_the_options_is_pointed_out(typo: str, way: str) -> None:
    w, g = np.array([[3.0, 4.0]]), np.array([[0.3, 0.4]])
    message = f"unknown hyper-parameter {typo!r}; {way}"
    assert unknown_option(typo) == message
    assert_refused(lambda: LARS([{"params": [w], typo: 0.9}], **HYPER), ValueError, message, w)
    optimizer = LARS([w], **HYPER)
    in_group = f"{message} (parameter group 1)"
    assert_refused(lambda: optimizer.add_param_group({"params": [g], typo: 0.9}), ValueError, in_group, optimizer)
    optimizer.param_groups[0][typo] = 0.9
    assert_refused(lambda: optimizer.step([g]), ValueError, message, optimizer, w)
    assert_refused(lambda: update([w], [g], init([w]), **HYPER, **{typo: 0.9}), ValueError, message, w)
    assert_refused(lambda: lars_step(w, g, None, **HYPER, **{typo: 0.9}), ValueError, message, w)
    if typo != "kernel":
        with pytest.raises(TypeError) as refused:
            LARS([w], **HYPER, **{typo: 0.9})
        assert str(refused.value).startswith(message.partition("; known are")[0])


def test_what_others_call_an_option_is_none_of_ours() -> None:
    assert set(ALIASES.values()) <= {"lr", *DEFAULTS}
    assert not set(ALIASES) & {"lr", *DEFAULTS}


def test_options_are_not_attributes() -> None:
    optimizer = LARS([np.ones(2)], **HYPER)
    for name in ("lr", *DEFAULTS):
        with pytest.raises(AttributeError, match=rf"belong to the parameter groups; set {name} by `for group in "):
            setattr(optimizer, name, 0.2)
    optimizer.note = "others are"
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_names_in_a_group_are_not_ignored_in_silence() -> None:
    # They stand in the groups that optimizers show, so a user may well give them.
    w, b = np.array([[3.0, 4.0]]), np.array([0.6, 0.8])
    try:
        optimizer = LARS([{"params": [w, b], "names": ["w", "b"]}], **HYPER)
    except (ValueError, TypeError):
        return
    assert optimizer.param_groups[0]["names"] == ["w", "b"]


def test_a_group_that_has_lost_its_learning_rate() -> None:
    w = np.array([[3.0, 4.0]])
    optimizer = LARS([w], **HYPER)
    del optimizer.param_groups[0]["lr"]
    with pytest.raises((ValueError, TypeError), match="lr"):
        optimizer.step([np.array([[0.3, 0.4]])])


def test_update_needs_a_learning_rate() -> None:
    w = np.array([[3.0, 4.0]])
    state = init([w])
    assert_refused(lambda: update([w], [w], state), TypeError, "update needs lr", w, state)


def test_update_is_content_if_each_group_has_a_learning_rate_as_the_optimizer_is() -> None:
    w = np.array([[3.0, 4.0]])
    groups = [{"params": [w], "lr": 0.5}]
    new, _ = update(groups, [w], init(groups))
    assert_close(new[0]["params"][0], w / 2)


def test_kernels_by_name() -> None:
    w = np.array([[3.0, 4.0]])
    message = "kernel must be one of compiled, blocked, cuda, portable; got "
    assert_refused(lambda: LARS([w], lr=0.5, kernel="fast"), ValueError, f"{message}'fast'", w)
    strict = pytest.importorskip("array_api_strict").ones(2)
    message = "kernel 'blocked' can't be used here: it takes NumPy arrays only, not Array"
    assert_refused(lambda: LARS([strict], lr=0.5, kernel="blocked"), ValueError, message)
    optimizer = LARS([w], lr=0.5, kernel="blocked")
    with pytest.raises((ValueError, TypeError)):
        optimizer.add_param_group({"params": [strict]})
    optimizer.step([w.copy()])
