"""State that does not fit is refused, and nothing is changed by it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from assertions import assert_refused, assert_same

from lars_array import LARS, State, init, update

HYPER: dict[str, Any] = {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.1}


def parameters() -> dict[str, Any]:
    return {"w": np.array([[3.0, 4.0]]), "b": np.array([0.6, 0.8])}


def gradients() -> dict[str, Any]:
    return {"w": np.array([[0.3, 0.4]]), "b": np.array([0.05, -0.12])}


def trained(params: Any, **options: Any) -> LARS:
    optimizer = LARS(params, **HYPER | options)
    optimizer.step(gradients())
    return optimizer


def spoiled(where: list[Any], value: Any = ...) -> dict[str, Any]:
    """Return a state dict with another value at `where`, or with none."""
    state = place = trained(parameters()).state_dict()
    for key in where[:-1]:
        place = place[key]
    if value is ...:
        del place[where[-1]]
    else:
        place[where[-1]] = value
    return state


def assert_does_not_load(state: Any, kind: type[Exception], message: str) -> None:
    params = parameters()
    optimizer = trained(params, momentum=0.5)
    assert_refused(lambda: optimizer.load_state_dict(state), kind, message, optimizer, *params.values())
    optimizer.step(gradients())


KEYS = "['steps', 'skipped_steps', 'param_groups', 'state']"
NAMES = "state_dict must be of parameters named [['w', 'b']], by group; got "
BUFFER = ["state", "w", "momentum_buffer"]
GROUP = ["param_groups", 0]


@pytest.mark.parametrize("key", ["steps", "skipped_steps", "param_groups", "state"])
def test_a_key_is_missing(key: str) -> None:
    state = spoiled([key])
    assert_does_not_load(state, ValueError, f"state_dict must hold the key {key!r}; got {list(state)!r}")


def test_of_several_missing_keys_one_is_named() -> None:
    assert_does_not_load({}, ValueError, "state_dict must hold the key 'param_groups'; got []")


def test_it_is_of_other_parameters() -> None:
    params = parameters()
    for others, names in [
        ({"w": params["w"]}, [["w"]]),
        ({"b": params["b"], "w": params["w"]}, [["b", "w"]]),
        (list(params.values()), [["0", "1"]]),
        ([{"params": {"w": params["w"]}}, {"params": {"b": params["b"]}}], [["w"], ["b"]]),
        (params | {"c": np.ones(2)}, [["w", "b", "c"]]),
    ]:
        assert_does_not_load(LARS(others, **HYPER).state_dict(), ValueError, f"{NAMES}{names!r}")
    assert_does_not_load(spoiled(["param_groups"], []), ValueError, f"{NAMES}[]")


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"lr": -1.0}, ValueError, "Invalid learning rate: -1.0"),
        ({"lr": "fast"}, TypeError, "lr must be a number; got 'fast'"),
        ({"momentum": -1}, ValueError, "Invalid momentum value: -1"),
        ({"eps": float("nan")}, ValueError, "eps must be finite and at least 0; got nan"),
        ({"nesterov": True, "momentum": 0}, ValueError, "Nesterov momentum requires a momentum and zero dampening"),
        ({"nonfinite": "ignore"}, ValueError, "nonfinite must be one of 'raise', 'skip', 'propagate'; got 'ignore'"),
        pytest.param({"lr": lambda step: 0.0 - step}, ValueError, "Invalid learning rate: -1.0", id="a schedule"),
    ],
    ids=str,
)
def test_an_option_is_not_allowed(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    state = trained(parameters()).state_dict()
    state["param_groups"][0].update(options)
    assert_does_not_load(state, kind, message)


def test_an_option_is_unknown() -> None:
    message = "unknown hyper-parameter 'momentun'; did you mean 'momentum'?"
    assert_does_not_load(spoiled([*GROUP, "momentun"], 0.9), ValueError, message)


def test_a_later_group_is_checked_as_well_before_anything_is_taken_over() -> None:
    params = parameters()

    def make() -> LARS:
        optimizer = LARS([{"params": {name: p}} for name, p in params.items()], **HYPER)
        optimizer.step(gradients())
        return optimizer

    state = make().state_dict()
    state["param_groups"][0]["lr"] = 0.25
    optimizer = make()
    state["param_groups"][1]["lr"] = -0.5
    message = "Invalid learning rate: -0.5 (parameter group 1 of state_dict)"
    assert_refused(lambda: optimizer.load_state_dict(state), ValueError, message, optimizer)
    state["param_groups"][1]["lr"] = 0.125
    optimizer.load_state_dict(state)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.125]


@pytest.mark.parametrize("buffer", [np.ones((2, 1)), np.ones(2), np.ones((1, 2, 1)), np.array(1.0)], ids=np.shape)
def test_a_buffer_has_another_shape(buffer: Any) -> None:
    with pytest.raises(ValueError, match="momentum buffer of 'w' must") as caught:
        trained(parameters()).load_state_dict(spoiled(BUFFER, buffer))
    assert_does_not_load(spoiled(BUFFER, buffer), ValueError, str(caught.value))


@pytest.mark.parametrize("kind", [np.float32, np.float16, np.complex128, np.int64, object])
def test_a_buffer_has_another_dtype(kind: Any) -> None:
    buffer = np.ones((1, 2), dtype=kind)
    with pytest.raises((ValueError, TypeError), match="momentum buffer of 'w' must") as caught:
        trained(parameters()).load_state_dict(spoiled(BUFFER, buffer))
    assert_does_not_load(spoiled(BUFFER, buffer), caught.type, str(caught.value))


def test_a_buffer_of_half_precision_is_wanted_in_single() -> None:
    p = {"w": np.ones((1, 2), dtype=np.float16)}
    optimizer = LARS(p, **HYPER)
    optimizer.step([np.ones((1, 2), dtype=np.float16)])
    state = optimizer.state_dict()
    assert state["state"]["w"]["momentum_buffer"].dtype == np.float32
    optimizer.load_state_dict(state)
    state["state"]["w"]["momentum_buffer"] = np.ones((1, 2), dtype=np.float16)
    with pytest.raises((ValueError, TypeError), match="momentum buffer of 'w' must"):
        optimizer.load_state_dict(state)


def test_a_buffer_is_no_array_or_one_of_another_library(xp: Any) -> None:
    with pytest.raises(TypeError, match="momentum buffer of 'w' must be an array"):
        trained(parameters()).load_state_dict(spoiled(BUFFER, [[1.0, 2.0]]))
    if xp is np:
        return
    state = spoiled(BUFFER, xp.ones((1, 2), dtype=xp.float64))
    with pytest.raises(TypeError, match="momentum buffer of 'w' must be an array of") as caught:
        trained(parameters()).load_state_dict(state)
    assert_does_not_load(state, TypeError, str(caught.value))


@pytest.mark.parametrize(
    "state",
    [
        pytest.param(lambda: None, id="None"),
        pytest.param(lambda: [], id="no mapping"),
        pytest.param(lambda: spoiled(["state"], None), id="state is None"),
        pytest.param(lambda: spoiled(["param_groups"], None), id="param_groups is None"),
        pytest.param(lambda: spoiled(["state", "w"], None), id="state of w is None"),
        pytest.param(lambda: spoiled(["state", "w"]), id="no state of w"),
        pytest.param(lambda: spoiled(["state", "c"], {"previous_lr": 0.0}), id="state of an unknown parameter"),
        pytest.param(lambda: spoiled(["state", "w", "momentum_bufer"], np.ones((1, 2))), id="a typo in the state"),
        pytest.param(lambda: spoiled(["state", "w", "previous_lr"]), id="no previous_lr"),
        pytest.param(lambda: spoiled(["state", "w", "previous_lr"], float("nan")), id="previous_lr is nan"),
        pytest.param(lambda: spoiled(["state", "w", "previous_lr"], -1.0), id="previous_lr is negative"),
        pytest.param(lambda: spoiled(["state", "w", "previous_lr"], "0.5"), id="previous_lr is a string"),
        pytest.param(lambda: spoiled([*GROUP, "lr"]), id="no lr"),
        pytest.param(lambda: spoiled([*GROUP, "names"]), id="no names"),
        pytest.param(lambda: spoiled([*GROUP, "momentum"]), id="no momentum"),
        pytest.param(lambda: spoiled(GROUP, None), id="a group is None"),
        pytest.param(lambda: spoiled(["steps"], None), id="steps is None"),
        pytest.param(lambda: spoiled(["steps"], "3"), id="steps is a string"),
        pytest.param(lambda: spoiled(["steps"], -1), id="steps is negative"),
        pytest.param(lambda: spoiled(["steps"], 1.5), id="steps is no integer"),
        pytest.param(lambda: spoiled(["skipped_steps"], -1), id="skipped_steps is negative"),
        pytest.param(lambda: spoiled(["skipped_steps"], "many"), id="skipped_steps is a string"),
    ],
)
def test_it_is_no_state_dict_of_ours(state: Callable[[], Any]) -> None:
    """Which message it is matters less than that it is a ValueError or TypeError that says where."""
    params = parameters()
    optimizer = trained(params)
    with pytest.raises((ValueError, TypeError)) as caught:
        optimizer.load_state_dict(state())
    assert caught.type in (ValueError, TypeError)
    assert_does_not_load(state(), caught.type, str(caught.value))


def test_a_functional_state_that_does_not_fit() -> None:
    params, grads = parameters(), gradients()
    state = init(params)

    def step(state: Any) -> Any:
        return lambda: update(params, grads, state, **HYPER)

    must = "state must be what init or update returned; got "
    watched = [*params.values(), *grads.values()]
    assert_refused(step(None), TypeError, f"{must}NoneType", *watched)
    assert_refused(step(tuple(state)), TypeError, f"{must}tuple", *watched)
    names = "state must be of parameters named ['w', 'b']; got "
    assert_refused(step(init([params["w"], params["b"]])), ValueError, f"{names}['0', '1']", *watched)
    buffers = state.momentum_buffers | {"w": np.zeros((2, 2))}
    with pytest.raises(ValueError, match="momentum buffer of 'w' must"):
        step(state._replace(momentum_buffers=buffers))()
    assert isinstance(state, State)


def test_a_functional_state_is_not_modified() -> None:
    params, grads = parameters(), gradients()
    state = init(params)
    params, state = update(params, grads, state, **HYPER)
    before = parameters(), gradients(), init(parameters())
    update(*before, **HYPER)
    assert_same(before, (parameters(), gradients(), init(parameters())))


def test_of_many_parameters_in_another_order_the_first_is_named() -> None:
    names = [f"blocks.{i}.mixer.weight" for i in range(40)]
    here, there = ({name: np.ones(2) for name in order} for order in (names, [*names[:30], *names[:29:-1]]))
    state = LARS(there, **HYPER).state_dict()
    with pytest.raises(ValueError, match=r": 'blocks\.39\.mixer\.weight', not 'blocks\.30\.mixer\.weight'$"):
        LARS(here, **HYPER).load_state_dict(state)


def test_several_misfits_are_a_type_error_only_if_all_are_of_types() -> None:
    wrong = spoiled(["state", "w", "momentum_buffer"], "w")
    wrong["state"]["b"]["momentum_buffer"] = "b"
    of_w = "2 misfits: the momentum buffer of 'w' must be an array of numpy; got str; the momentum buffer of 'b' must"
    assert_does_not_load(wrong, TypeError, f"{of_w} be an array of numpy; got str")
    wrong["state"]["b"]["momentum_buffer"] = np.ones(3)
    assert_does_not_load(wrong, ValueError, f"{of_w} have the parameter's shape (2,); got (3,)")
