"""State that outlives an optimizer: checkpoints, copies, pickles. What is refused stands in test_state_misfits."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from assertions import assert_close, assert_same, fingerprint, flash_run, flash_step

from lars_array import LARS, RULES, State, init, param_groups, update, warmup_cosine

RNG = np.random.default_rng(7)
INITIAL = {"w": RNG.normal(size=(3, 4)), "b": RNG.normal(size=4), "u": RNG.normal(size=(2, 2))}
GRADS = [{name: RNG.normal(size=p.shape) for name, p in INITIAL.items()} for _ in range(6)]
HYPER: dict[str, Any] = {"lr": 0.5, "momentum": 0.9, "dampening": 0.25, "weight_decay": 0.1, "trust_coefficient": 0.1}
ALL_OPTIONS = {
    "lr": 0.5,
    "momentum": 0.9,
    "dampening": 0,
    "weight_decay": 0.1,
    "nesterov": False,
    "trust_coefficient": 0.001,
    "eps": 1e-8,
    "rule": "flash",
    "trust_clip": False,
    "trust_bounds": None,
    "always_adapt": False,
    "adapt": True,
    "maximize": False,
    "rescale_grad": 1.0,
    "max_grad_norm": None,
    "nonfinite": "raise",
    "layer_axes": 0,
    "master_weights": False,
}


def parameters() -> dict[str, Any]:
    return {name: p.copy() for name, p in INITIAL.items()}


def via_state_dict(optimizer: LARS, params: dict[str, Any], make: Callable[[Any], LARS]) -> tuple[LARS, dict[str, Any]]:
    params = {name: p.copy() for name, p in params.items()}
    fresh = make(params)
    fresh.load_state_dict(optimizer.state_dict())
    return fresh, params


def via_pickled_state_dict(optimizer: LARS, params: dict[str, Any], make: Any) -> tuple[LARS, dict[str, Any]]:
    params, state = pickle.loads(pickle.dumps((params, optimizer.state_dict())))
    fresh = make(params)
    fresh.load_state_dict(state)
    return fresh, params


def via_deepcopy(optimizer: LARS, params: dict[str, Any], make: Any) -> tuple[LARS, dict[str, Any]]:
    return copy.deepcopy((optimizer, params))


def via_pickle(optimizer: LARS, params: dict[str, Any], make: Any) -> tuple[LARS, dict[str, Any]]:
    return pickle.loads(pickle.dumps((optimizer, params)))


MAKES: dict[str, Callable[[Any], LARS]] = {
    "plain": lambda params: LARS(params, **HYPER),
    "groups": lambda params: LARS(param_groups(params, 0.1), **HYPER | {"rule": "timm"}),
    "schedule": lambda params: LARS(params, **HYPER | {"lr": warmup_cosine(1.0, 6, 2)}),
    "momentum correction": lambda params: LARS(params, **HYPER | {"lr": warmup_cosine(1.0, 6, 2), "rule": "nvidia"}),
    "nesterov": lambda params: LARS(params, **HYPER | {"nesterov": True, "dampening": 0}, kernel="portable"),
    "popular, clipped": lambda params: LARS(params, **HYPER | {"rule": "simclr-popular", "max_grad_norm": 1.0}),
    "no momentum": lambda params: LARS(params, lr=0.5, weight_decay=0.1),
}


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
@pytest.mark.parametrize("way", [via_state_dict, via_pickled_state_dict, via_deepcopy, via_pickle])
def test_training_goes_on_as_if_never_interrupted(way: Any, make: Callable[[Any], LARS]) -> None:
    params = parameters()
    optimizer = make(params)
    for grads in GRADS[:2]:
        optimizer.step(grads)
    optimizer.step(GRADS[2] | {"b": None})
    revived, theirs = way(optimizer, params, make)
    for grads in GRADS[3:]:
        before = fingerprint([params, optimizer])
        revived.step(grads)
        assert fingerprint([params, optimizer]) == before, "the two are not independent"
        optimizer.step(grads)
        assert_same(theirs, params)
        assert_same(revived, optimizer)


def test_what_a_state_dict_holds() -> None:
    w, b = np.array([[3.0, 4.0]]), np.array([0.6, 0.8])
    groups = [{"params": {"w": w}}, {"params": {"b": b}, "momentum": 0, "lr": 0.25, "trust_bounds": (0.0, 1.0)}]
    optimizer = LARS(groups, lr=0.5, momentum=0.9, weight_decay=0.1, nonfinite="skip")
    options = ALL_OPTIONS | {"nonfinite": "skip"}
    expected: dict[str, Any] = {
        "steps": 0,
        "skipped_steps": 0,
        "param_groups": [
            options | {"names": ["w"]},
            options | {"momentum": 0, "lr": 0.25, "trust_bounds": (0.0, 1.0), "names": ["b"]},
        ],
        "state": {"w": {"previous_lr": 0.0}, "b": {"previous_lr": 0.0}},
    }
    assert optimizer.state_dict() == expected
    grad = np.array([[0.3, 0.4]])
    optimizer.step([grad * np.nan, GRADS[0]["b"][:2]])
    optimizer.step([grad, GRADS[0]["b"][:2]])
    state = optimizer.state_dict()
    buffer = state["state"]["w"].pop("momentum_buffer")
    assert_close(buffer, flash_step(np.array([[3.0, 4.0]]), grad, lr=0.5, momentum=0.9, weight_decay=0.1)[1])
    expected |= {"steps": 1, "skipped_steps": 1, "state": {"w": {"previous_lr": 0.5}, "b": {"previous_lr": 0.25}}}
    assert state == expected
    assert list(state) == ["steps", "skipped_steps", "param_groups", "state"]


def test_a_state_dict_is_a_snapshot() -> None:
    lr, bounds = np.array(0.5), [0.0, 1.0]
    optimizer = LARS(parameters(), **HYPER | {"lr": lr, "trust_bounds": bounds})
    optimizer.step(GRADS[0])
    state = optimizer.state_dict()
    before = fingerprint(state)
    optimizer.step(GRADS[1])
    optimizer.param_groups[0]["momentum"] = 0.1
    optimizer.param_groups[0]["names"][0] = "other"
    assert fingerprint(state) == before, "later steps have changed it"
    lr[...] = 0.125
    bounds[1] = 0.5
    assert fingerprint(state) == before, "changed values of options have changed it"


def test_a_changed_snapshot_does_not_reach_back() -> None:
    optimizer = LARS(parameters(), **HYPER)
    optimizer.step(GRADS[0])
    before = fingerprint(optimizer)
    state = optimizer.state_dict()
    state["param_groups"][0]["lr"] = 7.0
    state["param_groups"][0]["names"].clear()
    state["state"]["w"]["momentum_buffer"][...] = 7.0
    state["state"].clear()
    assert fingerprint(optimizer) == before


def test_what_was_loaded_is_a_copy() -> None:
    optimizer = LARS(parameters(), **HYPER)
    optimizer.step(GRADS[0])
    state, fresh = optimizer.state_dict(), LARS(parameters(), **HYPER)
    given = fingerprint(state)
    assert fresh.load_state_dict(state) is None
    fresh.step(GRADS[1])
    assert fingerprint(state) == given
    before = fingerprint(fresh)
    state["state"]["w"]["momentum_buffer"][...] = 7.0
    state["param_groups"][0]["lr"] = 7.0
    assert fingerprint(fresh) == before


def test_the_options_of_the_checkpoint_win_over_those_of_the_constructor() -> None:
    saved = LARS(param_groups(parameters(), 0.1), **HYPER | {"rule": "timm", "eps": 0.5, "nonfinite": "skip"})
    saved.step(GRADS[0])
    saved.step(GRADS[0] | {"u": GRADS[0]["u"] * np.nan})
    params = parameters()
    loaded = LARS(param_groups(params, 0.0), lr=9.0)
    loaded.load_state_dict(saved.state_dict())
    assert_same(loaded.state_dict(), saved.state_dict())
    assert (loaded.steps, loaded.skipped_steps) == (1, 1)
    assert loaded.param_groups[0]["params"][0] is params["w"]
    assert loaded.defaults["lr"] == 9.0


def test_the_arrays_of_a_loaded_optimizer_stay_where_they_are() -> None:
    optimizer = LARS(parameters(), **HYPER)
    optimizer.step(GRADS[0])
    params = parameters()
    fresh = LARS(params, **HYPER)
    fresh.step(GRADS[0])
    fresh.load_state_dict(optimizer.state_dict())
    fresh.step(GRADS[1])
    assert_close(params["u"], flash_run(INITIAL["u"], [GRADS[0]["u"], GRADS[1]["u"]], **HYPER))


@pytest.mark.parametrize("late", [None, GRADS[0]["u"]], ids=["without the late one", "with it"])
def test_a_buffer_outlives_steps_without_momentum(late: Any) -> None:
    params = {name: p.copy() for name, p in INITIAL.items()}
    groups = [{"params": {name: p}, "momentum": 0.9 if name == "w" else 0.0} for name, p in params.items()]
    optimizer = LARS(groups, lr=0.5, weight_decay=0.1)
    optimizer.step(GRADS[0] | {"u": late})
    before = optimizer.state_dict()["state"]["w"]["momentum_buffer"]
    optimizer.param_groups[0]["momentum"], optimizer.param_groups[1]["momentum"] = 0.0, 0.9
    optimizer.step(GRADS[1] | {"u": late})
    state = optimizer.state_dict()["state"]
    assert_same(state["w"]["momentum_buffer"], before)
    assert ["momentum_buffer" in of for of in state.values()] == [True, True, False]
    optimizer.param_groups[0]["momentum"] = 0.9
    assert_same(optimizer.state_views()["w"]["momentum_buffer"], before)
    optimizer.step(GRADS[2] | {"u": late})
    assert not np.array_equal(optimizer.state_views()["w"]["momentum_buffer"], before)


def test_loading_a_state_without_a_buffer_takes_it_away() -> None:
    params = parameters()
    optimizer = LARS(params, **HYPER)
    at_start = optimizer.state_dict()
    optimizer.step(GRADS[0])
    for name, p in params.items():
        p[...] = INITIAL[name]
    optimizer.load_state_dict(at_start)
    assert_same(optimizer.state_dict(), at_start)
    for grads in GRADS[:2]:
        optimizer.step(grads)
    assert_close(params["w"], flash_run(INITIAL["w"], [GRADS[0]["w"], GRADS[1]["w"]], **HYPER))


def test_a_gradient_in_the_memory_of_a_loaded_buffer_is_told_from_one_in_a_buffer_that_is_gone() -> None:
    optimizer = LARS(parameters(), **HYPER)
    optimizer.step(GRADS[0])
    optimizer.step(GRADS[0])
    old, state = optimizer._state.buffers[0], optimizer.state_dict()
    optimizer.load_state_dict(state)
    optimizer.step(GRADS[1] | {"w": old})
    with pytest.raises(ValueError, match="must not share memory with the momentum buffer of 'w'"):
        optimizer.step(GRADS[1] | {"w": optimizer._state.buffers[0]})


@pytest.mark.parametrize("way", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))])
def test_a_copy_writes_to_the_parameters_that_it_shows(way: Any) -> None:
    optimizer = LARS({"w": np.array([1.0])}, lr=0.5)
    optimizer.step([np.array([0.5])])
    twin = way(optimizer)
    assert twin.norms() == optimizer.norms()
    (p,) = twin.param_groups[0]["params"]
    twin.step([np.array([0.5])])
    assert (p[0], optimizer.param_groups[0]["params"][0][0]) == (0.5, 0.75)
    with pytest.raises(ValueError, match="must not share memory with parameter 'w'"):
        twin.step([p])
    twin.add_param_group({"params": {"b": np.array([1.0])}})
    twin.step([np.array([0.5])] * 2)


def chosen(optimizer: LARS) -> Any:
    """Return the kernel, which copies and pickles choose at their first step."""
    optimizer.step([np.ones(2)])
    return optimizer._stepper._kernel


def test_a_copy_keeps_its_kernel() -> None:
    optimizer = LARS([np.ones(2)], lr=0.5, kernel="portable")
    for twin in (optimizer, copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert chosen(twin).__module__ == "lars_array.kernels.portable"


@pytest.mark.parametrize("rule", sorted(RULES))
def test_every_rule_can_be_copied_and_pickled(rule: str) -> None:
    optimizer = LARS(parameters(), **HYPER | {"rule": rule, "dampening": 0})
    optimizer.step(GRADS[0])
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert_same(twin, optimizer)


def test_the_functional_state_can_be_copied_and_pickled() -> None:
    hyper = HYPER | {"lr": warmup_cosine(1.0, 6, 2), "rule": "nvidia"}
    params, state = parameters(), init(parameters())
    for grads in GRADS[:3]:
        params, state = update(params, grads, state, **hyper)
    assert type(state) is State
    assert int(state.step) == 3
    for twin in (copy.deepcopy(state), pickle.loads(pickle.dumps(state))):
        ours, theirs = update(params, GRADS[3], state, **hyper), update(params, GRADS[3], twin, **hyper)
        assert_same(ours, theirs)
