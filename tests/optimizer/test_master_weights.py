"""Float32 masters of half-precision parameters: the same steps as float32 parameters take, to the last bit."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from assertions import assert_refused, assert_same, fingerprint
from cuda_on_cpu import answer_whether_on_accelerator
from hypothesis import given
from hypothesis import strategies as st
from references import LAYOUTS, assert_close, assert_same_bits, gaussian, tolerance
from strategies import FEW, seeds, shapes

from lars_array import LARS, NonFiniteError, init, lars_step, update
from lars_array._arrays import is_on_accelerator
from lars_array.kernels import NUMPY_KERNELS as KERNELS
from lars_array.kernels.compiled import loops, table
from lars_array.kernels.compiled.loops import MEASURE, PIECE, WRITE
from lars_array.kernels.compiled.tasks import ROOM_FROM

HALF = {"float16": np.dtype("f2"), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
HYPER: dict[str, Any] = {"lr": 0.3, "momentum": 0.9, "weight_decay": 0.01, "trust_coefficient": 0.1}
MASTERS = HYPER | {"master_weights": True}


def master_of(optimizer: LARS, name: str = "w") -> Any:
    return optimizer.state_dict()["state"][name]["master"]


def buffer_of(optimizer: LARS, name: str = "w") -> Any:
    return optimizer.state_dict()["state"][name].get("momentum_buffer")


# ----------------------------------------------------------------------------------------------------- what is computed


@FEW
@given(
    shapes,
    st.sampled_from(sorted(HALF)).map(HALF.__getitem__),
    st.sampled_from([*HALF.values(), np.dtype("f4"), np.dtype("f8")]),
    seeds,
    st.sampled_from(sorted(LAYOUTS)),
    st.sampled_from(sorted(LAYOUTS)),
    st.sampled_from(KERNELS),
    st.sampled_from([{}, {"nesterov": True}, {"momentum": 0}, {"rule": "barlow"}, {"rule": "optax", "dampening": 0.5}]),
    st.sampled_from([{}, {"nonfinite": "propagate"}, {"max_grad_norm": 1.0}]),
)
def test_masters_are_float32_parameters(
    shape: tuple[int, ...],
    of_p: Any,
    of_g: Any,
    seed: int,
    lay_p: str,
    lay_g: str,
    kernel: str,
    options: dict[str, Any],
    more: dict[str, Any],
) -> None:
    rng = np.random.default_rng(seed)
    p = LAYOUTS[lay_p](np.asarray(gaussian(rng, shape, of_p)))
    plain = p.astype(np.float32)
    ours = LARS({"w": p}, **MASTERS | options | more, kernel=kernel)
    theirs = LARS({"w": plain}, **HYPER | options | more, kernel=kernel)
    # Where only the parameter doesn't lie densely the two go to different kernels, whose sums differ in rounding.
    scattered = kernel == "compiled" and lay_p not in ("C", "Fortran", "permuted", "transposed")
    for _ in range(3):
        g = LAYOUTS[lay_g](np.asarray(gaussian(rng, shape, of_g)))
        ours.step([g])
        theirs.step([g])
        assert master_of(ours).dtype == np.float32
        assert_same_bits(p.astype(of_p), master_of(ours).astype(of_p), "not the rounded master")
        if scattered:
            assert_close(master_of(ours), plain, tolerance("f4", 32), "master")
            continue
        assert_same_bits(master_of(ours), plain, "master")
        assert ours.norms() == theirs.norms() and ours.trust_ratios() == theirs.trust_ratios()
        if buffer_of(theirs) is not None:
            assert_same_bits(buffer_of(ours), buffer_of(theirs), "momentum")


@pytest.mark.parametrize("kernel", KERNELS)
def test_steps_too_small_for_bfloat16_are_lost_without_masters(kernel: str) -> None:
    bfloat16 = HALF["bfloat16"]
    start, g = np.linspace(1, 2, 64).astype(bfloat16), np.full(64, 0.25, bfloat16)
    options: dict[str, Any] = {"lr": 2e-3, "momentum": 0.9, "weight_decay": 1e-4, "trust_coefficient": 0.05}
    without, with_masters, wide = start.copy(), start.copy(), start.astype(np.float32)
    optimizers = [
        LARS([without], **options, kernel=kernel),
        LARS([with_masters], **options, master_weights=True, kernel=kernel),
        LARS([wide], **options, kernel=kernel),
    ]
    for _ in range(1000):
        for optimizer in optimizers:
            optimizer.step([g])
    assert_same_bits(without, start, "each step is less than half of a bfloat16's spacing")
    assert np.all(wide < start.astype(np.float32) - 0.5), "a run long enough to tell"
    assert_same_bits(with_masters, wide.astype(bfloat16), "masters")


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", ["f8", "f4", "c8"])
def test_wider_parameters_have_none(dtype: str, kernel: str) -> None:
    rng = np.random.default_rng(0)
    start, g = gaussian(rng, (5, 6), dtype), gaussian(rng, (5, 6), dtype)
    p, q = start.copy(), start.copy()
    ours, theirs = LARS([p], **MASTERS, kernel=kernel), LARS([q], **HYPER, kernel=kernel)
    for optimizer in (ours, theirs):
        optimizer.step([g])
    assert_same_bits(p, q)
    assert ours.state_dict()["state"].keys() == theirs.state_dict()["state"].keys()
    assert_same(ours.state_dict()["state"], theirs.state_dict()["state"])


@pytest.mark.parametrize("of_p", HALF)
@pytest.mark.parametrize("options", [{}, {"nonfinite": "propagate"}])
def test_bits_do_not_depend_on_threads(of_p: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for kernel in ("compiled", "blocked"):
        results = []
        for threads in (1, 2, 7):
            monkeypatch.setenv("LARS_ARRAY_THREADS", str(threads))
            rng = np.random.default_rng(0)
            sizes = [(ROOM_FROM * PIECE + 5,), (300, 301), (7,)]
            params = {str(size): gaussian(rng, size, HALF[of_p]) for size in sizes}
            optimizer = LARS(params, **MASTERS, **options, kernel=kernel)
            for _ in range(2):
                optimizer.step({name: gaussian(rng, p.shape, p.dtype) for name, p in params.items()})
            results.append([*params.values(), *(master_of(optimizer, name) for name in params)])
        for found in results[1:]:
            for ours, theirs in zip(found, results[0], strict=True):
                assert_same_bits(ours, theirs, kernel)


@pytest.mark.parametrize("options", [{"nonfinite": "propagate"}, {}], ids=["at once", "two passes"])
def test_the_rounded_copy_costs_no_pass_over_memory(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LARS_ARRAY_THREADS", "1")
    params = [np.ones(size, np.float16) for size in (2_000_000, 70_000, 3)]
    optimizer = LARS(params, **MASTERS, **options, kernel="compiled")
    gradients = [np.ones_like(p) for p in params]
    optimizer.step(gradients)
    calls: list[Any] = []
    monkeypatch.setattr(table, "work", lambda *given: (calls.append(given), loops.work(*given))[1])
    optimizer.step(gradients)
    done = [np.bitwise_or.reduce(todo[:, 0]) for todo, *_ in calls]
    assert done == ([MEASURE | WRITE] if options else [MEASURE, WRITE])
    for _, _, (places, *_), *_ in calls:
        state = optimizer._state
        for column, arrays in [(0, state.masters), (1, gradients), (2, state.buffers), (3, params)]:
            assert places[:, column].tolist() == [x.__array_interface__["data"][0] for x in arrays]


@pytest.mark.parametrize("of_p", HALF)
def test_torch(of_p: str) -> None:
    rng = np.random.default_rng(1)
    start, steps = gaussian(rng, (5, 6), HALF[of_p]), [gaussian(rng, (5, 6), HALF[of_p]) for _ in range(3)]
    kind = getattr(torch, of_p)
    p, here = torch.tensor(start.astype("f4")).to(kind), start.copy()
    ours, theirs = LARS({"w": p}, **MASTERS), LARS({"w": here}, **MASTERS, kernel="portable")
    for g in steps:
        ours.step([torch.tensor(g.astype("f4")).to(kind)])
        theirs.step([g])
    assert master_of(ours).dtype is torch.float32
    assert torch.equal(p, master_of(ours).to(kind))
    assert_close(master_of(ours).numpy(), master_of(theirs), tolerance("f4"))


# --------------------------------------------------------------------------------------------------- where and how long


def test_groups_have_the_option_each() -> None:
    p, q, r = (np.ones(3, np.float16) for _ in range(3))
    groups = [{"params": {"p": p}}, {"params": {"q": q}, "master_weights": False}]
    optimizer = LARS(groups, **MASTERS)
    optimizer.add_param_group({"params": {"r": r}})
    optimizer.step([np.ones(3, np.float16), np.ones(3, np.float16), None])
    state = optimizer.state_dict()
    assert [group["master_weights"] for group in state["param_groups"]] == [True, False, True]
    assert ["master" in of_layer for of_layer in state["state"].values()] == [True, False, False]
    assert "master_weights=True" in repr(optimizer).splitlines()[1]
    assert "master_weights" not in repr(optimizer).splitlines()[2]
    optimizer.step([None, None, np.ones(3, np.float32)])
    assert "master" in optimizer.state_dict()["state"]["r"]


@pytest.mark.parametrize("kernel", KERNELS)
def test_masters_win_over_what_is_written_to_the_parameter(kernel: str) -> None:
    p, g = np.ones(4, np.float16), np.full(4, 0.5, np.float16)
    alone = p.copy()
    ours, theirs = LARS([p], **MASTERS, kernel=kernel), LARS([alone], **MASTERS, kernel=kernel)
    for optimizer in (ours, theirs):
        optimizer.step([g])
    p[...] = 7
    for optimizer in (ours, theirs):
        optimizer.step([g])
    assert_same_bits(p, alone)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
def test_a_step_that_is_not_taken_makes_no_master_and_changes_none(nonfinite: str, kernel: str) -> None:
    p, q = np.ones(4, np.float16), np.ones(3, np.float16)
    good, bad = [np.ones(4, np.float16), np.ones(3, np.float32)], [np.ones(4, np.float16), np.full(3, np.nan)]
    optimizer = LARS({"p": p, "q": q}, **MASTERS, nonfinite=nonfinite, kernel=kernel)

    def refused() -> None:
        before = fingerprint([p, q, optimizer.state_dict()["state"]])
        if nonfinite == "raise":
            with pytest.raises(NonFiniteError, match=r"the gradient of 'q' has 3 non-finite entries of 3"):
                optimizer.step(bad)
        else:
            optimizer.step(bad)
        assert fingerprint([p, q, optimizer.state_dict()["state"]]) == before

    refused()
    p[...] = 2  # there is no master yet that this could contradict
    optimizer.step(good)
    fresh = np.full(4, 2, np.float16)
    LARS({"p": fresh}, **MASTERS, kernel=kernel).step(good[:1])
    assert_same_bits(p, fresh)
    refused()
    masters = optimizer._state.masters
    for message, grads in [
        ("the gradient of 'q' must have the parameter's shape (3,); got (4,)", [good[0], good[0]]),
        ("the gradient of 'q' must not share memory with the master copy of 'p'", [good[0], masters[0][1:]]),
        ("the gradient of 'p' must not share memory with the master copy of 'q'", [masters[1], good[1]]),
    ]:
        if "master copy of 'q'" in message:
            grads = [np.lib.stride_tricks.as_strided(grads[0], (4,), (0,)), good[1]]
        assert_refused(lambda g=grads: optimizer.step(g), ValueError, message, optimizer, p, q)


def test_a_master_that_is_not_finite_is_told_of() -> None:
    p = np.ones(3, np.float16)
    optimizer = LARS({"w": p}, **MASTERS)
    optimizer.step([p.copy()])
    state = optimizer.state_dict()
    state["state"]["w"]["master"][1] = np.inf
    optimizer.load_state_dict(state)
    message = "the parameter of 'w' has 1 non-finite entries of 3; nothing was changed (step 1)"
    assert_refused(lambda: optimizer.step([np.ones(3, np.float16)]), NonFiniteError, message, optimizer, p)


def test_a_rounding_that_overflows_is_no_half_step() -> None:
    p = np.full(3, 60_000, np.float16)
    for kernel in KERNELS:
        p[...] = 60_000
        optimizer = LARS({"w": p}, lr=1.0, master_weights=True, kernel=kernel)
        with np.errstate(all="raise"):
            optimizer.step([np.full(3, -60_000, np.float16)])
        assert np.all(np.isinf(p)) and master_of(optimizer).tolist() == [120_000.0] * 3


def test_without_the_option_a_master_is_forgotten() -> None:
    p, g = np.ones(4, np.float16), np.full(4, 2**-13, np.float16)
    optimizer = LARS({"w": p}, lr=1.0, master_weights=True)
    optimizer.step([g])
    assert p.tolist() == [1.0] * 4 and np.all(master_of(optimizer) == 1 - 2**-13)
    optimizer.param_groups[0]["master_weights"] = False
    optimizer.step([g])
    assert "master" not in optimizer.state_dict()["state"]["w"]
    p[...] = 2
    optimizer.param_groups[0]["master_weights"] = True
    optimizer.step([g])
    assert np.all(master_of(optimizer) == 2 - 2**-13)


def test_it_is_a_boolean() -> None:
    for bad in (1, "yes", None):
        with pytest.raises(TypeError, match=f"^master_weights must be True or False; got {bad!r}$"):
            LARS([np.ones(3, np.float16)], lr=0.1, master_weights=bad)  # type: ignore[arg-type]


def test_the_functions_have_none_and_say_so() -> None:
    params = {"w": np.ones(3, np.float32), "h": np.ones(3, np.float16)}
    state, grads = init(params), dict(params)
    message = "master_weights must be False in update, whose state has none for 'h'"
    assert_refused(lambda: update(params, grads, state, **MASTERS), ValueError, message, params)
    message = "master_weights must be False in lars_step; give the master, of float32, as p"
    assert_refused(lambda: lars_step(params["h"], params["h"], **MASTERS), ValueError, message, params)
    wide = {"w": params["w"]}
    update(wide, wide, init(wide), **MASTERS)


# ------------------------------------------------------------------------------------------------------------ the state


def via_state_dict(optimizer: LARS, params: dict[str, Any]) -> tuple[LARS, dict[str, Any]]:
    params = {name: p.copy() for name, p in params.items()}
    fresh = LARS(params, lr=1.0)
    fresh.load_state_dict(optimizer.state_dict())
    return fresh, params


def via_pickle(optimizer: LARS, params: dict[str, Any]) -> tuple[LARS, dict[str, Any]]:
    return pickle.loads(pickle.dumps((optimizer, params)))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("way", [via_state_dict, via_pickle, lambda *both: copy.deepcopy(both)])
def test_training_goes_on_as_if_never_interrupted(way: Callable[..., Any], kernel: str) -> None:
    rng = np.random.default_rng(5)
    params = {
        "h": gaussian(rng, (3, 4), "f2"),
        "b": np.asfortranarray(gaussian(rng, (5, 6), HALF["bfloat16"])),
        "w": gaussian(rng, (4,), "f4"),
        "late": gaussian(rng, (2,), "f2"),
    }
    steps = [{name: gaussian(rng, p.shape, "f4") for name, p in params.items()} for _ in range(5)]
    optimizer = LARS(params, **MASTERS, kernel=kernel)
    for grads in steps[:2]:
        optimizer.step(grads | {"late": None})
    assert [name for name, of in optimizer.state_dict()["state"].items() if "master" in of] == ["h", "b"]
    revived, theirs = way(optimizer, params)
    revived._stepper._kernel_name = kernel
    for grads in steps[2:]:
        before = fingerprint([params, optimizer])
        revived.step(grads)
        assert fingerprint([params, optimizer]) == before, "the two are not independent"
        optimizer.step(grads)
        assert_same(theirs, params)
        assert_same(revived.state_dict(), optimizer.state_dict())


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("way", [via_state_dict, via_pickle, lambda *both: copy.deepcopy(both)])
def test_a_stacked_parameter_has_one_master(way: Callable[..., Any], kernel: str) -> None:
    rng = np.random.default_rng(6)
    start, steps = gaussian(rng, (3, 4), "f2"), [gaussian(rng, (3, 4), "f2") for _ in range(3)]
    params, alone = {"w": start.copy()}, [row.copy() for row in start]
    optimizer = LARS(params, **MASTERS, layer_axes=1, kernel=kernel)
    theirs = LARS(alone, **MASTERS, kernel=kernel)
    for turn, g in enumerate(steps):
        if turn == 2:
            if way is via_state_dict:
                fresh = {"w": params["w"].copy()}
                loaded = LARS(fresh, lr=1.0, layer_axes=1, kernel=kernel)
                loaded.load_state_dict(optimizer.state_dict())
                optimizer, params = loaded, fresh
            else:
                optimizer, params = way(optimizer, params)
        optimizer.step([g])
        theirs.step(list(g))
        assert_same_bits(params["w"], np.stack(alone))
        assert_same_bits(master_of(optimizer), np.stack([master_of(theirs, str(i)) for i in range(3)]))
    optimizer.param_groups[0]["master_weights"] = False
    optimizer.step([g])
    assert "master" not in optimizer.state_dict()["state"]["w"]
    params["w"][...] = 2
    optimizer.param_groups[0]["master_weights"] = True
    optimizer.step([np.zeros((3, 4), np.float16)])
    assert np.array_equal(params["w"], master_of(optimizer).astype("f2")) and optimizer.steps == 5


def test_a_state_dict_is_a_snapshot() -> None:
    p = np.ones(3, np.float16)
    optimizer = LARS({"w": p}, **MASTERS)
    optimizer.step([p.copy()])
    state = optimizer.state_dict()
    before = fingerprint(state)
    optimizer.step([np.ones(3, np.float16)])
    assert fingerprint(state) == before
    optimizer.load_state_dict(state)
    kept = fingerprint(optimizer)
    state["state"]["w"]["master"][...] = 7
    assert fingerprint(optimizer) == kept


def test_loading_a_state_without_masters_takes_them_away() -> None:
    p = np.ones(3, np.float16)
    optimizer = LARS({"w": p}, **MASTERS)
    at_start = optimizer.state_dict()
    optimizer.step([p.copy()])
    p[...] = 3
    optimizer.load_state_dict(at_start)
    assert "master" not in optimizer.state_dict()["state"]["w"]
    optimizer.step([np.zeros(3, np.float16)])
    assert master_of(optimizer).tolist() == [3.0] * 3


@pytest.mark.parametrize(
    ("name", "master", "kind", "message"),
    [
        (
            "h",
            np.ones(3, np.float16),
            TypeError,
            "the master copy of 'h' must have dtype dtype('float32'); got dtype('float16')",
        ),
        (
            "h",
            np.ones(2, np.float32),
            ValueError,
            "the master copy of 'h' must have the parameter's shape (3,); got (2,)",
        ),
        ("h", [1.0] * 3, TypeError, "the master copy of 'h' must be an array of numpy; got list"),
        (
            "w",
            np.ones(3, np.float32),
            ValueError,
            "parameter 'w' must be of half precision to have a master copy; got dtype('float32')",
        ),
    ],
)
def test_a_master_that_does_not_fit(name: str, master: Any, kind: type[Exception], message: str) -> None:
    params = {"h": np.ones(3, np.float16), "w": np.ones(3, np.float32)}
    optimizer = LARS(params, **MASTERS)
    optimizer.step(list(map(np.copy, params.values())))
    state = optimizer.state_dict()
    state["state"][name]["master"] = master
    assert_refused(lambda: optimizer.load_state_dict(state), kind, message, optimizer, *params.values())


# ---------------------------------------------------------------------------------------------------------- on a device


@pytest.mark.parametrize("of_p", HALF)
def test_on_a_device(of_p: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = getattr(torch, of_p)
    rng = np.random.default_rng(3)
    start, steps = gaussian(rng, (4, 3), "f4"), [gaussian(rng, (4, 3), "f4") for _ in range(4)]
    near, far = (torch.tensor(start).to(kind) for _ in range(2))
    here = LARS({"w": near}, **MASTERS, nonfinite="skip")
    for g in steps:
        here.step([torch.tensor(g)])
    answer_whether_on_accelerator(monkeypatch, lambda x: isinstance(x, torch.Tensor) or is_on_accelerator(x))
    there = LARS({"w": far}, **MASTERS, nonfinite="skip")
    for turn, g in enumerate(steps):
        if turn in (0, 2):  # also before there is a master
            before = fingerprint([far.float(), buffer_of(there)])
            there.step([torch.full((4, 3), float("nan"))])
            there.step([torch.tensor(g)], found_inf=torch.tensor(1.0))
            assert fingerprint([far.float(), buffer_of(there)]) == before
        there.step([torch.tensor(g).double() if turn == 1 else torch.tensor(g)])
    there.synchronize()
    assert (there.steps, there.skipped_steps) == (4, 4)
    assert torch.equal(far, near)
    assert torch.equal(master_of(there), master_of(here))
    revived = pickle.loads(pickle.dumps(there))
    assert_same(revived.state_dict(), there.state_dict())


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("half", HALF.values(), ids=list(HALF))
def test_weights_that_others_have_written_are_trained_after_a_refresh(half: Any, kernel: str) -> None:
    rng = np.random.default_rng(3)
    w, b = rng.standard_normal((3, 4)).astype(half), rng.standard_normal(4).astype(half)
    best = rng.standard_normal((3, 4)).astype(half)
    grads = [rng.standard_normal(x.shape).astype(half) for x in (w, b, w, b)]
    optimizer = LARS({"w": w, "b": b}, **MASTERS, kernel=kernel)
    optimizer.step(grads[:2])
    buffer = buffer_of(optimizer)
    w[...] = best
    optimizer.refresh_masters()
    assert "master" not in optimizer.state_dict()["state"]["w"]
    assert_same(buffer_of(optimizer), buffer)
    optimizer.step({"w": grads[2], "b": None}, found_inf=True)  # leaves it to the next
    w[0, 0] = best[0, 0] = 2
    plain = {"w": best.astype(np.float32), "b": b.astype(np.float32)}
    other = LARS(plain, **HYPER, kernel=kernel)
    other.load_state_dict(
        other.state_dict()
        | {
            "steps": 1,
            "state": {name: {"previous_lr": 0.3, "momentum_buffer": buffer_of(optimizer, name)} for name in "wb"},
        }
    )
    optimizer.step(grads[2:])
    other.step(grads[2:])
    for name, p in (("w", w), ("b", b)):
        assert_same_bits(master_of(optimizer, name), plain[name], "not trained from what was written")
        assert_same_bits(p, plain[name].astype(half), "not the rounded master")


def test_a_refresh_without_masters_changes_nothing() -> None:
    p = np.ones(3)
    optimizer = LARS([p], **HYPER)
    optimizer.step([p * 2])
    before = fingerprint(optimizer)
    optimizer.refresh_masters()
    assert fingerprint(optimizer) == before
