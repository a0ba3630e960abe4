"""What was saved comes back bit for bit: arrays of every kind, names, and hyper-parameters of every type."""

from __future__ import annotations

import pickle
from math import inf, nan
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from assertions import assert_same
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import any_options, layers_of, seeds

import lars_array
from lars_array import LARS, State, init, load, save, update, warmup_cosine, warmup_polynomial

HYPER: dict[str, Any] = {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.1}
TYPES = ["f8", "f4", "f2", "c8", "c16", ml_dtypes.bfloat16]


def trained(params: dict[str, Any], steps: int = 2, **options: Any) -> LARS:
    optimizer = LARS(params, **HYPER | options)
    for _ in range(steps):
        optimizer.step({name: (0.5 * p).astype(p.dtype) for name, p in params.items()})
    return optimizer


def copied(params: dict[str, Any]) -> dict[str, Any]:
    return {name: p.copy(order="K") for name, p in params.items()}


def blank(params: dict[str, Any]) -> dict[str, Any]:
    return {name: np.zeros_like(p) for name, p in params.items()}


@given(any_options, seeds, st.sampled_from(TYPES), st.booleans())
@settings(max_examples=60)
def test_training_goes_on_as_if_nothing_had_happened(
    tmp_path_factory: pytest.TempPathFactory, options: dict[str, Any], seed: int, dtype: Any, masters: bool
) -> None:
    params, gradients = layers_of(seed, "f8" if dtype is ml_dtypes.bfloat16 else dtype, steps=4)
    params = {name: np.asarray(p.astype(dtype)) for name, p in params.items()}
    gradients = [{name: np.asarray(g.astype(dtype)) for name, g in grads.items()} for grads in gradients]
    options = options | {"master_weights": masters, "nonfinite": "propagate"}
    optimizer = LARS(params, **options)
    with np.errstate(all="ignore"):
        for grads in gradients[:2]:
            optimizer.step(grads)
        path = tmp_path_factory.mktemp("run") / "run.safetensors"
        save(path, optimizer, params=params)
        others = blank(params)
        resumed = LARS(others, lr=7.0)
        load(path, resumed, params=others)
        assert_same(resumed.state_dict(), optimizer.state_dict())
        for grads in gradients[2:]:
            optimizer.step(grads)
            resumed.step(grads)
    assert_same(others, params)
    assert_same(resumed.state_dict(), optimizer.state_dict())


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), unique=True, min_size=1, max_size=5))
@settings(max_examples=40)
def test_names_are_any_text(tmp_path_factory: pytest.TempPathFactory, names: list[str]) -> None:
    params = {name: np.full(2, 1.0 + i) for i, name in enumerate(names)}
    path = tmp_path_factory.mktemp("run") / "run.safetensors"
    optimizer = trained(params)
    save(path, optimizer, params=params)
    saved = load(path)
    assert_same(saved.state, optimizer.state_dict())
    assert_same({name: saved.params[name] for name in names}, params)


@pytest.mark.parametrize("name", ["__metadata__", "", "/", "param/w", "\0", "é\u2028", "n" * 100_000])
def test_names_that_could_be_mistaken_for_something_else(tmp_path: Path, name: str) -> None:
    params = {name: np.ones(2), f"{name}/": np.zeros(1)}
    save(tmp_path / "run", trained(params), params=params)
    assert_same({key: x for key, x in load(tmp_path / "run").params.items() if key == name}, {name: params[name]})


