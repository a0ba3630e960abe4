"""orbax: checkpoints of parameters and state, restored into what only has shapes."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

import lars_jax

LIBRARIES = ("orbax-checkpoint", "jax")
OPTIONS: dict[str, Any] = {"momentum": 0.9, "weight_decay": 1e-4}
PARAMS = {"kernel": jax.random.normal(jax.random.key(0), (8, 3)), "bias": jnp.zeros(3)}
SOLVER = lars_jax.lars(0.5, **OPTIONS)


def train(params: Any, state: Any, steps: int) -> tuple[Any, Any]:
    x = jax.random.normal(jax.random.key(1), (16, 8))

    @jax.jit
    def step(params: Any, state: Any) -> tuple[Any, Any]:
        grads = jax.grad(lambda p: jnp.mean((x @ p["kernel"] + p["bias"] - 1) ** 2))(params)
        updates, state = SOLVER.update(grads, state, params)
        return jax.tree.map(jnp.add, params, updates), state

    for _ in range(steps):
        params, state = step(params, state)
    return params, state


def resumed(target: Any) -> None:
    half = train(PARAMS, SOLVER.init(PARAMS), 5)
    with tempfile.TemporaryDirectory() as folder, ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(Path(folder, "half"), dict(zip(("params", "state"), half, strict=True)))
        checkpointer.wait_until_finished()
        read = checkpointer.restore(Path(folder, "half"), target)
    whole, other = train(*half, 5), train(read["params"], read["state"], 5)
    jax.tree.map(np.testing.assert_array_equal, whole, other)


def check_restored_like_a_new_state() -> None:
    resumed({"params": PARAMS, "state": SOLVER.init(PARAMS)})


def check_restored_like_eval_shape() -> None:
    resumed(jax.eval_shape(lambda: {"params": PARAMS, "state": SOLVER.init(PARAMS)}))


def check_init_takes_shapes_without_arrays() -> None:
    abstract = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), PARAMS)
    resumed({"params": abstract, "state": jax.eval_shape(SOLVER.init, abstract)})
    state, real = SOLVER.init(abstract), SOLVER.init(PARAMS)
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(state)] == [(x.shape, x.dtype) for x in jax.tree.leaves(real)]


def check_the_state_of_the_eager_optimizer() -> None:
    def step(optimizer: Any) -> Any:
        return optimizer.step(jax.tree.map(jnp.ones_like, PARAMS))

    one = lars_jax.LARS(PARAMS, lr=0.1, **OPTIONS)
    params = step(one)
    saved = {key: one.state_dict()["state"][key] for key in PARAMS}
    with tempfile.TemporaryDirectory() as folder, ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(Path(folder, "x"), saved)
        read = checkpointer.restore(Path(folder, "x"))
    other = lars_jax.LARS(params, lr=0.1, **OPTIONS)
    other.load_state_dict({**one.state_dict(), "state": read})
    jax.tree.map(np.testing.assert_array_equal, step(one), step(other))
