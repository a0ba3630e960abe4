"""Programs of earlier steps are used again, and only where they fit."""

from __future__ import annotations

import copy
import gc
import random
import weakref
from typing import Any

import numpy as np
import pytest

from lars_array import LARS, NonFiniteError, _stepper
from lars_array.kernels import NUMPY_KERNELS as KERNELS

SHAPES = [(3, 4), (5,), (2, 2), (70_000,), ()]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The programs that have been made so far."""
    found: list[Any] = []
    original = _stepper.StepProgram.__init__

    def counted(self: Any, *arguments: Any) -> None:
        found.append(self)
        original(self, *arguments)

    monkeypatch.setattr(_stepper.StepProgram, "__init__", counted)
    return found


def arrays(rng: Any, dtype: str = "f4") -> list[Any]:
    return [np.asarray(rng.standard_normal(shape), dtype) for shape in SHAPES]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("momentum", [0, 0.9])
def test_gradients_that_are_none_in_turn_need_no_new_programs(kernel: str, momentum: float, made: list[Any]) -> None:
    rng = np.random.default_rng(0)
    optimizer = LARS(arrays(rng), 0.1, momentum=momentum, weight_decay=0.1, kernel=kernel)
    grads = arrays(rng)
    patterns = [grads, [None, *grads[1:]], [grads[0], None, None, *grads[3:]], [*grads[:4], None]]
    for _ in range(2):
        for pattern in patterns:
            optimizer.step(pattern)
    before = len(made)
    for _ in range(5):
        for pattern in patterns:
            optimizer.step(pattern)
    assert len(made) == before


@pytest.mark.parametrize("dtype", ["f4", "f2"])
def test_gradients_that_are_none_at_random_are_cut_from_one_program(dtype: str, made: list[Any]) -> None:
    choices, rng = random.Random(0), np.random.default_rng(0)
    options: dict[str, Any] = {"momentum": 0.9, "weight_decay": 0.1, "master_weights": True, "kernel": "compiled"}
    first = [*arrays(rng, dtype), *arrays(rng, "f8")]
    groups = [{"params": [p.copy() for p in first[k::3]], "lr": 0.1 * (k + 1)} for k in range(3)]
    ours, theirs = (LARS(copy.deepcopy(groups), nonfinite="raise", **options) for _ in range(2))
    for t in range(20):
        every = [*arrays(rng, dtype), *arrays(rng, "f8")]
        grads: list[Any] = [g if t == 0 or choices.random() < 0.5 else None for k in range(3) for g in every[k::3]]
        before = len(made)
        ours.step(grads)
        assert len(made) - before == (t == 0)
        theirs._stepper = type(theirs._stepper)("compiled")
        theirs.step(grads)
        for mine, other in zip(ours.param_groups, theirs.param_groups, strict=True):
            for p, q in zip(mine["params"], other["params"], strict=True):
                np.testing.assert_array_equal(p, q)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("seed", range(4))
def test_any_sequence_of_steps_is_that_of_programs_made_anew(kernel: str, seed: int) -> None:
    choices, rng = random.Random(seed), np.random.default_rng(seed)
    dtype = choices.choice(["f4", "f2"])
    first = arrays(rng, dtype)
    options: dict[str, Any] = {"momentum": 0.9, "weight_decay": 0.1, "master_weights": True, "kernel": kernel}
    options |= {"nonfinite": "skip", "rule": choices.choice(["flash", "nvidia", "barlow"])}
    ours, theirs = (LARS([p.copy() for p in first], 0.1, **options) for _ in range(2))
    for _ in range(40):
        grads: list[Any] = [g if choices.random() < 0.7 else None for g in arrays(rng, choices.choice([dtype, "f8"]))]
        what = choices.choice(["step", "step", "step", "found", "nan", "huge", "momentum", "load", "masters", "write"])
        if what == "nan" and grads[0] is not None:
            grads[0][0, 0] = np.nan
        elif what == "huge" and grads[1] is not None:  # finite, but the sum of its squares is not that of a float32
            grads[1] = np.full(5, 3e38, "f8")
        for each in (ours, theirs):
            if what == "momentum":
                each.param_groups[0]["momentum"] = 0.9 - each.param_groups[0]["momentum"]
            elif what == "masters":
                each.param_groups[0]["master_weights"] ^= True
            elif what == "load":
                each.load_state_dict(each.state_dict())
            elif what == "write":
                each.param_groups[0]["params"][1][...] = 0.5
                each.refresh_masters()
            each.step(grads, found_inf=what == "found")
        theirs._stepper = type(theirs._stepper)(kernel)
        for p, q in zip(ours.param_groups[0]["params"], theirs.param_groups[0]["params"], strict=True):
            np.testing.assert_array_equal(p, q)
    assert (ours.steps, ours.skipped_steps) == (theirs.steps, theirs.skipped_steps)


@pytest.mark.parametrize("dtype", ["f4", "f2"])
def test_parameters_that_move_at_each_step_need_no_new_programs(dtype: str, made: list[Any]) -> None:
    rng = np.random.default_rng(0)
    first = arrays(rng, dtype)
    options: dict[str, Any] = {"momentum": 0.9, "weight_decay": 0.1, "master_weights": True, "kernel": "compiled"}
    ours, theirs = (LARS([p.copy() for p in first], 0.1, **options) for _ in range(2))
    state = ours._state
    for t in range(6):
        grads: list[Any] = arrays(rng)
        grads[t % 2] = None
        theirs.step(grads)
        ours.param_groups[0]["params"] = state.params = [
            p.copy() for p in state.params
        ]  # as adapters do whose owners replace memory
        ours.step(grads)
        for p, q in zip(state.params, theirs._state.params, strict=True):
            np.testing.assert_array_equal(p, q)
        if t == 2:  # all buffers are there
            before = len(made)
    assert len(made) == before
    memory = np.ones(20, first[0].dtype)
    ours.param_groups[0]["params"] = state.params = [memory[:12].reshape(3, 4), memory[11:16], *state.params[2:]]
    with pytest.raises(ValueError, match="must not overlap in memory; parameter '1' and parameter '0' do"):
        ours.step(grads)
    ours.param_groups[0]["params"] = state.params = [p.copy() for p in theirs._state.params]
    with pytest.raises(ValueError, match="gradient of '2' must not share memory with parameter '2'"):
        ours.step([None, *grads[1:2], state.params[2], *grads[3:]])
    grads = [np.full_like(p, np.nan) for p in state.params]
    with pytest.raises(ValueError, match="the gradient of '0' has 12 non-finite entries"):
        ours.step(grads)


@pytest.mark.parametrize("alternate", [True, False])
def test_memory_that_parameters_have_left_is_freed(alternate: bool) -> None:
    rng = np.random.default_rng(0)
    optimizer = LARS(arrays(rng), 0.1, momentum=0.9, kernel="compiled")
    state, grads, left = optimizer._state, arrays(rng), []
    optimizer.step(grads)
    for t in range(20):
        left.append(weakref.ref(state.params[0]))
        optimizer.param_groups[0]["params"] = state.params = [p.copy() for p in state.params]
        optimizer.step([None, *grads[1:]] if alternate and t % 2 else grads)
    gc.collect()
    assert all(p() is None for p in left[:-8])


@pytest.mark.parametrize(("dtype", "options"), [("f4", {"momentum": 0.9}), ("f2", {"master_weights": True})])
def test_a_loaded_state_needs_few_programs_for_any_gradients_that_are_none(
    dtype: str, options: dict[str, Any], made: list[Any]
) -> None:
    rng, choices = np.random.default_rng(0), random.Random(0)
    optimizer = LARS(arrays(rng, dtype), 0.1, kernel="compiled", **options)
    optimizer.step(arrays(rng, dtype))
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for present in ([0, 1], [1, 2]):
        optimizer.step([g if k in present else None for k, g in enumerate(arrays(rng, dtype))])
    before = len(made)
    for _ in range(10):
        optimizer.step([g if choices.random() < 0.5 else None for g in arrays(rng, dtype)])
    assert len(made) == before


@pytest.mark.parametrize(("dtype", "options"), [("f4", {"momentum": 0.9}), ("f2", {"master_weights": True})])
def test_nothing_is_made_for_parameters_that_have_had_no_gradient(
    dtype: str, options: dict[str, Any], made: list[Any]
) -> None:
    rng = np.random.default_rng(0)
    optimizer = LARS(arrays(rng, dtype), 0.1, kernel="compiled", **options)
    for present in ([0, 1], [1, 2], [0, 2]):
        optimizer.step([g if k in present else None for k, g in enumerate(arrays(rng, dtype))])
    assert len(made) == 3
    state = optimizer._state
    assert [v is not None for v in state.buffers] == [k < 3 and dtype == "f4" for k in range(5)]
    assert [m is not None for m in state.masters] == [k < 3 and dtype == "f2" for k in range(5)]


@pytest.mark.parametrize("dtype", ["f4", "f2"])
def test_parameters_that_have_moved_are_found_where_they_are(
    dtype: str, made: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[Any] = []
    original = _stepper.StepProgram._moved

    def counted(self: Any, *arguments: Any) -> Any:
        moved.append(self)
        return original(self, *arguments)

    monkeypatch.setattr(_stepper.StepProgram, "_moved", counted)
    rng = np.random.default_rng(0)
    optimizer = LARS(arrays(rng, dtype), 0.1, momentum=0.9, master_weights=True, kernel="compiled", nonfinite="raise")
    state = optimizer._state
    optimizer.step(arrays(rng, dtype))
    optimizer.param_groups[0]["params"] = state.params = [p.copy() for p in state.params]
    for _ in range(3):
        state.buffers, state.masters = list(state.buffers), list(state.masters)  # lists anew, of the same arrays
        optimizer.step(arrays(rng, dtype))
    assert (len(made), len(moved)) == (1, 1)
    trained = state.params if dtype == "f4" else state.masters
    trained[3][7] = np.inf
    with pytest.raises(NonFiniteError, match="the parameter of '3' has 1 non-finite entries"):
        optimizer.step(arrays(rng, dtype))
