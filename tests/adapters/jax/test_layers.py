"""What is a layer to `lars_jax.lars`: slices of stacked leaves, several leaves together; and how exact norms are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lars_jax import lars


@pytest.fixture(autouse=True)
def strict() -> Iterator[None]:
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


def draw(seed: int, *shape: int) -> Any:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def assert_close(ours: Any, theirs: Any) -> None:
    np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), rtol=2e-6, atol=1e-9)


@pytest.mark.parametrize("options", [{}, {"rule": "simclr-popular", "max_grad_norm": 1.0}], ids=str)
def test_slices_of_a_stacked_leaf_are_layers(options: dict[str, Any]) -> None:
    options = {"weight_decay": 0.1, **options}
    stacked = {"w": draw(0, 3, 4, 2), "b": draw(1, 5)}
    apart = {"w": list(stacked["w"]), "b": stacked["b"]}
    ours = lars(0.1, layer_axes={"w": 1, "b": 0}, **options)
    theirs = lars(0.1, **options)
    state, other = ours.init(stacked), theirs.init(apart)
    for t in range(3):
        grads = {"w": draw(10 + t, 3, 4, 2), "b": draw(20 + t, 5)}
        updates, state = jax.jit(ours.update)(grads, state, stacked)
        expected, other = theirs.update({"w": list(grads["w"]), "b": grads["b"]}, other, apart)
        assert_close(updates["w"], jnp.stack(expected["w"]))
        assert_close(updates["b"], expected["b"])
    assert state.first.shape == state.previous_lr.shape == (2,)
    rows = draw(2, 4, 1)
    flat = lars(0.1, layer_axes=1, weight_decay=0.1)
    found, _ = flat.update(rows[:, 0], flat.init(rows[:, 0]), rows[:, 0])
    alone = lars(0.1, weight_decay=0.1)
    expected = [alone.update(row, alone.init(row), row)[0] for row in rows]
    assert_close(found, jnp.concatenate(expected))


def test_leaves_of_one_label_are_one_layer() -> None:
    parts = {"attention": {"q": draw(0, 4), "k": draw(1, 4)}, "b": draw(2, 3)}
    whole = {"attention": jnp.concatenate([parts["attention"]["q"], parts["attention"]["k"]]), "b": parts["b"]}
    ours = lars(0.1, weight_decay=0.1, layer_of={"attention.q": "qk", "attention.k": "qk"})
    theirs = lars(0.1, weight_decay=0.1)
    updates, _ = ours.update(parts, ours.init(parts), parts)
    expected, _ = theirs.update(whole, theirs.init(whole), whole)
    assert_close(jnp.concatenate([updates["attention"]["q"], updates["attention"]["k"]]), expected["attention"])
    assert_close(updates["b"], expected["b"])


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"layer_axes": 2}, ValueError, "layer_axes must be at most the 1 axes of 'b'; got 2"),
        ({"layer_axes": {"b": True}}, TypeError, "layer_axes must hold integers of at least 0; got True"),
        ({"layer_of": {"c": 1}}, ValueError, "layer_of must hold names of parameters; got 'c'"),
        ({"axis_name": [jnp.ones(1)]}, ValueError, "axis_name must have the structure"),
        ({"axis_name": {"b": jnp.ones(1)}}, TypeError, "axis_name must hold names of mapped axes; got ArrayImpl"),
    ],
)
def test_refusals(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    params = {"b": jnp.ones(2)}
    solver = lars(0.1, **options)
    with pytest.raises(kind, match=message):
        solver.update(params, solver.init(params), params)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_norms_of_many_million_elements_are_exact(dtype: str) -> None:
    """They are seen through the ratio: with eta = 1, no decay and one step, the update is the ratio times g."""
    size = 20_000_000
    p = np.random.default_rng(0).standard_normal(size, np.float32).astype(dtype)
    g = np.full(size, 0.1, np.float32).astype(dtype)
    norm_of_p, norm_of_g = (np.sqrt(np.sum(np.square(x, dtype=np.float64))) for x in (p, g))
    solver = lars(1.0, momentum=0.0, trust_coefficient=1.0, eps=0.0, always_adapt=True, rule="flash")

    def first(p: Any, g: Any) -> Any:
        update, _ = solver.update(g, solver.init(p), p)
        return update[:1].astype(jnp.float32)

    found = -float(jax.jit(first)(jnp.asarray(p), jnp.asarray(g))[0])
    expected = float(norm_of_p / norm_of_g * np.float64(g[0]))
    assert abs(found / expected - 1) <= {"float32": 1e-6, "bfloat16": 2**-8, "float16": 2**-10}[dtype]
