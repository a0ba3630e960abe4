"""`param_groups` of a tree: masks of the leaves that the groups of arrays exclude."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lars_array
import lars_jax
from lars_array import is_bias_or_norm

PARAMS = {
    "attention": {"kernel": jnp.ones((2, 3, 4)), "bias": jnp.ones((2, 3))},
    "norm": {"scale": jnp.ones(3)},
    "head": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)},
    "temperature": jnp.ones(()),
    "count": jnp.ones((2, 2), jnp.int32),
}


def masked(**options: Any) -> tuple[set[str], set[str]]:
    found = lars_jax.param_groups(PARAMS, 0.1, **options)
    assert found["weight_decay"] == 0.1
    trees = [found["weight_decay_mask"], found["trust_ratio_mask"]]
    paths = [jax.tree_util.tree_flatten_with_path(tree)[0] for tree in trees]
    decayed, adapted = ({jax.tree_util.keystr(p, simple=True, separator=".") for p, x in own if x} for own in paths)
    return decayed, adapted


WEIGHTS = {"attention.kernel", "head.kernel"}
ALL = {*WEIGHTS, "attention.bias", "norm.scale", "head.bias", "temperature"}


@pytest.mark.parametrize(
    ("options", "decayed", "adapted"),
    [
        ({}, WEIGHTS, WEIGHTS),
        ({"no_adapt": None}, WEIGHTS, ALL),
        ({"no_decay": None, "no_adapt": None}, ALL, ALL),
        ({"no_decay": [is_bias_or_norm, "head"]}, {"attention.kernel"}, WEIGHTS),
        ({"no_decay": ["kernel$"], "no_adapt": lambda name, p: p.ndim == 3}, ALL - WEIGHTS, ALL - {"attention.kernel"}),
    ],
)
def test_masks_exclude_what_the_groups_of_arrays_do(options: Any, decayed: set[str], adapted: set[str]) -> None:
    assert masked(**options) == (decayed, adapted)


@pytest.mark.parametrize("no_adapt", [is_bias_or_norm, None])
def test_steps_are_those_of_the_groups(no_adapt: Any) -> None:
    params = {name: x for name, x in PARAMS.items() if name != "count"}
    leaves = {"attention.kernel": (2, 3, 4), "attention.bias": (2, 3), "norm.scale": (3,), "head.kernel": (3, 2)}
    leaves |= {"head.bias": (2,), "temperature": ()}
    arrays = {name: np.ones(shape, np.float32) for name, shape in leaves.items()}
    reference = lars_array.LARS(lars_array.param_groups(arrays, 0.1, no_adapt=no_adapt), lr=0.5, momentum=0.9)
    options = lars_jax.param_groups(params, 0.1, no_adapt=no_adapt)
    solver = lars_jax.lars(0.5, momentum=0.9, **options)
    eager = lars_jax.LARS(params, lr=0.5, momentum=0.9, **options)
    state = solver.init(params)
    for _ in range(2):
        grads = jax.tree.map(lambda p: jnp.full_like(p, 0.25), params)
        updates, state = jax.jit(solver.update)(grads, state, params)
        params = jax.tree.map(jnp.add, params, updates)
        eager.step(grads)
        reference.step({name: np.full_like(p, 0.25) for name, p in arrays.items()})
    for found in (params, eager.params):
        for name, p in arrays.items():
            leaf: Any = found
            for key in name.split("."):
                leaf = leaf[key]
            np.testing.assert_allclose(leaf, p, rtol=1e-5)


def test_what_matches_nothing_is_told() -> None:
    with pytest.warns(UserWarning, match="^no parameter matches 'kernal' of no_decay; did you mean 'kernel'"):
        masked(no_decay=["kernal"])
