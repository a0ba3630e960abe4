"""flax: nnx modules and optimizers, linen's train states, and its serialization."""

from __future__ import annotations

from typing import Any

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx, serialization
from flax.core import FrozenDict
from flax.training.train_state import TrainState

import lars_jax

LIBRARIES = ("flax", "optax", "jax")
OPTIONS: dict[str, Any] = {"momentum": 0.9, "weight_decay": 1e-4, "trust_coefficient": 0.1}
X = jax.random.normal(jax.random.key(1), (64, 8))
Y = (X[:, 0] > 0).astype(jnp.int32)


def cross_entropy(logits: Any) -> Any:
    return optax.softmax_cross_entropy_with_integer_labels(logits, Y).mean()


class Network(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.first, self.norm, self.last = (
            nnx.Linear(8, 16, rngs=rngs),
            nnx.LayerNorm(16, rngs=rngs),
            nnx.Linear(16, 2, rngs=rngs),
        )

    def __call__(self, x: Any) -> Any:
        return self.last(jax.nn.relu(self.norm(self.first(x))))


def loss_of(model: Any) -> Any:
    return cross_entropy(model(X))


def check_nnx_optimizer_under_jit() -> None:
    model = Network()
    optimizer = nnx.Optimizer(model, lars_jax.lars(0.5, **OPTIONS), wrt=nnx.Param)

    @nnx.jit
    def step(model: Any, optimizer: Any) -> Any:
        loss, grads = nnx.value_and_grad(loss_of)(model)
        optimizer.update(model, grads)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(30)]
    assert losses[-1] < 0.7 * losses[0], losses[:: len(losses) - 1]


def check_nnx_optimizer_without_jit() -> None:
    model = Network()
    optimizer = nnx.Optimizer(model, lars_jax.lars(0.5, **OPTIONS), wrt=nnx.Param)
    before = float(loss_of(model))
    for _ in range(10):
        optimizer.update(model, nnx.grad(loss_of)(model))
    assert float(loss_of(model)) < before


def check_nnx_state_in_the_eager_optimizer() -> None:
    model = Network()
    optimizer = lars_jax.LARS(nnx.state(model, nnx.Param), lr=0.5, **OPTIONS)
    before = float(loss_of(model))
    for _ in range(10):
        nnx.update(model, optimizer.step(nnx.grad(loss_of)(model)))
    assert float(loss_of(model)) < before


def check_nnx_module_in_the_eager_optimizer() -> None:
    model = Network()
    optimizer = lars_jax.LARS(model, lr=0.5, **OPTIONS)
    before = float(loss_of(model))
    for _ in range(10):
        model = optimizer.step(nnx.grad(loss_of)(model))
    assert float(loss_of(model)) < before


def check_nnx_abstract_model() -> None:
    """As sharding plans and checkpoints are made."""
    solver = lars_jax.lars(0.5, **OPTIONS)
    abstract = nnx.state(nnx.eval_shape(Network), nnx.Param)
    state = solver.init(abstract)
    real = solver.init(nnx.state(Network(), nnx.Param))
    assert [x.shape for x in jax.tree.leaves(state)] == [x.shape for x in jax.tree.leaves(real)]


class Linen(linen.Module):
    @linen.compact
    def __call__(self, x: Any) -> Any:
        return linen.Dense(2)(linen.relu(linen.LayerNorm()(linen.Dense(16)(x))))


def trained(**options: Any) -> Any:
    model = Linen()
    params = model.init(jax.random.key(0), X)["params"]
    return TrainState.create(apply_fn=model.apply, params=params, tx=lars_jax.lars(0.5, **OPTIONS, **options))


def step(state: Any) -> Any:
    grads = jax.grad(lambda params: cross_entropy(state.apply_fn({"params": params}, X)))(state.params)
    return state.apply_gradients(grads=grads)


def many(state: Any, steps: int, *, jit: bool = True) -> Any:
    taken = jax.jit(step) if jit else step
    for _ in range(steps):
        state = taken(state)
    return state


def check_linen_train_state_and_from_bytes() -> None:
    for jit in (True, False):
        half = many(trained(), 10)
        restored = serialization.from_bytes(trained(), serialization.to_bytes(half))
        whole, other = many(half, 5, jit=jit), many(restored, 5, jit=jit)
        jax.tree.map(np.testing.assert_array_equal, whole.params, other.params)


def check_linen_masks_of_a_frozen_dict() -> None:
    params = FrozenDict(trained().params)
    mask = jax.tree.map(lambda p: p.ndim > 1, trained().params)
    for given in (mask, FrozenDict(mask), jax.tree.map(jnp.asarray, mask)):
        solver = lars_jax.lars(0.5, **OPTIONS, weight_decay_mask=given, trust_ratio_mask=given)
        updates, _ = solver.update(params, solver.init(params), params)
        assert jax.tree.structure(updates) == jax.tree.structure(params)
