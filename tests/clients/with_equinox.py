"""Equinox: modules as parameters, as masks, and in files."""

from __future__ import annotations

import io
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import lars_jax

LIBRARIES = ("equinox", "optax", "jax")
OPTIONS: dict[str, Any] = {"momentum": 0.9, "weight_decay": 1e-4, "trust_coefficient": 0.1}
X = jax.random.normal(jax.random.key(1), (64, 8))
Y = (X[:, 0] > 0).astype(jnp.int32)


def network() -> Any:
    return eqx.nn.MLP(8, 2, 16, 2, key=jax.random.key(0))


def loss_of(model: Any) -> Any:
    return optax.softmax_cross_entropy_with_integer_labels(jax.vmap(model)(X), Y).mean()


def train(model: Any, solver: Any, state: Any, steps: int, *, jit: bool = True) -> tuple[Any, Any]:
    def step(model: Any, state: Any) -> tuple[Any, Any]:
        grads = eqx.filter_grad(loss_of)(model)
        updates, state = solver.update(grads, state, eqx.filter(model, eqx.is_inexact_array))
        return eqx.apply_updates(model, updates), state

    taken = eqx.filter_jit(step) if jit else step
    for _ in range(steps):
        model, state = taken(model, state)
    return model, state


def masks_of(model: Any) -> list[Any]:
    """Return masks as users write them: a whole module, one with None beside, a function."""
    arrays = eqx.filter(model, eqx.is_inexact_array)
    return [
        jax.tree.map(lambda p: p.ndim > 1, arrays),
        jax.tree.map(lambda x: eqx.is_inexact_array(x) and x.ndim > 1, model),
        lambda params: jax.tree.map(lambda p: p.ndim > 1, params),
    ]


def check_trains_under_filter_jit() -> None:
    for jit in (True, False):
        model, solver = network(), lars_jax.lars(0.5, **OPTIONS)
        before = float(loss_of(model))
        model, _ = train(model, solver, solver.init(eqx.filter(model, eqx.is_inexact_array)), 20, jit=jit)
        assert float(loss_of(model)) < before


def check_a_module_is_a_mask() -> None:
    results = []
    for mask in masks_of(network()):
        solver = lars_jax.lars(0.5, **OPTIONS, weight_decay_mask=mask, trust_ratio_mask=mask)
        model, _ = train(network(), solver, solver.init(eqx.filter(network(), eqx.is_inexact_array)), 5)
        results.append(eqx.filter(model, eqx.is_inexact_array))
    for other in results[1:]:
        jax.tree.map(np.testing.assert_array_equal, results[0], other)


def check_a_module_in_the_eager_optimizer() -> None:
    model = network()
    before = float(loss_of(model))
    for mask in masks_of(model):
        optimizer = lars_jax.LARS(model, lr=0.5, **OPTIONS, weight_decay_mask=mask, trust_ratio_mask=mask)
        trained = model
        for _ in range(10):
            trained = optimizer.step(eqx.filter_grad(loss_of)(trained))
        assert float(loss_of(trained)) < before


def check_resumes_to_the_bit_from_a_file() -> None:
    solver = lars_jax.lars(0.5, **OPTIONS)
    start = solver.init(eqx.filter(network(), eqx.is_inexact_array))
    model, state = train(network(), solver, start, 10)
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, (model, state))
    file.seek(0)
    again = eqx.tree_deserialise_leaves(file, (network(), start))
    whole, other = train(model, solver, state, 5)[0], train(again[0], solver, again[1], 5)[0]
    jax.tree.map(np.testing.assert_array_equal, eqx.filter(whole, eqx.is_array), eqx.filter(other, eqx.is_array))
