"""Gradients of another real type than their parameter: float32 for float16, bfloat16 for float32, and so on."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from assertions import assert_refused
from hypothesis import given
from hypothesis import strategies as st
from references import (
    COMPUTED_IN,
    LAYOUTS,
    assert_close,
    assert_same_bits,
    assert_stored_close,
    flash_step,
    flash_terms,
    gaussian,
    tolerance,
)
from strategies import FEW, scales, seeds, shapes

import lars_array.state.store
from lars_array import LARS, NonFiniteError, init, lars_step, update
from lars_array.kernels import NUMPY_KERNELS as KERNELS
from lars_array.kernels.compiled import loops, table
from lars_array.kernels.compiled.loops import MEASURE, PIECE, WRITE
from lars_array.kernels.compiled.tasks import ROOM_FROM

REAL = {"float64": "f8", "float32": "f4", "float16": "f2", "bfloat16": ml_dtypes.bfloat16}
HYPER: dict[str, Any] = {"lr": 0.3, "momentum": 0.9, "weight_decay": 0.01, "trust_coefficient": 0.1}
ETA = {"eta" if name == "trust_coefficient" else name: value for name, value in HYPER.items()}
PAIRS = [(of_p, of_g) for of_p in REAL for of_g in REAL if of_p != of_g]

types = st.sampled_from(sorted(REAL)).map(REAL.__getitem__)
layouts = st.sampled_from(sorted(LAYOUTS)).map(LAYOUTS.__getitem__)


@FEW
@given(shapes, types, types, seeds, layouts, layouts, scales, st.sampled_from(KERNELS), st.booleans())
def test_every_combination_is_the_reference(
    shape: tuple[int, ...],
    of_p: Any,
    of_g: Any,
    seed: int,
    lay_p: Any,
    lay_g: Any,
    scale: float,
    kernel: str,
    nesterov: bool,
) -> None:
    rng = np.random.default_rng(seed)
    p = lay_p(np.asarray(gaussian(rng, shape, of_p)))
    optimizer = LARS({"w": p}, **HYPER, nesterov=nesterov, kernel=kernel)
    for _ in range(2):
        g = lay_g(np.asarray(scale * gaussian(rng, shape, of_g)).astype(of_g))
        v = optimizer.state_dict()["state"]["w"].get("momentum_buffer")
        new_p, new_v = flash_step(p, g, v, **ETA, nesterov=nesterov)
        size_p, size_v = flash_terms(p, g, v, **ETA, nesterov=nesterov)
        kept = g.tobytes()
        optimizer.step([g])
        assert g.tobytes() == kept
        state = optimizer.state_dict()["state"]["w"]
        assert state["momentum_buffer"].dtype == COMPUTED_IN[p.dtype.name] and "master" not in state
        assert_stored_close(p, new_p, tolerance(p.dtype), "p", size_p)
        assert_close(state["momentum_buffer"], new_v, tolerance(p.dtype), "v", size_v)


@pytest.mark.parametrize("rule", ["flash", "barlow", "simclr-popular"])
@pytest.mark.parametrize(("of_p", "of_g"), PAIRS)
def test_kernels_agree_on_every_rule_that_has_a_sum_of_its_own(of_p: str, of_g: str, rule: str) -> None:
    results = []
    for kernel in KERNELS:
        rng = np.random.default_rng(0)
        params = [gaussian(rng, shape, REAL[of_p]) for shape in [(31, 40), (7,), (0, 2), ()]]
        params = [np.asarray(p) for p in params]
        optimizer = LARS(params, **HYPER, rule=rule, max_grad_norm=1.0, kernel=kernel)
        for _ in range(3):
            optimizer.step([np.asarray(gaussian(rng, p.shape, REAL[of_g])) for p in params])
        results.append(params)
    for kernel, params in zip(KERNELS, results, strict=True):
        for ours, theirs in zip(params, results[-1], strict=True):
            assert_stored_close(ours, theirs.astype("f8"), tolerance(ours.dtype, 32), kernel)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("rule", ["flash", "barlow"])
def test_sums_are_of_the_values_as_they_are_given(rule: str, kernel: str) -> None:
    for scale in (1 + 1e-12, 1e-60, 1e30):  # more digits than float32 has, and beyond its range
        p, g = np.ones(3000, np.float32), np.full(3000, scale)
        optimizer = LARS([p], 0.1, weight_decay=0.1, rule=rule, nonfinite="propagate", kernel=kernel)
        optimizer.step([g])
        assert optimizer.norms()["0"].gradient == pytest.approx(scale * 3000**0.5, rel=1e-14)
    for of_g in ("float32", "bfloat16"):
        p, g = np.ones(3000), gaussian(np.random.default_rng(0), (3000,), REAL[of_g])
        optimizer = LARS([p], 0.1, weight_decay=0.1, rule=rule, kernel=kernel)
        optimizer.step([g])
        assert optimizer.norms()["0"].gradient == pytest.approx(np.linalg.norm(g.astype("f8")), rel=1e-14)


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_third_sum_is_of_the_values_as_they_are_given(kernel: str) -> None:
    p, g = np.ones(3000, np.float32), np.random.default_rng(0).standard_normal(3000)
    expected = np.sqrt(3000) / np.linalg.norm(g + 0.1 * p.astype(np.float64))
    optimizer = LARS([p], 0.1, weight_decay=0.1, trust_coefficient=1.0, eps=0.0, rule="barlow", kernel=kernel)
    optimizer.step([g])
    assert optimizer.trust_ratios()["0"] == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("shape", "turns"), [((5,), ["float16", "bfloat16"]), ((), ["float32", "float64", "float16"])])
def test_a_type_is_told_from_another_of_the_same_strides(shape: Any, turns: list[str], kernel: str) -> None:
    p, expected = np.ones(shape, np.float32), 1.0
    optimizer = LARS([p], lr=0.25, kernel=kernel)
    for of_g in [*turns, *turns]:
        optimizer.step([np.full(shape, 0.5).astype(REAL[of_g])])
        expected -= 0.125
        assert np.all(p == expected), of_g


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("of_p", ["float32", "float16", "bfloat16"])
def test_a_gradient_that_has_no_place_in_the_type_that_is_computed_in_is_refused(of_p: str, kernel: str) -> None:
    p, q = np.ones(3, REAL[of_p]), np.ones(2, REAL[of_p])
    g = np.array([1.0, 1e39, 1.0])
    optimizer = LARS({"p": p, "q": q}, **HYPER, kernel=kernel)
    kind = np.dtype(REAL[of_p])
    message = f"the update of 'p' overflows {kind!r} or the float64 of its norms; nothing was changed"
    fine = np.ones(2, np.float16)
    assert_refused(lambda: optimizer.step([g, fine]), NonFiniteError, f"{message} (step 0)", optimizer, p, q)
    LARS({"p": p}, **HYPER, kernel=kernel, nonfinite="skip").step([g])
    assert p.tolist() == [1.0] * 3
    state = init({"p": p})
    assert_refused(lambda: update({"p": p}, [g], state, **HYPER), NonFiniteError, message, p)
    assert_refused(lambda: lars_step(p, g, **HYPER, nonfinite="raise"), NonFiniteError, message, p)
    optimizer.step([g / 1e39, fine])
    assert optimizer.steps == 1


def test_a_float32_gradient_of_the_largest_numbers_is_not_refused_for_it() -> None:
    p, g = np.ones(3, np.float32), np.full(3, np.finfo(np.float32).max)
    LARS([p], **HYPER).step([g])
    assert np.all(p < 1)


def test_the_type_may_change_from_step_to_step_and_from_layer_to_layer() -> None:
    rng = np.random.default_rng(2)
    start = [gaussian(rng, (40, 30), kind) for kind in ("f4", "f2", "f4", "f8", "c8")]
    turns: list[list[Any]] = [
        ["f4", "f2", "f4", "f8", "c8"],
        ["f2", "f4", "f8", "f4", "c8"],
        ["f2", "f4", "f8", "f4", "c8"],
        [REAL["bfloat16"], REAL["bfloat16"], "f4", "f2", "c8"],
        ["f4", "f2", ">f4", ">f8", "c8"],
        ["f4", "f2", "f4", "f8", "c8"],
    ]
    steps = [[gaussian(rng, p.shape, kind) for p, kind in zip(start, kinds, strict=True)] for kinds in turns]
    results = []
    for kernel in KERNELS:
        params = [p.copy() for p in start]
        optimizer = LARS(params, **HYPER, kernel=kernel)
        for gradients in steps:
            optimizer.step(gradients)
        results.append(params)
    for params in results:
        for ours, theirs in zip(params, results[-1], strict=True):
            assert_stored_close(ours, theirs.astype(np.result_type(theirs, "f8")), tolerance(ours.dtype, 64))


@pytest.mark.parametrize(("of_p", "of_g"), [("f4", "f2"), ("f4", "f8"), ("f2", "f4"), ("f8", "f4")])
@pytest.mark.parametrize("options", [{}, {"nonfinite": "propagate"}, {"nonfinite": "propagate", "rule": "barlow"}])
def test_bits_do_not_depend_on_threads(
    of_p: str, of_g: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for kernel in ("compiled", "blocked"):
        results = []
        for threads in (1, 2, 7):
            monkeypatch.setenv("LARS_ARRAY_THREADS", str(threads))
            rng = np.random.default_rng(0)
            params = [gaussian(rng, shape, of_p) for shape in [(ROOM_FROM * PIECE + 5,), (300, 301), (7,)]]
            optimizer = LARS(params, **HYPER, **options, kernel=kernel)
            for _ in range(2):
                optimizer.step([gaussian(rng, p.shape, of_g) for p in params])
            results.append(params)
        for params in results[1:]:
            for ours, theirs in zip(params, results[0], strict=True):
                assert_same_bits(ours, theirs, kernel)


def test_compiled_code_reads_such_a_gradient_where_it_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    params = [np.ones(n, kind) for n, kind in [(PIECE, "f4"), (5, "f2"), (70_000, "f4")]]
    gradients = [np.ones(p.shape, kind) for p, kind in zip(params, ["f2", "f4", "f2"], strict=True)]
    optimizer = LARS(params, **HYPER, nonfinite="propagate", kernel="compiled")
    optimizer.step(gradients)
    calls: list[Any] = []
    monkeypatch.setenv("LARS_ARRAY_THREADS", "1")
    monkeypatch.setattr(table, "work", lambda *given: (calls.append(given), loops.work(*given))[1])
    monkeypatch.setattr(lars_array.state.store, "check_gradient", None)  # which would look at one after the other
    optimizer.step(gradients)
    assert [set(todo[:, 0]) for todo, *_ in calls] == [{MEASURE | WRITE}] * 2
    assert sorted(places[:, 1].tolist() for _, _, (places, *_), *_ in calls) == sorted(
        [g.__array_interface__["data"][0] for g in of_type] for of_type in (gradients[::-2], gradients[1:2])
    )


def test_a_gradient_is_as_long_as_its_own_type_makes_it() -> None:
    # As if it were of the parameter's type, it would end where the parameter begins.
    memory = np.zeros(64, np.uint8)
    g, p = memory[:32].view(np.float64), memory[16:32].view(np.float32)
    optimizer = LARS({"p": p}, **HYPER)
    optimizer.step([np.ones(4)])
    message = "the gradient of 'p' must not share memory with parameter 'p'"
    assert_refused(lambda: optimizer.step([g]), ValueError, message, optimizer, memory)
    optimizer.step([memory[32:].view(np.float64)])
    optimizer.step([memory[:8].view(np.float16)])


@pytest.mark.parametrize("kernel", KERNELS)
def test_complex_and_real_do_not_mix(kernel: str) -> None:
    real = "one of the real types float64, float32, float16, bfloat16"
    for of_p, of_g, wanted in [
        ("f4", "c8", f"be of {real}"),
        ("f8", "c16", f"be of {real}"),
        ("f2", "i2", f"be of {real}"),
        ("f4", "?", f"be of {real}"),
        ("c8", "f4", "have the parameter's dtype dtype('complex64')"),
        ("c8", "c16", "have the parameter's dtype dtype('complex64')"),
        ("c16", "f8", "have the parameter's dtype dtype('complex128')"),
    ]:
        p, g = np.ones(3, of_p), np.ones(3, of_g)
        optimizer = LARS({"p": p}, **HYPER, kernel=kernel)
        optimizer.step([np.ones(3, of_p)])
        message = f"the gradient of 'p' must {wanted}; got {g.dtype!r}"
        assert_refused(lambda o=optimizer, g=g: o.step([g]), TypeError, message, optimizer, p)
        assert_refused(lambda p=p, g=g: lars_step(p, g, **HYPER), TypeError, message, p)
        assert_refused(lambda p=p, g=g: update({"p": p}, [g], init({"p": p}), **HYPER), TypeError, message, p)


@pytest.mark.parametrize(("of_p", "of_g"), PAIRS)
def test_the_functions_take_them_too(of_p: str, of_g: str) -> None:
    rng = np.random.default_rng(1)
    start, steps = gaussian(rng, (5, 6), REAL[of_p]), [gaussian(rng, (5, 6), REAL[of_g]) for _ in range(3)]
    p, params, alone, v = start.copy(), {"w": start}, start, None
    optimizer, state = LARS({"w": p}, **HYPER, kernel="portable"), init({"w": start})
    for g in steps:
        optimizer.step([g])
        params, state = update(params, [g], state, **HYPER)
        alone, v = lars_step(alone, g, v, **HYPER)
        assert alone.dtype == params["w"].dtype == start.dtype
    assert_same_bits(params["w"], p)
    assert_same_bits(np.asarray(alone), p)


@pytest.mark.parametrize(("of_p", "of_g"), PAIRS)
def test_torch(of_p: str, of_g: str) -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(1)
    start, steps = gaussian(rng, (5, 6), "f4"), [gaussian(rng, (5, 6), "f4") for _ in range(3)]
    p = torch.tensor(start).to(getattr(torch, of_p))
    here = start.astype(REAL[of_p])
    ours, theirs = LARS([p], **HYPER), LARS([here], **HYPER, kernel="portable")
    for g in steps:
        ours.step([torch.tensor(g).to(getattr(torch, of_g))])
        theirs.step([g.astype(REAL[of_g])])
    assert_stored_close(p.double().numpy().astype(REAL[of_p]), here.astype("f8"), tolerance(here.dtype))
