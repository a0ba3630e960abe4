"""Derivatives through steps are finite where norms are zero: zero biases, and the weights of dead units."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lars_array
from lars_jax import lars

X = np.random.default_rng(0).standard_normal((7, 3)).astype("f4")
ZEROS = "all weights zero"
NETWORKS: dict[str, dict[str, Any]] = {
    "zero biases": {"w": jnp.full((3, 4), 0.2), "b": jnp.zeros(4), "v": jnp.full((4, 1), 0.3)},
    ZEROS: {"w": jnp.zeros((3, 4)), "b": jnp.zeros(4), "v": jnp.zeros((4, 1))},
    "dead units": {"w": jnp.full((3, 4), 0.2), "b": jnp.full(4, -99.0), "v": jnp.full((4, 1), 0.3)},
}
OPTIONS = {"momentum": 0.9, "weight_decay": 1e-3, "trust_coefficient": 0.1}


def loss(params: Any) -> Any:
    return jnp.mean((jax.nn.relu(X @ params["w"] + params["b"]) @ params["v"] - 1) ** 2)


def after(lr: Any, params: Any, solver: Callable[[Any], Any]) -> Any:
    """Return the loss after two steps."""
    own = solver(lr)
    state = own.init(params)
    for _ in range(2):
        updates, state = own.update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)
    return loss(params)


def after_update(lr: Any, params: Any, **options: Any) -> Any:
    state = lars_array.init(params)
    for _ in range(2):
        params, state = lars_array.update(params, jax.grad(loss)(params), state, lr=lr, **options)
    return loss(params)


def derivatives(function: Callable[[Any, Any], Any], params: Any) -> Any:
    """Return those by the learning rate and the parameters, backwards and forwards."""
    ones = jax.tree.map(jnp.ones_like, params)
    backwards = jax.jit(jax.grad(function, argnums=(0, 1)))(0.1, params)
    return backwards, jax.jit(lambda lr, p: jax.jvp(function, (lr, p), (1.0, ones))[1])(0.1, params)


def assert_finite(tree: Any) -> None:
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(tree)), tree


@pytest.mark.parametrize(("rule", "network"), [("flash", "zero biases"), ("kozistr", "dead units"), ("barlow", ZEROS)])
def test_derivatives_are_finite_where_a_norm_is_zero(rule: str, network: str) -> None:
    params = NETWORKS[network]
    assert_finite(derivatives(lambda lr, p: after(lr, p, lambda lr: lars(lr, rule=rule, **OPTIONS)), params))
    options = OPTIONS | {"rule": rule, "max_grad_norm": 1.0, "trust_clip": True, "trust_bounds": (0.0, 0.5)}
    assert_finite(derivatives(lambda lr, p: after_update(lr, p, **options), params))


@pytest.mark.parametrize("network", NETWORKS)
def test_derivatives_are_those_of_optax(network: str) -> None:
    params = NETWORKS[network]
    ours = derivatives(lambda lr, p: after(lr, p, lambda lr: lars(lr, rule="optax", **OPTIONS)), params)
    theirs = derivatives(lambda lr, p: after(lr, p, lambda lr: optax.lars(lr, **OPTIONS)), params)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6 + 1e-4 * float(jnp.max(jnp.abs(b))))


def test_derivatives_by_a_gradient_whose_norm_is_zero() -> None:
    p, zero = jnp.ones(3), jnp.zeros(3)

    def moved(p: Any, g: Any) -> Any:
        solver = lars(0.1, weight_decay=1e-3)
        return jnp.sum(solver.update({"w": g}, solver.init({"w": p}), {"w": p})[0]["w"])

    for pair in ((p, zero), (zero, p), (zero, zero)):
        assert_finite(jax.grad(moved, argnums=(0, 1))(*pair))
