"""What holds for all arrays and hyper-parameters."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
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
from strategies import (
    FEW,
    any_options,
    assert_results_close,
    assert_results_same,
    dtypes,
    flash_options,
    layers_of,
    run,
    scales,
    seeds,
    shapes,
)

from lars_array import LARS, RULES, init, lars_step, update


@given(
    shapes,
    dtypes,
    seeds,
    st.sampled_from(sorted(LAYOUTS)),
    st.sampled_from(sorted(LAYOUTS)),
    flash_options,
    st.one_of(st.just({}), st.just({"nesterov": True}), st.just({"dampening": 0.3})),
    scales,
)
def test_both_kernels_are_the_reference(
    shape: tuple[int, ...], dtype: str, seed: int, of_p: str, of_g: str, options: Any, more: Any, scale: float
) -> None:
    options = options | more
    assume(not options.get("nesterov") or options["momentum"] > 0)
    rng = np.random.default_rng(seed)
    start = LAYOUTS[of_p](gaussian(rng, shape, dtype))
    gradients = [LAYOUTS[of_g](np.asarray(gaussian(rng, shape, dtype) * scale).astype(dtype)) for _ in range(2)]
    gradients = [g.astype(start.dtype) for g in gradients]
    plain = {"eta" if name == "trust_coefficient" else name: value for name, value in options.items()}
    for kernel in ("blocked", "portable"):
        p, v = start.copy(order="K"), None
        optimizer = LARS({"w": p}, **options, kernel=kernel)
        for g in gradients:
            new_p, new_v = flash_step(p, g, v, **plain)
            size_p, size_v = flash_terms(p, g, v, **plain)
            optimizer.step({"w": g})
            assert_stored_close(p, new_p, tolerance(dtype), f"p, {kernel}", size_p)
            v = optimizer.state_dict()["state"]["w"].get("momentum_buffer")
            assert (v is None) == (new_v is None)
            if v is not None:
                assert_close(v, new_v, tolerance(dtype), f"v, {kernel}", size_v)


def ratios_of(p: Any, g: Any, rule: str, dtype: str, weight_decay: float) -> float:
    optimizer = LARS(
        {"w": p.astype(dtype)},
        lr=0.1,
        eps=0.0,
        weight_decay=weight_decay,
        rule=rule,
        always_adapt=True,
        trust_bounds=(0.0, np.inf),
    )
    optimizer.step({"w": g.astype(dtype)})
    return optimizer.trust_ratios()["w"]


@FEW
@given(seeds, st.floats(1e-6, 1e6), st.sampled_from(sorted(RULES)), st.sampled_from(["f8", "f4"]))
def test_trust_ratio_is_invariant_to_scale(seed: int, c: float, rule: str, dtype: str) -> None:
    rng = np.random.default_rng(seed)
    p, g = rng.standard_normal((2, 30))
    allowed = 1e-12 if dtype == "f8" else 1e-6
    for w in (0.0, 0.3):  # p and g together: even with decay
        ratio = ratios_of(p, g, rule, dtype, w)
        assert ratio > 0 and ratio != 1
        assert ratios_of(c * p, c * g, rule, dtype, w) == pytest.approx(ratio, rel=allowed)
    assert ratios_of(p, c * g, rule, dtype, 0.0) == pytest.approx(ratios_of(p, g, rule, dtype, 0.0) / c, rel=allowed)


@FEW
@given(seeds, flash_options, st.booleans(), st.sampled_from(["f8", "f4"]))
def test_without_decay_flash_is_sgd_with_momentum(seed: int, options: Any, nesterov: bool, dtype: str) -> None:
    nesterov = nesterov and options["momentum"] > 0
    params, gradients = layers_of(seed, dtype)
    ours = run(params, gradients, **options | {"weight_decay": 0, "nesterov": nesterov})
    mu, lr = options["momentum"], options["lr"]
    for name, p in params.items():
        p, v = p.astype("f8"), 0.0
        for grads in gradients:
            d = grads[name].astype("f8")
            v = mu * v + d
            p = p - lr * (d + mu * v if nesterov else v)
        assert_close(ours[name], np.asarray(p), tolerance(dtype, 16), name, 10 * lr + 3)


@FEW
@given(seeds, st.booleans(), st.sampled_from([0.0, 0.3]), st.sampled_from(["blocked", "portable"]))
def test_simclr_popular_divides_by_the_norm_of_its_step(seed: int, nesterov: bool, w: float, kernel: str) -> None:
    params, gradients = layers_of(seed)
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": w, "trust_coefficient": 0.5, "eps": 0.0}
    ours = run(params, gradients, **options, rule="simclr-popular", nesterov=nesterov, kernel=kernel)
    for name, p in params.items():
        p, v = np.array(p), 0.0
        for grads in gradients:
            d = grads[name] + w * p
            v = 0.9 * v + d
            step = d + 0.9 * v if nesterov else v
            p_norm, norm = np.sqrt(np.sum(p * p)), np.sqrt(np.sum(step * step))
            p = p - 0.1 * (0.5 * p_norm / norm if p_norm > 0 and norm > 0 else 1.0) * step
        assert_close(ours[name], np.asarray(p), 1e-12, name)


@FEW
@given(seeds, any_options, st.permutations(range(5)), st.sampled_from(["f8", "f4", "f2"]))
def test_order_of_layers_does_not_matter(seed: int, options: Any, order: list[int], dtype: str) -> None:
    params, gradients = layers_of(seed, dtype)
    names = [list(params)[i] for i in order]
    permuted = {name: params[name] for name in names}
    options |= {"nonfinite": "propagate"}  # lr 10 makes float16 overflow, in one order as in the other
    assert_results_same(run(permuted, gradients, **options), run(permuted | params, gradients, **options))
    # Nor that layers of several rules are put together and taken apart again.
    groups = [
        ([name], {"rule": rule}) for name, rule in zip(params, ["timm", "optax", "timm", "flash", "optax"], strict=True)
    ]
    turned = [groups[i] for i in order]
    ours = run(params, gradients, groups=turned, **options)
    assert_results_same(ours, run(params, gradients, groups=groups, **options), "groups,")


@FEW
@given(seeds, any_options, st.sampled_from(["f8", "f4", "f2"]), st.sampled_from([None, 2.0]))
def test_update_is_the_portable_kernel(seed: int, options: Any, dtype: str, clip: float | None) -> None:
    params, gradients = layers_of(seed, dtype)
    for named in (params, *gradients):
        del named["scalar"]  # see the next test
    options |= {"max_grad_norm": clip, "nonfinite": "propagate"}
    now, state = params, init(params)
    for grads in gradients:
        now, state = update(now, grads, state, **options)
    functional = {name: np.asarray(p) for name, p in now.items()}
    in_place = run(params, gradients, **options, kernel="portable")
    for name, p in in_place.items():
        other = state.momentum_buffers[name[2:]] if name.startswith("v ") else functional[name]
        assert_same_bits(np.asarray(other), p, name)


def test_update_returns_arrays_of_no_dimensions_as_arrays() -> None:
    # NumPy's arithmetic makes scalars of them, which the next step would refuse.
    params, gradients = {"scalar": np.array(3.0)}, {"scalar": np.array(1.0)}
    state = init(params)
    for _ in range(3):
        params, state = update(params, gradients, state, lr=0.1, momentum=0.9)
    want = run({"scalar": np.array(3.0)}, [gradients] * 3, lr=0.1, momentum=0.9)
    assert_same_bits(params["scalar"], want["scalar"])
    p, v = lars_step(np.array(3.0), np.array(1.0), lr=0.1, momentum=0.9)
    p, v = lars_step(p, np.array(1.0), v, lr=0.1, momentum=0.9)


@FEW
@given(seeds, any_options, st.sampled_from(["blocked", "portable"]))
def test_slices_of_one_array_are_layers_like_others(seed: int, options: Any, kernel: str) -> None:
    params, gradients = layers_of(seed, "f4")
    options |= {"nonfinite": "propagate"}
    flat = np.concatenate([p.reshape(-1) for p in params.values()])
    ends = np.cumsum([p.size for p in params.values()])
    views = np.split(flat, ends[:-1])
    views = {name: view.reshape(p.shape) for (name, p), view in zip(params.items(), views, strict=True)}
    optimizer = LARS(views, **options, kernel=kernel)
    for grads in gradients:
        optimizer.step(grads)
    assert all(np.shares_memory(flat, view) for view in views.values())
    apart = run(params, gradients, **options, kernel=kernel)
    assert_results_same(views, {name: apart[name] for name in params})


@FEW
@given(seeds, any_options, st.sampled_from(["f8", "f4"]))
def test_maximize_negates_and_rescale_grad_scales(seed: int, options: Any, dtype: str) -> None:
    params, gradients = layers_of(seed, dtype)
    options |= {"maximize": False, "rescale_grad": 1.0, "nonfinite": "propagate"}
    negated = [{name: np.negative(g, out=np.empty_like(g)) for name, g in grads.items()} for grads in gradients]
    plain = run(params, negated, **options)
    assert_results_close(
        run(params, gradients, **options | {"maximize": True}), plain, tolerance(dtype, 64), "maximize,", 1e-3
    )
    eighth = [
        {name: np.asarray(g / 8) for name, g in grads.items()} for grads in gradients
    ]  # exact, so that only ours rounds
    plain = run(params, eighth, **options)
    ours = run(params, gradients, **options | {"rescale_grad": 0.125})
    assert_results_close(ours, plain, tolerance(dtype, 64), "rescale_grad,", 1e-3)
    both = run(
        params,
        [{name: np.negative(g, out=np.empty_like(g)) for name, g in grads.items()} for grads in eighth],
        **options,
    )
    ours = run(params, gradients, **options | {"rescale_grad": 0.125, "maximize": True})
    assert_results_close(ours, both, tolerance(dtype, 64), "both,", 1e-3)
