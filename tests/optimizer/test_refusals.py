"""A call that is refused has changed nothing, whatever it is refused for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from references import assert_same_bits

from lars_array import LARS

Call = Callable[[LARS, dict[str, Any], dict[str, Any]], Any]


def ready(kernel: str, options: dict[str, Any] | None = None) -> tuple[LARS, dict[str, Any], dict[str, Any]]:
    """Return an optimizer of two groups that has taken a step, its parameters, and gradients for the next."""
    rng = np.random.default_rng(1)
    params = {"a": rng.standard_normal((3, 4)), "b": rng.standard_normal(5), "c": rng.standard_normal((2, 2))}
    groups = [
        {"params": {"a": params["a"], "b": params["b"]}},
        {"params": {"c": params["c"]}, "rule": "barlow", "lr": 0.2},
    ]
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1} | (options or {})
    optimizer = LARS(groups, **options, kernel=kernel)
    optimizer.step({name: rng.standard_normal(p.shape) for name, p in params.items()})
    return optimizer, params, {name: rng.standard_normal(p.shape) for name, p in params.items()}


def copied(x: Any) -> Any:
    """Return a copy that shares no array, but keeps the functions that rules are."""
    if isinstance(x, dict):
        return {key: copied(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return type(x)(copied(value) for value in x)
    return x.copy() if isinstance(x, np.ndarray) else x


def assert_same_tree(ours: Any, theirs: Any, what: str) -> None:
    assert type(ours) is type(theirs), what
    if isinstance(theirs, dict):
        assert list(ours) == list(theirs), what
        for key, value in theirs.items():
            assert_same_tree(ours[key], value, f"{what}[{key!r}]")
    elif isinstance(theirs, (list, tuple)):
        assert len(ours) == len(theirs), what
        for a, b in zip(ours, theirs, strict=True):
            assert_same_tree(a, b, what)
    elif isinstance(theirs, np.ndarray):
        assert_same_bits(ours, theirs, what)
    else:
        assert ours is theirs or ours == theirs, f"{what}: {ours!r}, not {theirs!r}"


def seen(optimizer: LARS) -> dict[str, Any]:
    """Return all that a caller can see of an optimizer."""
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    figures = {name: tuple(norms) for name, norms in optimizer.norms().items()}
    return copied(optimizer.state_dict()) | {"norms": figures, "ratios": optimizer.trust_ratios(), "sizes": sizes}


def assert_changes_nothing(
    call: Call, kernel: str, error: type[Exception], options: dict[str, Any] | None = None
) -> None:
    optimizer, params, grads = ready(kernel, options)
    before = copied([params, grads]), seen(optimizer)
    with pytest.raises(error):
        call(optimizer, params, grads)
    assert_same_tree([params, grads], before[0], "arrays")
    assert_same_tree(seen(optimizer), before[1], "optimizer")
    # And it goes on as one that never heard of it.
    other, others, same = ready(kernel, options)
    for group, its in zip(optimizer.param_groups, other.param_groups, strict=True):
        its.update({key: group[key] for key in group if key not in ("params", "names")})
        for each in (group, its):
            each.update(lr=0.1, momentum=0.9, weight_decay=0.1, rule="flash", max_grad_norm=None, trust_bounds=None)
    optimizer.step(grads)
    other.step(same)
    assert_same_tree(params, others, "after the next step")


def changed(grads: dict[str, Any], **others: Any) -> dict[str, Any]:
    return grads | others


def spoil(x: Any, value: float) -> Any:
    x = x.copy()
    x.reshape(-1)[-1] = value
    return x


def failing(*_: Any) -> Any:
    raise ArithmeticError("from the caller's own function")


GRADIENTS: dict[str, tuple[Callable[[dict[str, Any], dict[str, Any]], Any], type[Exception]]] = {
    "none at all": (lambda params, grads: None, TypeError),
    "a function": (lambda params, grads: lambda: (0.0, grads), TypeError),
    "an unknown name": (lambda params, grads: changed(grads, d=np.ones(2)), ValueError),
    "a missing name": (lambda params, grads: {"a": grads["a"], "b": grads["b"]}, ValueError),
    "a name twice": (lambda params, grads: [*grads.items(), ("a", grads["a"])], ValueError),
    "too few": (lambda params, grads: list(grads.values())[:2], ValueError),
    "too many": (lambda params, grads: [*grads.values(), np.ones(2)], ValueError),
    "one array": (lambda params, grads: grads["a"], TypeError),
    "a string": (lambda params, grads: "abc", TypeError),
    "a number": (lambda params, grads: 1.0, TypeError),
    "another shape": (lambda params, grads: changed(grads, c=np.ones((2, 3))), ValueError),
    "a shape that broadcasts": (lambda params, grads: changed(grads, c=np.ones((1, 2))), ValueError),
    "a shape of the same size": (lambda params, grads: changed(grads, c=np.ones(4)), ValueError),
    "complex": (lambda params, grads: changed(grads, c=grads["c"].astype("c16")), TypeError),
    "integers": (lambda params, grads: changed(grads, c=np.ones((2, 2), int)), TypeError),
    "a list": (lambda params, grads: changed(grads, c=grads["c"].tolist()), TypeError),
    "nan": (lambda params, grads: changed(grads, c=spoil(grads["c"], np.nan)), ValueError),
    "inf": (lambda params, grads: changed(grads, a=spoil(grads["a"], np.inf)), ValueError),
    "squares that overflow": (lambda params, grads: changed(grads, b=spoil(grads["b"], 1e200)), ValueError),
    "the parameter itself": (lambda params, grads: changed(grads, c=params["c"]), ValueError),
    "another parameter": (lambda params, grads: changed(grads, c=params["a"][:2, 1:3]), ValueError),
    "a view of a parameter": (lambda params, grads: changed(grads, c=params["c"].T), ValueError),
    "an iterator that fails": (
        lambda params, grads: (failing() if i == 2 else g for i, g in enumerate(grads)),
        ArithmeticError,
    ),
}


@pytest.mark.parametrize("kernel", ["blocked", "portable"])
@pytest.mark.parametrize("kind", GRADIENTS)
def test_gradients_that_do_not_fit(kind: str, kernel: str) -> None:
    make, error = GRADIENTS[kind]
    assert_changes_nothing(lambda optimizer, params, grads: optimizer.step(make(params, grads)), kernel, error)


def wrong_shape(S: Any, hyper: Any, xp: Any) -> Any:
    return xp.zeros((S.shape[0] + 1, 6))


def infinite(S: Any, hyper: Any, xp: Any) -> Any:
    return xp.full((S.shape[0], 6), xp.inf)


def greedy(S: Any, hyper: Any, xp: Any) -> Any:
    """A rule that writes to what it is given before it fails."""
    S[...] = 0
    hyper.lr[...] = 0
    raise ArithmeticError("a rule that fails")


OPTIONS: dict[str, tuple[dict[str, Any], type[Exception]]] = {
    "negative lr": ({"lr": -0.1}, ValueError),
    "nan as lr": ({"lr": np.nan}, ValueError),
    "infinite lr": ({"lr": np.inf}, ValueError),
    "lr of no number": ({"lr": "0.1"}, TypeError),
    "lr an array": ({"lr": np.ones(2)}, TypeError),
    "a schedule that fails": ({"lr": failing}, ArithmeticError),
    "a schedule that goes negative": ({"lr": lambda step: -0.1}, ValueError),
    "a schedule that goes negative in an array": ({"lr": lambda step: np.array(-0.1)}, ValueError),
    "a schedule that returns nothing": ({"lr": lambda step: None}, TypeError),
    "negative momentum": ({"momentum": -0.1}, ValueError),
    "negative decay": ({"weight_decay": -1}, ValueError),
    "a rule by an unknown name": ({"rule": "adam"}, ValueError),
    "no rule": ({"rule": None}, TypeError),
    "a rule of a wrong shape": ({"rule": wrong_shape}, ValueError),
    "a rule that raises": ({"rule": failing}, ArithmeticError),
    "a rule that writes and raises": ({"rule": greedy}, ArithmeticError),
    "a rule that returns nothing": ({"rule": lambda S, hyper, xp: None}, Exception),
    "a rule that is not finite": ({"rule": infinite}, ValueError),
    "clipping at zero": ({"max_grad_norm": 0.0}, ValueError),
    "clipping at nan": ({"max_grad_norm": np.nan}, ValueError),
    "bounds in the wrong order": ({"trust_bounds": (2.0, 1.0)}, ValueError),
}


@pytest.mark.parametrize("kernel", ["blocked", "portable"])
@pytest.mark.parametrize("group", [0, 1])
@pytest.mark.parametrize("kind", OPTIONS)
def test_hyper_parameters_that_became_wrong(kind: str, group: int, kernel: str) -> None:
    options, error = OPTIONS[kind]

    def call(optimizer: LARS, params: Any, grads: Any) -> None:
        kept = dict(optimizer.param_groups[group])
        optimizer.param_groups[group].update(options)
        try:
            optimizer.step(grads)
        finally:
            optimizer.param_groups[group].update(kept)

    assert_changes_nothing(call, kernel, error)


CLOSURES: dict[str, tuple[Any, type[Exception]]] = {
    "raises": (failing, ArithmeticError),
    "returns nothing": (lambda: None, TypeError),
    "returns a loss only": (lambda: 1.0, TypeError),
    "returns too much": (lambda: (1.0, [], {}), TypeError),
    "returns no gradients": (lambda: (1.0, None), TypeError),
    "returns others' gradients": (lambda: (1.0, {"z": np.ones(2)}), ValueError),
    "returns an array of two": (lambda: np.ones(2), TypeError),
    "is no function": (3, TypeError),
}


@pytest.mark.parametrize("kind", CLOSURES)
def test_closures_that_fail(kind: str) -> None:
    closure, error = CLOSURES[kind]
    assert_changes_nothing(lambda optimizer, params, grads: optimizer.step(closure=closure), "blocked", error)


def test_gradients_beside_a_closure() -> None:
    assert_changes_nothing(
        lambda optimizer, params, grads: optimizer.step(grads, closure=lambda: (0, grads)), "blocked", TypeError
    )


ADDED: dict[str, tuple[Callable[[dict[str, Any]], Any], type[Exception]]] = {
    "no group": (lambda params: [np.ones(2)], TypeError),
    "without parameters": (lambda params: {"lr": 0.1}, ValueError),
    "empty": (lambda params: {"params": []}, ValueError),
    "a name that is taken": (lambda params: {"params": {"a": np.ones(2)}}, ValueError),
    "a parameter that is there": (lambda params: {"params": {"d": params["a"]}}, ValueError),
    "a view of one": (lambda params: {"params": {"d": params["a"][1:]}}, ValueError),
    "two that overlap": (lambda params: {"params": [x := np.ones(4), x[1:]]}, ValueError),
    "one that overlaps itself": (
        lambda params: {"params": [np.lib.stride_tricks.sliding_window_view(np.ones(4), 2, writeable=True)]},
        ValueError,
    ),
    "read-only": (lambda params: {"params": [np.broadcast_to(1.0, 3)]}, ValueError),
    "integers": (lambda params: {"params": [np.ones(2, int)]}, TypeError),
    "masked": (lambda params: {"params": [np.ma.ones(2)]}, TypeError),
    "an unknown option": (lambda params: {"params": [np.ones(2)], "betas": 1}, ValueError),
    "a bad option": (lambda params: {"params": [np.ones(2)], "momentum": 2j}, TypeError),
    "the second one bad": (lambda params: {"params": [np.ones(2), None]}, TypeError),
}


@pytest.mark.parametrize("kind", ADDED)
def test_groups_that_cannot_be_added(kind: str) -> None:
    make, error = ADDED[kind]
    assert_changes_nothing(lambda optimizer, params, grads: optimizer.add_param_group(make(params)), "blocked", error)
