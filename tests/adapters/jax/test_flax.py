"""`lars_jax` in programs with Flax and Orbax, where these are installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lars_jax import LARS, lars

flax = pytest.importorskip("flax")
from flax import linen, nnx, serialization  # noqa: E402
from flax.core import FrozenDict, freeze, unfreeze  # noqa: E402
from flax.training.train_state import TrainState  # noqa: E402

OPTIONS: dict[str, Any] = {"weight_decay": 0.1, "trust_coefficient": 0.1}
X = jnp.ones((3, 2))


def assert_equal(ours: Any, theirs: Any, close: float = 1e-8) -> None:
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=close)


def matrices(tree: Any) -> Any:
    return jax.tree.map(lambda p: p.ndim > 1, tree)


# ---------------------------------------------------------------------------------------------------------------- linen


class Net(linen.Module):
    @linen.compact
    def __call__(self, x: Any) -> Any:
        return linen.Dense(1)(linen.LayerNorm()(linen.relu(linen.Dense(4)(x))))


NET = Net()


def loss(tree: Any) -> Any:
    return jnp.sum(NET.apply({"params": tree}, X + jnp.arange(3.0)[:, None]) ** 2)


def linen_params() -> Any:
    return NET.init(jax.random.key(0), X)["params"]


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize(("of_params", "of_mask"), [(freeze, unfreeze), (unfreeze, freeze), (freeze, freeze)])
def test_frozen_dicts_and_dicts(of_params: Any, of_mask: Any, jit: bool) -> None:
    plain = unfreeze(linen_params())
    solver = lars(0.1, **OPTIONS, weight_decay_mask=matrices, trust_ratio_mask=matrices)
    expected, _ = solver.update(jax.grad(loss)(plain), solver.init(plain), plain)
    tree, mask = of_params(plain), of_mask(matrices(plain))
    solver = lars(0.1, **OPTIONS, weight_decay_mask=mask, trust_ratio_mask=mask)
    for g in (jax.grad(loss)(tree), of_mask(unfreeze(jax.grad(loss)(tree)))):
        found, state = (jax.jit(solver.update) if jit else solver.update)(g, solver.init(tree), tree)
        assert type(found) is type(tree) and type(state.trace) is type(tree)
        assert_equal(found, expected)
        eager = LARS(tree, 0.1, 0.9, **OPTIONS, weight_decay_mask=mask, trust_ratio_mask=mask)
        after = eager.step(g)
        assert isinstance(after, FrozenDict if of_params is freeze else dict)
        assert_equal(after, jax.tree.map(jnp.add, plain, expected))


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_a_train_state_is_saved_and_read(jit: bool) -> None:
    state = TrainState.create(apply_fn=NET.apply, params=linen_params(), tx=optax.chain(lars(0.1, **OPTIONS)))
    step = jax.jit(lambda s: s.apply_gradients(grads=jax.grad(loss)(s.params)))
    step = step if jit else lambda s: s.apply_gradients(grads=jax.grad(loss)(s.params))
    state = step(state)
    fresh = TrainState.create(apply_fn=NET.apply, params=linen_params(), tx=state.tx)
    restored = serialization.from_bytes(fresh, serialization.to_bytes(state))
    assert_equal(step(restored).params, step(state).params)
    again = serialization.from_state_dict(fresh, serialization.to_state_dict(state))
    assert_equal(step(again).params, step(state).params)


# ------------------------------------------------------------------------------------------------------------------ nnx


class Model(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.first = nnx.Linear(2, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.blocks = nnx.List([nnx.Linear(4, 4, rngs=rngs), nnx.Linear(4, 1, rngs=rngs)])

    def __call__(self, x: Any) -> Any:
        x = self.dropout(nnx.relu(self.norm(self.first(x))))
        for block in self.blocks:
            x = block(x)
        return x


def nnx_loss(model: Any) -> Any:
    return jnp.sum(model(X + jnp.arange(3.0)[:, None]) ** 2)


def masks_of(model: Any) -> dict[str, Any]:
    state = nnx.state(model, nnx.Param)
    return {
        "function": matrices,
        "State": matrices(state),
        "dict": nnx.to_pure_dict(matrices(state)),
        "module": jax.tree.map(lambda x: getattr(x, "ndim", 0) > 1, model),
        "arrays": jax.tree.map(lambda x: jnp.asarray(x.ndim > 1), state),
    }


@pytest.mark.parametrize("kind", ["function", "State", "dict", "module", "arrays"])
def test_modules_with_gradients_of_nnx(kind: str) -> None:
    model = Model()
    grads = nnx.grad(nnx_loss)(model)
    state, pure = nnx.state(model, nnx.Param), nnx.to_pure_dict(nnx.state(model, nnx.Param))
    solver = lars(0.1, **OPTIONS, weight_decay_mask=matrices, trust_ratio_mask=matrices)
    updates, _ = solver.update(nnx.to_pure_dict(grads), solver.init(pure), pure)
    expected = jax.tree.map(jnp.add, pure, updates)
    mask = masks_of(model)[kind]
    masks = {"weight_decay_mask": mask, "trust_ratio_mask": mask}
    trained = LARS(model, 0.1, 0.9, **OPTIONS, **masks).step(grads)
    assert isinstance(trained, Model) and trained(X).shape == (3, 1)
    assert_equal(nnx.to_pure_dict(nnx.state(trained, nnx.Param)), expected)
    of_state = LARS(state, 0.1, 0.9, **OPTIONS, **masks)
    for g in (grads, nnx.to_pure_dict(grads)):
        assert_equal(LARS(state, 0.1, 0.9, **OPTIONS, **masks).step(g), expected)
    nnx.update(model, of_state.step(grads))
    assert_equal(nnx.to_pure_dict(nnx.state(model, nnx.Param)), expected)
    for jit in (False, True):
        other = Model()
        optimizer = nnx.Optimizer(other, lars(0.1, **OPTIONS, **masks), wrt=nnx.Param)

        def step(model: Any, optimizer: Any) -> None:
            optimizer.update(model, nnx.grad(nnx_loss)(model))

        (nnx.jit(step) if jit else step)(other, optimizer)
        assert_equal(nnx.to_pure_dict(nnx.state(other, nnx.Param)), expected, 1e-6)  # XLA sums in another order


def test_abstract_models_have_states() -> None:
    abstract = nnx.eval_shape(Model)
    solver = lars(0.1, **OPTIONS)
    found = solver.init(nnx.state(abstract, nnx.Param))
    real = solver.init(nnx.state(Model(), nnx.Param))
    assert jax.tree.structure(found) == jax.tree.structure(real)
    assert_equal(found, real)
    nnx.Optimizer(abstract, solver, wrt=nnx.Param)


# ---------------------------------------------------------------------------------------------------------------- orbax


def test_orbax_restores_a_state_into_an_abstract_one(tmp_path: Path) -> None:
    ocp = pytest.importorskip("orbax.checkpoint")
    tree, solver = linen_params(), optax.chain(lars(0.1, **OPTIONS))
    updates, state = solver.update(jax.grad(loss)(tree), solver.init(tree), tree)
    tree = optax.apply_updates(tree, updates)
    abstract = jax.eval_shape(linen_params)
    target = {"params": abstract, "state": jax.tree.map(ocp.utils.to_shape_dtype_struct, solver.init(abstract))}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "saved", {"params": tree, "state": state})
    with ocp.StandardCheckpointer() as checkpointer:
        for given in (target, jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), target)):
            read = checkpointer.restore(tmp_path / "saved", given)
            found = solver.update(jax.grad(loss)(tree), read["state"], read["params"])
            assert_equal(found, solver.update(jax.grad(loss)(tree), state, tree))