ARRAYS = {
    "shape ()": np.array(2.5),
    "no elements": np.zeros((0, 3), np.float32),
    "Fortran's order": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "transposed": np.arange(24.0).reshape(2, 3, 4).transpose(2, 0, 1),
    "every other": np.arange(10.0, dtype=np.float32)[::2],
    "backwards": np.arange(5.0)[::-1],
    "complex": np.array([1 + 2j, complex(nan, -0.0)], np.complex64),
    "complex of shape ()": np.array(1 - 2j),
    "complex, no elements": np.zeros((3, 0), np.complex128),
    "the other byte order": np.arange(3.0).astype(">f8"),
    "bfloat16": np.arange(6).reshape(2, 3).astype(ml_dtypes.bfloat16),
    "float16": np.array([65504, -0.0, 6e-8], np.float16),
    "integers": np.arange(3, dtype=np.int64),
    "booleans": np.array([True, False]),
    "not finite": np.array([inf, -inf, nan, -0.0]),
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_arrays_of_every_kind(tmp_path: Path, kind: str) -> None:
    save(tmp_path / "run", trained({"w": np.ones(2)}), params={"x": ARRAYS[kind]})
    expected = np.asarray(ARRAYS[kind], ARRAYS[kind].dtype.newbyteorder("="), order="C")
    assert_same(load(tmp_path / "run").params, {"x": expected})


def test_buffers_lie_as_their_parameters_do_and_can_be_written_to(tmp_path: Path) -> None:
    params = {"f": np.asfortranarray(np.ones((40, 30))), "t": np.ones((3, 4, 5)).transpose(2, 0, 1)}
    optimizer = trained(params)
    save(tmp_path / "run", optimizer, params=params)
    others = {name: p.copy(order="K") for name, p in params.items()}
    resumed = LARS(others, lr=1.0)
    load(tmp_path / "run", resumed, params=others)
    views = resumed.state_views()
    assert views["f"]["momentum_buffer"].flags.f_contiguous
    assert_same(views, optimizer.state_views())


VALUES = [
    *(0.1, 1 / 3, 5e-324, 0.0, 1.7976931348623157e308, 0, 1, 2**60, np.float64(0.1), np.float32(0.1), np.float16(0.1)),
    *(np.int64(1), np.array(0.1), np.array(0.1, np.float32), np.array(1), np.array(0.5, ml_dtypes.bfloat16)),
    *(warmup_cosine(0.1, 10, 3), warmup_polynomial(0.3, 9, 2, 1e-5, 1.5, 0.01)),
]


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_learning_rates_of_every_type(tmp_path: Path, value: Any) -> None:
    optimizer = LARS({"w": np.ones(2)}, lr=value)
    save(tmp_path / "run", optimizer)
    (group,) = load(tmp_path / "run").state["param_groups"]
    assert type(group["lr"]) is type(value)
    assert_same(group["lr"], value)
    resumed = LARS({"w": np.ones(2)}, lr=9.0)
    load(tmp_path / "run", resumed)
    assert_same(resumed.param_groups[0]["lr"], value)


@pytest.mark.parametrize("bounds", [None, (0.0, inf), (0.1, 2), [0, 1.5]], ids=repr)
def test_bounds_are_tuples_or_lists_as_they_were(tmp_path: Path, bounds: Any) -> None:
    optimizer = LARS({"w": np.ones(2)}, lr=1.0, trust_bounds=bounds, max_grad_norm=inf)
    save(tmp_path / "run", optimizer)
    assert_same(load(tmp_path / "run").state, optimizer.state_dict())


def test_every_option_of_every_group(tmp_path: Path) -> None:
    options = {"nesterov": True, "rule": "nvidia", "trust_clip": True, "always_adapt": True, "maximize": True}
    options |= {"nonfinite": "skip", "layer_axes": 1, "dampening": 0.0, "eps": 1e-9, "rescale_grad": 0.3}
    groups = [{"params": {"a": np.ones((2, 3))}, **options}, {"params": {"b": np.ones(2)}, "adapt": False, "lr": 0.25}]
    optimizer = LARS(groups, **HYPER)
    optimizer.step({"a": np.ones((2, 3)), "b": np.ones(2)})
    save(tmp_path / "run", optimizer)
    assert_same(load(tmp_path / "run").state, optimizer.state_dict())


@pytest.mark.parametrize("schedule", VALUES[-2:], ids=repr)
def test_schedules_are_plain_data(schedule: Any) -> None:
    assert pickle.loads(pickle.dumps(schedule)) == schedule
    from lars_array.files._values import read_value, stored_value

    stored = stored_value(schedule)
    assert stored["schedule"] == type(schedule).__name__
    assert stored["peak_lr"] == schedule.peak_lr
    assert read_value(stored) == schedule
    assert [read_value(stored)(step) for step in range(12)] == [schedule(step) for step in range(12)]


def test_a_rule_that_was_registered_is_saved_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    function = lars_array.RULES["nvidia"].function
    monkeypatch.setitem(lars_array.RULES, "mine", lars_array.Rule(function, norm_of="decayed gradient"))
    optimizer = LARS({"w": np.ones(2)}, lr=0.1, rule=function)
    save(tmp_path / "run", optimizer)
    resumed = LARS({"w": np.ones(2)}, lr=0.1)
    load(tmp_path / "run", resumed)
    assert resumed.param_groups[0]["rule"] == "mine"
    assert load(tmp_path / "run").state["param_groups"][0]["rule"] == "mine"


def test_metadata_is_what_it_was(tmp_path: Path) -> None:
    metadata = {"epoch": 3, "best": {"loss": 0.1, "at": (1, [2, None])}, "name": "é", "x": nan, "y": np.float32(0.1)}
    save(tmp_path / "run", trained({"w": np.ones(2)}), metadata=metadata)
    assert_same(load(tmp_path / "run").metadata, metadata)
    save(tmp_path / "run", trained({"w": np.ones(2)}))
    assert load(tmp_path / "run").metadata == {}
    assert load(tmp_path / "run").params is None


def test_the_state_of_pure_functions(tmp_path: Path) -> None:
    params = {"w": np.array([3.0, 4.0]), "b": np.ones(1, np.float32)}
    grads, state = {"w": np.array([0.6, 0.8]), "b": np.ones(1, np.float32)}, init(params)
    for _ in range(2):
        params, state = update(params, grads, state, **HYPER)
    save(tmp_path / "run", state, params=params)
    saved = load(tmp_path / "run")
    assert isinstance(saved.state, State)
    assert_same({**saved.state._asdict()}, {**state._asdict(), "momentum_buffers": dict(sorted(state[1].items()))})
    one, two = update(params, grads, state, **HYPER), update(saved.params, grads, saved.state, **HYPER)
    assert_same(dict(sorted(two[0].items())), dict(sorted(one[0].items())))


def test_a_state_dict_is_saved_as_the_optimizer_is(tmp_path: Path) -> None:
    optimizer = trained({"w": np.ones(2)})
    save(tmp_path / "run", optimizer.state_dict())
    assert_same(load(tmp_path / "run").state, optimizer.state_dict())
    resumed = LARS({"w": np.ones(2)}, lr=1.0)
    resumed.load_state_dict(load(tmp_path / "run").state)
    assert_same(resumed.state_dict(), optimizer.state_dict())


def test_saving_changes_nothing_and_the_file_holds_copies(tmp_path: Path) -> None:
    params = {"w": np.array([3.0, 4.0])}
    optimizer, twin = trained(params), trained({"w": np.array([3.0, 4.0])})
    save(tmp_path / "run", optimizer, params=params)
    assert_same(optimizer.state_dict(), twin.state_dict())
    before = load(tmp_path / "run")
    optimizer.step({"w": np.ones(2)})
    assert_same(load(tmp_path / "run"), before)


def test_names_in_another_order_and_in_other_groups(tmp_path: Path) -> None:
    params = {"a": np.ones(2), "b": np.full(3, 2.0), "c": np.full(1, 3.0)}
    optimizer = trained(params)
    save(tmp_path / "run", optimizer, params=params)
    others = blank(params)
    resumed = LARS([{"params": {"c": others["c"]}}, {"params": {n: others[n] for n in ("b", "a")}}], lr=1.0)
    load(tmp_path / "run", resumed, params=others)
    grads = {name: np.ones_like(p) for name, p in params.items()}
    optimizer.step(grads)
    resumed.step(grads)
    assert_same(others, params)


def test_what_is_omitted_stays_as_it_is_in_the_optimizer_that_loads(tmp_path: Path) -> None:
    def schedule(step: int) -> float:
        return 0.1 / (step + 1)

    optimizer = trained({"w": np.ones(2)}, lr=schedule)
    save(tmp_path / "run", optimizer, omit=("lr", "eps"))
    assert not {"lr", "eps"} & load(tmp_path / "run").state["param_groups"][0].keys()
    resumed = LARS({"w": np.ones(2)}, lr=schedule, eps=0.25)
    load(tmp_path / "run", resumed)
    (group,) = resumed.param_groups
    assert (group["lr"], group["eps"], group["momentum"]) == (schedule, 0.25, 0.9)
