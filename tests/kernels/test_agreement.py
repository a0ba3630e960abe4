"""The kernels agree with each other and with plain float64 code, wherever arrays lie and whatever they are of."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from references import (
    LAYOUTS,
    assert_close,
    assert_same_bits,
    assert_stored_close,
    flash_step,
    flash_terms,
    gaussian,
    tolerance,
)

from lars_array import LARS, RULES
from lars_array.kernels import NUMPY_KERNELS as KERNELS
from lars_array.kernels import blocked
from lars_array.kernels.compiled import loops, tasks

DTYPES = ["f8", "f4", "f2", "c8", "c16"]
BORDERS_OF = {
    "compiled": [loops.PIECE, (tasks.ROOM_FROM - 1) * loops.PIECE, tasks.CACHE // 2],
    "blocked": sorted({blocked.ROW, blocked.SMALL, blocked.WIDE, blocked.READ_BLOCK, blocked.WRITE_BLOCK}),
}
SHAPES = [(), (0,), (1,), (3, 0, 2), (1, 1, 1), (7,), (3, 5), (2, 3, 4, 5), (129, 8), (33, 31, 3)]
EVERYTHING = {"lr": 0.3, "momentum": 0.9, "weight_decay": 0.01, "trust_coefficient": 0.1}
HYPER: dict[str, dict[str, Any]] = {
    "all": EVERYTHING,
    "nesterov": EVERYTHING | {"nesterov": True},
    "dampening": EVERYTHING | {"dampening": 0.3},
    "no momentum": EVERYTHING | {"momentum": 0},
    "no decay": EVERYTHING | {"weight_decay": 0},
    "neither": {"lr": 0.3},
    "large steps": EVERYTHING | {"lr": 30.0, "trust_coefficient": 1.0},
}


def assert_is_flash(p: Any, gradients: list[Any], hyper: dict[str, Any], kernel: str, what: str) -> LARS:
    """Hold each step against the reference, which starts where the kernel stood."""
    given = {"eta" if name == "trust_coefficient" else name: value for name, value in hyper.items()}
    optimizer = LARS({"w": p}, **hyper, kernel=kernel)
    for count, g in enumerate(gradients):
        v = optimizer.state_dict()["state"]["w"].get("momentum_buffer")
        new_p, new_v = flash_step(p, g, v, **given)
        size_p, size_v = flash_terms(p, g, v, **given)
        kept = g.tobytes()
        optimizer.step({"w": g})
        assert g.tobytes() == kept, f"{what}: the gradient was changed"
        assert_stored_close(p, new_p, tolerance(p.dtype), f"{what}, {kernel}, p after step {count + 1}", size_p)
        v = optimizer.state_dict()["state"]["w"].get("momentum_buffer")
        assert (v is None) == (new_v is None), f"{what}, {kernel}: momentum {v!r}"
        if v is not None:
            assert_close(v, new_v, tolerance(p.dtype), f"{what}, {kernel}, v after step {count + 1}", size_v)
    return optimizer


def arrays(shape: tuple[int, ...], dtype: str, steps: int = 2) -> tuple[Any, list[Any]]:
    rng = np.random.default_rng(sum(shape) + 1)
    return gaussian(rng, shape, dtype), [gaussian(rng, shape, dtype) for _ in range(steps)]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hyper", HYPER)
def test_kernels_do_what_flash_does(dtype: str, hyper: str, kernel: str) -> None:
    for shape in SHAPES:
        p, gradients = arrays(shape, dtype, steps=3)
        assert_is_flash(p, gradients, HYPER[hyper], kernel, f"{shape}, {dtype}")


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("hyper", HYPER)
def test_a_norm_of_zero_means_what_it_does_in_flash(hyper: str, kernel: str) -> None:
    zeros, ones = np.zeros((3, 5)), np.ones((3, 5))
    assert_is_flash(zeros.copy(), [ones, zeros, ones], HYPER[hyper], kernel, "fresh parameters")
    assert_is_flash(ones.copy(), [zeros, ones, zeros], HYPER[hyper], kernel, "no gradient")
    assert_is_flash(zeros.copy(), [zeros, zeros], HYPER[hyper], kernel, "neither")


@pytest.mark.parametrize("dtype", ["f4", "f2", "c8"])
@pytest.mark.parametrize(
    ("kernel", "border"), [(kernel, border) for kernel, borders in BORDERS_OF.items() for border in borders]
)
def test_sizes_around_the_borders_of_blocks(border: int, dtype: str, kernel: str) -> None:
    # Complex numbers reach each border at half of it, since their blocks are of real ones.
    for size in (border - 1, border, border + 1, *([border // 2, border // 2 + 1] if dtype == "c8" else [])):
        p, gradients = arrays((size,), dtype)
        assert_is_flash(p, gradients, EVERYTHING, kernel, f"{size} of {dtype}")
        p, gradients = arrays((size,), dtype)
        strided = LAYOUTS["strided"]
        assert_is_flash(strided(p), [strided(g) for g in gradients], EVERYTHING, kernel, f"{size} of {dtype}, strided")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("of_g", LAYOUTS)
@pytest.mark.parametrize("of_p", LAYOUTS)
def test_layouts(of_p: str, of_g: str, dtype: str) -> None:
    for shape in [(5, 7, 3), (4, 1, 6), (2, 3), (11,), ()]:
        p, gradients = arrays(shape, dtype)
        laid, graded = LAYOUTS[of_p](p), [LAYOUTS[of_g](g) for g in gradients]
        if "big-endian" in (of_p, of_g):  # a gradient has its parameter's dtype, byte order included
            laid = laid.astype(laid.dtype.newbyteorder(">"))
            graded = [g.astype(g.dtype.newbyteorder(">")) for g in graded]
        for kernel in KERNELS:
            assert_is_flash(laid.copy(order="K"), graded, EVERYTHING, kernel, f"{shape}, {of_p}, {of_g}")
        # copy() tidies up some layouts, so once more on the array itself.
        assert_is_flash(laid, graded, EVERYTHING, "compiled", f"{shape}, {of_p}, {of_g}")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_many_blocks(layout: str) -> None:
    p, gradients = arrays((517, 521), "f4")
    laid = LAYOUTS[layout](p)
    graded = [g.astype(laid.dtype) for g in gradients]
    assert_is_flash(laid, graded, EVERYTHING, "blocked", layout)
    assert_is_flash(laid, [LAYOUTS[layout](g) for g in gradients], EVERYTHING, "blocked", layout)


def test_elements_beside_a_view_are_let_be() -> None:
    whole = np.arange(600.0).reshape(20, 30)
    before = whole.copy()
    optimizer = LARS({"w": whole[1:-1:2, 3:20:3]}, **EVERYTHING)
    for _ in range(2):
        optimizer.step({"w": np.ones((9, 6))})
    inside = np.zeros_like(whole, dtype=bool)
    inside[1:-1:2, 3:20:3] = True
    assert np.array_equal(whole[~inside], before[~inside])
    assert not np.any(whole[inside] == before[inside])


def test_momentum_of_another_layout() -> None:
    # A buffer that a step allocates lies as its parameter does; an attached one lies as its owner has it.
    for turned in ("Fortran", "strided", "reversed", "unaligned"):
        p, (first, second) = arrays((37, 41), "f4")
        mine, other = p.copy(), p.copy()
        plain = LARS({"w": mine}, **EVERYTHING)
        strange = LARS({"w": other}, **EVERYTHING)
        plain.step({"w": first})
        strange.step({"w": first})
        state = strange.state_views()
        state["w"]["momentum_buffer"] = LAYOUTS[turned](state["w"]["momentum_buffer"])
        strange.attach_state(state)
        plain.step({"w": second})
        strange.step({"w": second})
        assert_close(other, mine, tolerance("f4"), turned)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("layout", ["C", "strided"])
def test_bfloat16(layout: str, kernel: str) -> None:
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    for size in (1, 1025, 70_000):
        p, gradients = arrays((size,), "f4")
        laid, graded = (LAYOUTS[layout](x.astype(bfloat16)) for x in (p, gradients[0]))
        optimizer = assert_is_flash(laid, [graded, graded], HYPER["large steps"], kernel, f"{size} of bfloat16")
        assert optimizer.state_dict()["state"]["w"]["momentum_buffer"].dtype == np.float32


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_kernels_agree_on_every_rule(rule: str, nesterov: bool, dtype: str) -> None:
    options: dict[str, Any] = EVERYTHING | {
        "rule": rule,
        "nesterov": nesterov,
        "rescale_grad": 0.5,
        "max_grad_norm": 20.0,
    }
    for given in (options, options | {"momentum": 0, "nesterov": False}, options | {"trust_clip": True}):
        results = []
        for kernel in KERNELS:
            layers = {str(shape): arrays(shape, dtype, steps=3) for shape in [(), (0,), (3, 5), (41, 31)]}
            layers["zeros"] = np.zeros(3, dtype), [np.ones(3, dtype)] * 3
            layers["still"] = np.ones(3, dtype), [np.zeros(3, dtype)] * 3
            params = {name: layer[0] for name, layer in layers.items()}
            optimizer = LARS(params, **given, kernel=kernel)
            for step in range(3):
                optimizer.step({name: layer[1][step] for name, layer in layers.items()})
            results.append((params, optimizer.state_dict()["state"]))
        theirs, their_state = results[KERNELS.index("portable")]
        for kernel, (ours, our_state) in zip(KERNELS, results, strict=True):
            for name, p in ours.items():
                what = f"{rule}, {kernel}: {name}"
                assert_stored_close(p, theirs[name].astype(np.result_type(dtype, "f8")), tolerance(dtype, 32), what)
                v, other = (state[name].get("momentum_buffer") for state in (our_state, their_state))
                assert (v is None) == (other is None)
                if v is not None:
                    assert_close(v, other, tolerance(dtype, 32), f"momentum of {what}")


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_is_in_place(layout: str, kernel: str) -> None:
    p, gradients = arrays((19, 23), "f4")
    p = LAYOUTS[layout](p)
    optimizer = LARS({"w": p}, **EVERYTHING, kernel=kernel)
    for given in gradients:
        g = LAYOUTS[layout](given)
        kept, before = g.copy(order="K"), p.copy()
        g.flags.writeable = False
        pointer = p.__array_interface__["data"][0], p.strides
        optimizer.step({"w": g})
        assert optimizer.param_groups[0]["params"][0] is p
        assert (p.__array_interface__["data"][0], p.strides) == pointer
        assert_same_bits(g, kept, layout)
        assert not np.array_equal(p, before)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_nonfinite_number_propagates(kernel: str) -> None:
    # An infinite gradient makes the trust ratio zero, and 0 inf is nan: it may not be left out with its factor.
    for bad in (np.inf, -np.inf, np.nan):
        for options in ({"lr": 0.1}, EVERYTHING, EVERYTHING | {"max_grad_norm": 1.0}, HYPER["no momentum"]):
            p, g = np.array([1.0, 4.0, 2.0]), np.array([1.0, bad, 3.0])
            optimizer = LARS({"w": p}, **options, nonfinite="propagate", kernel=kernel)
            optimizer.step({"w": g})
            assert not np.isfinite(p[1]), f"{bad}, {options}: {p}"
            p, g = np.array([1.0, bad, 2.0]), np.array([1.0, 4.0, 3.0])
            LARS({"w": p}, **options, nonfinite="propagate", kernel=kernel).step({"w": g})
            assert not np.isfinite(p[1]), f"{bad}, {options}: {p}"
