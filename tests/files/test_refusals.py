"""What can't be saved is refused before anything is written, and what does not fit before anything is changed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from assertions import assert_refused, fingerprint

import lars_array
from lars_array import LARS, init, load, save
from lars_array.core import RULES

HYPER: dict[str, Any] = {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.1}


def parameters() -> dict[str, Any]:
    return {"w": np.array([3.0, 4.0]), "b": np.ones(3, np.float32)}


def trained(params: dict[str, Any], **options: Any) -> LARS:
    optimizer = LARS(params, **HYPER | options)
    optimizer.step({name: np.ones_like(p) for name, p in params.items()})
    return optimizer


def assert_not_saved(folder: Path, kind: type[Exception], message: str, *arguments: Any, **options: Any) -> None:
    """It is refused with this message, and the folder is as it was."""
    path = folder / "run"
    path.write_bytes(b"as it was")
    with pytest.raises(kind) as caught:
        save(path, *arguments, **options)
    assert caught.type is kind, f"{caught.type} is not {kind}"
    assert str(caught.value) == message, f"it says {caught.value}"
    assert {x.name: x.read_bytes() for x in folder.iterdir()} == {"run": b"as it was"}


def rate(step: int) -> float:
    return 0.1


class Rate:
    def __call__(self, step: int) -> float:
        return 0.1

    def __repr__(self) -> str:
        return "Rate()"


ONE = LARS([np.ones(1)], 1.0)
WAY = "leave it out by omit=({!r},) and give it to the optimizer that loads the file"


@pytest.mark.parametrize("option", ["lr", "momentum", "weight_decay", "max_grad_norm"])
def test_a_schedule_that_is_code(tmp_path: Path, option: str) -> None:
    optimizer = LARS([{"params": {"v": np.ones(1)}}, {"params": parameters(), option: Rate()}], **HYPER)
    message = f"{option} of parameter group 1 must be data to be saved; got Rate(): use a schedule of "
    message += "lars_array.schedules, or " + WAY.format(option)
    assert_not_saved(tmp_path, TypeError, message, optimizer)


@pytest.mark.parametrize(
    "schedule", [rate, partial(rate), lambda step: 0.1, rate.__call__], ids=["def", "partial", "lambda", "method"]
)
def test_functions_of_other_kinds_are_refused_as_well(tmp_path: Path, schedule: Any) -> None:
    with pytest.raises(TypeError, match=r"lr of parameter group 0 must be data to be saved; got "):
        save(tmp_path / "run", LARS(parameters(), lr=schedule))
    assert list(tmp_path.iterdir()) == []


def test_a_rule_that_is_code(tmp_path: Path) -> None:
    class Mine:
        def __call__(self, S: Any, hyper: Any, xp: Any) -> Any:
            return RULES["flash"].function(S, hyper, xp)

        def __repr__(self) -> str:
            return "Mine()"

    optimizer = trained(parameters(), rule=Mine())
    message = "rule of parameter group 0 must be data to be saved; got Mine(): register it under a name with "
    message += "lars_array.register, or " + WAY.format("rule")
    assert_not_saved(tmp_path, TypeError, message, optimizer)
    save(tmp_path / "run", optimizer, omit=["rule"])
    resumed = LARS(parameters(), lr=1.0, rule=optimizer.param_groups[0]["rule"])
    load(tmp_path / "run", resumed)
    assert resumed.param_groups[0]["rule"] is optimizer.param_groups[0]["rule"]


def test_a_name_of_a_rule_that_is_not_registered_where_it_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(RULES, "mine", RULES["flash"])
        save(tmp_path / "run", trained(parameters(), rule="mine"))
    params = parameters()
    optimizer = trained(params)
    before = fingerprint([optimizer, params])
    with pytest.raises(ValueError, match=r"rule must be one of .*; got 'mine'.*run"):
        load(tmp_path / "run", optimizer)
    assert fingerprint([optimizer, params]) == before


@pytest.mark.parametrize(
    ("arguments", "options", "kind", "message"),
    [
        ((None,), {}, TypeError, "optimizer_or_state must be a LARS, a State or a state dict of these; got None"),
        (
            ({"state": {}},),
            {},
            TypeError,
            "optimizer_or_state must be a LARS, a State or a state dict of these; got {'state': {}}",
        ),
        ((ONE,), {"omit": "lr"}, TypeError, "omit must be a collection of names, such as ('lr',); got 'lr'"),
        ((ONE,), {"omit": ["lt"]}, ValueError, "omit must name hyper-parameters; got 'lt'"),
        ((ONE,), {"params": {"w": [1.0]}}, TypeError, "parameter 'w' must be an array; got [1.0]"),
        ((ONE,), {"params": {1: np.ones(1)}}, TypeError, "params must be by name; got 1"),
        ((ONE,), {"metadata": [1]}, TypeError, "metadata must be a mapping with names as keys; got [1]"),
        (
            (ONE,),
            {"metadata": {"x": {1}}},
            TypeError,
            "metadata must hold None, numbers, strings, and lists, tuples and dicts of these; got {1}. Arrays can be "
            "saved among params",
        ),
        (
            (ONE,),
            {"params": {"\ud800": np.ones(1)}},
            ValueError,
            "names must be text that UTF-8 can encode; got 'param/\\ud800'",
        ),
    ],
    ids=lambda x: x[:40] if isinstance(x, str) else type(x).__name__,
)  # fmt: skip
def test_what_can_t_be_saved(tmp_path: Path, arguments: Any, options: Any, kind: type[Exception], message: str) -> None:
    assert_not_saved(tmp_path, kind, message, *arguments, **options)


@pytest.mark.parametrize("dtype", ["O", "U3", "M8[s]", np.longdouble], ids=str)
def test_arrays_of_other_types(tmp_path: Path, dtype: Any) -> None:
    with pytest.raises(TypeError, match=r"'param/x' must be of one of the types float64, .*; got "):
        save(tmp_path / "run", trained(parameters()), params={"x": np.zeros(1, dtype)})
    assert list(tmp_path.iterdir()) == []


def test_all_reduce_is_not_saved(tmp_path: Path) -> None:
    optimizer = LARS(parameters(), **HYPER, all_reduce=lambda table: None)
    optimizer.step({name: np.ones_like(p) for name, p in parameters().items()})
    save(tmp_path / "run", optimizer)
    assert "all_reduce" not in load(tmp_path / "run").state["param_groups"][0]
    resumed = LARS(parameters(), lr=1.0, all_reduce=lambda table: None)  # each process loads its own pieces
    load(tmp_path / "run", resumed)
    assert fingerprint(resumed.state_dict()) == fingerprint(optimizer.state_dict())


# ------------------------------------------------------------------------------------------------------------- loading


def saved(folder: Path, **options: Any) -> Path:
    params = parameters()
    save(folder / "run", trained(params, **options), params=params)
    return folder / "run"


def misfits(make: Callable[[], dict[str, Any]], path: Path, message: str) -> None:
    """Loading is refused with the message, and neither the optimizer nor parameters are changed."""
    params = make()
    optimizer = trained(params, momentum=0.25)
    call = partial(load, path, optimizer, params=params)
    assert_refused(call, ValueError, f"{message} (file {str(path)!r})", optimizer, params)
    optimizer.step({name: np.ones_like(p) for name, p in params.items()})


def test_a_parameter_is_missing_or_new(tmp_path: Path) -> None:
    path = saved(tmp_path)
    start = "state_dict must be of parameters named "
    misfits(
        lambda: {"w": np.ones(2)},
        path,
        f"2 misfits: {start}[['w']], by group; got [['w', 'b']]; it holds, beside those given, the parameters 'b'",
    )
    misfits(
        lambda: parameters() | {"c": np.ones(1)},
        path,
        f"2 misfits: {start}[['w', 'b', 'c']], by group; got [['w', 'b']]; it lacks the parameters 'c'",
    )


def test_all_misfits_are_in_one_message(tmp_path: Path) -> None:
    misfits(
        lambda: {"w": np.ones(3), "b": np.ones(3), "x": np.ones(1)},
        saved(tmp_path),
        "6 misfits: state_dict must be of parameters named [['w', 'b', 'x']], by group; got [['w', 'b']]; the momentum "
        "buffer of 'w' must have the parameter's shape (3,); got (2,); the momentum buffer of 'b' must have dtype "
        "dtype('float64'); got dtype('float32'); and 3 more",
    )


def test_of_many_misfits_the_message_is_short_and_names_the_first(tmp_path: Path) -> None:
    params = {f"layer{i}/weight": np.ones(2) for i in range(500)}
    save(tmp_path / "run", trained(params), params=params)
    others = {f"layer{i}/weight": np.ones(3) for i in range(250)} | {f"new{i}": np.ones(2) for i in range(250)}
    with pytest.raises(ValueError, match=r"unknown 'layer250/weight'.*; and [0-9]+ more") as caught:
        load(tmp_path / "run", LARS(others, lr=1.0), params=others)
    assert "no 'new0', 'new1'" in str(caught.value)
    assert len(str(caught.value)) <= 500


def test_load_state_dict_lists_all_misfits_as_well() -> None:
    state = trained(parameters()).state_dict()
    optimizer = LARS({"w": np.ones(3), "b": np.ones((1, 3), np.float32)}, lr=1.0)
    state["param_groups"][0]["lr"] = -1.0
    message = (
        "3 misfits: Invalid learning rate: -1.0; the momentum buffer of 'w' must have the parameter's shape (3,); got "
        "(2,); the momentum buffer of 'b' must have the parameter's shape (1, 3); got (3,)"
    )
    assert_refused(lambda: optimizer.load_state_dict(state), ValueError, message, optimizer)
    state["state"].clear()
    message = "2 misfits: Invalid learning rate: -1.0; state of state_dict must hold the keys 'b', 'w'; got []"
    assert_refused(lambda: optimizer.load_state_dict(state), ValueError, message, optimizer)


def test_options_that_differ_within_a_group(tmp_path: Path) -> None:
    params = parameters()
    groups = [{"params": {name: p}, "lr": 0.1 * (1 + i)} for i, (name, p) in enumerate(params.items())]
    save(tmp_path / "run", LARS(groups, **HYPER), params=params)
    misfits(
        parameters,
        tmp_path / "run",
        "state_dict must have the same options for 'w' and 'b', which are in one parameter group here",
    )


def test_parameters_are_wanted_that_the_file_has_not(tmp_path: Path) -> None:
    save(tmp_path / "run", trained(parameters()))
    misfits(parameters, tmp_path / "run", "it holds no parameters: give params to save as well")


def test_parameters_that_can_t_be_written_to(tmp_path: Path) -> None:
    path, params = saved(tmp_path), parameters()
    params["b"].flags.writeable = False
    before = fingerprint(params)
    with pytest.raises(ValueError, match="'b' must be writable"):
        load(path, params=params)
    assert fingerprint(params) == before
    with pytest.raises(ValueError, match="parameter 'b' must be an array; got None"):
        load(path, params={"w": np.zeros(2), "b": None})


def test_the_state_of_pure_functions_is_none_of_an_optimizer(tmp_path: Path) -> None:
    save(tmp_path / "run", init(parameters()), params=parameters())
    misfits(parameters, tmp_path / "run", "it holds the state of lars_array.update, which LARS can't take over")


def test_an_optimizer_of_another_library(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"must be a lars_array.LARS; got an object of builtins.str; lars_torch"):
        load(saved(tmp_path), "optimizer")


def test_without_safetensors_the_error_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "safetensors", None)
    with pytest.raises(ImportError, match="safetensors"):
        load(path)
    assert lars_array.Saved is not None
