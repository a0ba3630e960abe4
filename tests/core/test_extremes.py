"""Finite stays finite: gradients of all magnitudes that a type has, and what a NaN does to its layer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from originals import BUFFER, original_step
from ways import FEW, NAMES, WAYS

from lars_array import LARS, preset

SIZE = 12
BASE: dict[str, Any] = {"lr": 0.5, "momentum": 0.9, "eps": 0.0}
LARGEST = {"float32": float(np.finfo("f4").max), "float64": float(np.finfo("f8").max)}

# Around the least number, the least normal one, the least of which the square is, and the same at the other end.
# Left out: gradients whose squares are subnormal, of which a norm has few digits.
SCALES = {
    "float32": (0.0, 1e-45, 1e-42, 1e-40, 1e-38, 1e-35, 1e-30, 1e-24, 1e-18, 1e18, 1e24, 1e35),
    "float64": (0.0, 5e-324, 1e-310, 1e-200, 1e-165, 1e-150, 1e-100, 1e100, 1e150, 1e160, 1e300),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "decay": {"weight_decay": 1e-3},
    "no decay": {},
    "always_adapt": {"always_adapt": True},
    "nesterov": {"nesterov": True, "always_adapt": True},
    "no momentum": {"momentum": 0.0, "always_adapt": True},
    "large lr": {"lr": 50.0, "always_adapt": True},
    "rescaled": {"rescale_grad": 64.0, "always_adapt": True},
}


def drawn(seed: int, scale: float, dtype: str) -> Any:
    """Return numbers of one magnitude; the least number of a type is all of them."""
    x = np.random.default_rng(seed).choice([-1.0, 1.0], SIZE) * np.linspace(1.0, 2.0, SIZE)
    return (x * scale).astype(dtype)


@pytest.mark.parametrize("rule", NAMES)
@pytest.mark.parametrize("dtype", SCALES)
@pytest.mark.parametrize("way", WAYS)
def test_gradients_of_all_magnitudes(way: str, dtype: str, rule: str) -> None:
    """An ordinary step, one with an extreme gradient, and an ordinary one again: the arithmetic of the original."""
    p = drawn(0, 1.0, dtype)
    for name in ("decay", "always_adapt") if way in FEW else OPTIONS:
        options = BASE | OPTIONS[name] | {"rule": rule}
        given = {key: x for key, x in options.items() if key != "rule"}
        for scale in SCALES[dtype] if way not in FEW else SCALES[dtype][2::3]:
            if dtype == "float32" and not 1e-37 < scale < 1e30 and way in FEW:
                continue  # XLA takes subnormal numbers for 0, also as coefficients
            grads = [drawn(1, 1.0, dtype), drawn(2, scale, dtype), drawn(3, 1.0, dtype)]
            with np.errstate(all="ignore"):
                found = WAYS[way](p, grads, **options)
                expected, v = p, None
                for t, g in enumerate(grads):
                    expected, v = original_step(rule, expected, g, v, kind=np.float64, largest=LARGEST[dtype], **given)
                    what = f"{name}, gradient of {scale} in step {t + 1}"
                    assert np.isfinite(expected).all(), f"{what}: the reference is not finite"
                    assert np.isfinite(found[t]).all(), what
                    allowed = 2e-5 if dtype == "float32" else 1e-12
                    worst, most = np.max(np.abs(found[t] - expected)), np.max(np.abs(expected))
                    assert worst <= allowed * most, f"{what}: off by {worst}, of {most}"


@pytest.mark.parametrize("rule", NAMES)
@pytest.mark.parametrize("dtype", SCALES)
@pytest.mark.parametrize("way", [way for way in WAYS if way not in FEW])
def test_finite_where_the_original_is(way: str, dtype: str, rule: str) -> None:
    """Random magnitudes over nearly all that a type has, where neither lr eta |p| nor the squares of v overflow."""
    rng = np.random.default_rng(NAMES.index(rule))
    lowest, highest, of_p = (-45, 37, 37) if dtype == "float32" else (-323, 306, 150)
    compared = 0
    for _ in range(80):
        scales = [10.0 ** rng.uniform(lowest, x) for x in (of_p, highest, highest)]
        p, g, v = (drawn(int(rng.integers(99)), scale, dtype) for scale in scales)
        p, v = (x if rng.random() < 0.5 else drawn(int(rng.integers(99)), 1.0, dtype) for x in (p, v))
        v = v if np.max(np.abs(v)) < LARGEST[dtype] ** 0.4 or rule not in BUFFER else drawn(5, 1.0, dtype)

        def number(*usual: float, lowest: float = -9.0) -> float:
            return float(rng.choice([*usual, 10.0 ** rng.uniform(lowest, 9)]))

        given = {
            "lr": number(0.1, 1.0),
            "momentum": float(rng.choice([0.0, 0.9])),
            "weight_decay": number(0.0, 1e-4, lowest=-30.0),
            "trust_coefficient": number(1e-3),
            "rescale_grad": number(1.0),
            "always_adapt": bool(rng.integers(2)),
            "eps": 0.0,
        }
        given["nesterov"] = given["momentum"] > 0 and bool(rng.integers(2))
        with np.errstate(all="ignore"):
            theirs, _ = original_step(rule, p, g, v, kind=np.dtype(dtype).type, **given)
            step = given["lr"] * given["trust_coefficient"] * np.sqrt(np.sum(p.astype(float) ** 2))
            if np.isfinite(theirs).all() and step < LARGEST[dtype]:
                compared += 1
                ours = WAYS[way](p, [g], v, rule=rule, **given)[0]
                assert np.isfinite(ours).all(), f"{given}, p {p[0]}, g {g[0]}, v {v[0]}"
    assert compared >= 10


# -------------------------------------------------------------------------------------------------- a fitted classifier


def separable(dtype: str) -> tuple[Any, Any]:
    """Return points of two classes with a gap between them, and the classes."""
    rng = np.random.default_rng(0)
    labels = np.arange(64) % 2
    points = rng.standard_normal((64, 5))
    points[:, 0] = (2 * labels - 1) * (1 + np.abs(points[:, 0]))
    return points.astype(dtype), labels


def slopes(params: dict[str, Any], points: Any, labels: Any) -> dict[str, Any]:
    """Return the gradients of the cross entropy of a linear layer, computed without loss of small numbers."""
    scores = points @ params["w"] + params["b"]
    right = scores[np.arange(len(labels)), labels]
    wrong = scores[np.arange(len(labels)), 1 - labels]
    margin = (right - wrong).astype("f8")
    miss = (np.exp(-np.maximum(margin, 0)) / (1 + np.exp(-np.abs(margin)))).astype(points.dtype)
    miss = np.where(margin < 0, 1 - np.exp(margin) / (1 + np.exp(margin)), miss).astype(points.dtype)
    outer = np.stack([np.where(labels == 0, -miss, miss), np.where(labels == 0, miss, -miss)], axis=1) / len(labels)
    return {"w": points.T @ outer, "b": outer.sum(axis=0)}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("rule", NAMES)
def test_a_classifier_that_fits_its_data_stays_finite(rule: str, dtype: str) -> None:
    points, labels = separable(dtype)
    rng = np.random.default_rng(1)
    params = {"w": 0.1 * rng.standard_normal((5, 2)).astype(dtype), "b": np.zeros(2, dtype)}
    optimizer = LARS(params, **preset(rule) | {"lr": 1.0, "momentum": 0.9, "weight_decay": 0.0, "always_adapt": True})
    with np.errstate(all="ignore"):
        for _ in range(3000):
            optimizer.step(slopes(params, points, labels))  # which raises where something is not finite
    assert all(np.isfinite(p).all() for p in params.values())
    scores = points @ params["w"] + params["b"]
    assert np.all(np.argmax(scores, axis=1) == labels)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("rule", ["barlow", "optax", "kozistr", "tf-contrib"])
def test_it_stays_finite_under_jit(rule: str, wide: bool) -> None:
    jax, lars_jax = pytest.importorskip("jax"), pytest.importorskip("lars_jax")
    points, labels = separable("float32")
    solver = lars_jax.lars(1.0, momentum=0.9, rule=rule)

    def loss(params: Any) -> Any:
        scores = points @ params["w"] + params["b"]
        return jax.numpy.mean(jax.nn.softplus(scores[:, 1] * (1 - 2 * labels).astype("f4")))

    def step(carry: Any, _: Any) -> Any:
        params, state = carry
        updates, state = solver.update(jax.grad(loss)(params), state, params)
        return (jax.tree.map(jax.numpy.add, params, updates), state), None

    with jax.enable_x64(wide):
        params = {"w": jax.numpy.full((5, 2), 0.1, "float32"), "b": jax.numpy.zeros(2, "float32")}
        (params, state), _ = jax.jit(lambda c: jax.lax.scan(step, c, length=3000))((params, solver.init(params)))
        assert all(bool(jax.numpy.isfinite(x).all()) for x in jax.tree.leaves((params, state)))
