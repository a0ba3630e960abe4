"""Parameters and states in other forms: abstract, NumPy's, Python's numbers; and constants that debuggers stop on."""

from __future__ import annotations

import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lars_jax
from lars_jax import LARS, LarsState, lars


def params() -> dict[str, Any]:
    return {"w": jnp.array([[3.0, 4.0]]), "b": jnp.array([1.0, 2.0], jnp.bfloat16)}


def grads(seed: int) -> dict[str, Any]:
    return jax.tree.map(lambda p: jnp.asarray(np.random.default_rng(seed).normal(size=p.shape), p.dtype), params())


def assert_equal(ours: Any, theirs: Any) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert isinstance(a, jax.Array) and a.dtype == b.dtype
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=1e-6)


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("nonfinite", ["propagate", "skip"])
@pytest.mark.parametrize(
    "saved",
    [
        jax.device_get,
        lambda tree: pickle.loads(pickle.dumps(tree)),
        lambda tree: jax.tree.map(np.asarray, tree),
        lambda tree: jax.tree.map(lambda x: np.asarray(x)[()], tree),  # with NumPy's scalars
    ],
    ids=["device_get", "pickle", "asarray", "scalars"],
)
def test_a_state_goes_on_in_the_form_that_it_was_saved_in(saved: Any, nonfinite: str, jit: bool) -> None:
    solver = lars(0.1, weight_decay=0.1, nonfinite=nonfinite)
    update = jax.jit(solver.update) if jit else solver.update
    _, state = update(grads(0), solver.init(params()), params())
    expected = update(grads(1), state, params())
    assert_equal(update(grads(1), saved(state), params()), expected)
    assert_equal(update(saved(grads(1)), saved(state), saved(params())), expected)
    nothing = jax.tree.map(lambda _: None, params())
    assert int(update(nothing, saved(state), params())[1].count) == 2


def test_a_saved_state_is_converted() -> None:
    arguments = {"learning_rate": 0.1, "weight_decay": 0.1}
    solver = lars(**arguments)
    _, state = solver.update(grads(0), solver.init(params()), params())
    plain = lars_jax.to_state_dict(state, params(), **arguments)
    found = lars_jax.to_state_dict(jax.device_get(state), jax.device_get(params()), **arguments)
    assert repr(found) == repr(plain)
    abstract = jax.eval_shape(params)
    assert_equal(lars_jax.from_state_dict(found, abstract), state)
    with pytest.raises(ValueError, match=r"the momentum buffer of 'w' must have the parameter's shape \(1, 3\)"):
        lars_jax.from_state_dict(found, abstract | {"w": jax.ShapeDtypeStruct((1, 3), "float32")})


def test_a_state_is_made_for_abstract_parameters() -> None:
    solver = lars(0.1)
    found = solver.init(jax.eval_shape(params))
    assert_equal(found, solver.init(params()))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), jax.eval_shape(solver.init, jax.eval_shape(params))) == (
        jax.tree.map(lambda x: (x.shape, x.dtype), found)
    )
    mesh = jax.make_mesh((1,), ("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    given = jax.ShapeDtypeStruct((4,), jnp.float32, sharding=sharding)
    assert solver.init({"w": given}).trace["w"].sharding == optax.trace(0.9).init({"w": given}).trace["w"].sharding
    for wrapped in (optax.chain(solver), optax.masked(solver, True), optax.MultiSteps(solver, 2)):
        wrapped.init(jax.eval_shape(params))
    with pytest.raises(TypeError, match="parameter 'n' must be an array; got ShapeDtypeStruct"):
        solver.init({"n": jax.ShapeDtypeStruct((2,), jnp.int32)})
    with pytest.raises(TypeError, match="parameter 'w' must have a value, which an abstract array has not"):
        LARS(jax.eval_shape(params) | {"b": params()["b"]}, lr=0.1)


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_numbers_of_python_are_trained_as_by_optax(jit: bool) -> None:
    tree = {"scale": 2.0, "shift": np.float32(-1.0), "w": jnp.array([3.0, 4.0])}
    g = jax.grad(lambda p: jnp.sum((p["scale"] * p["w"] + p["shift"]) ** 2))(tree)
    sgd, of_optax = lars(0.1, momentum=0.0, trust_ratio_mask=False), lars(0.1, weight_decay=0.1, rule="optax")
    arrays = jax.tree.map(jnp.asarray, tree)  # optax.lars asks a number for its dtype
    for ours, theirs, given in ((sgd, optax.sgd(0.1), tree), (of_optax, optax.lars(0.1, weight_decay=0.1), arrays)):
        found = (jax.jit(ours.update) if jit else ours.update)(g, ours.init(tree), tree)[0]
        expected = theirs.update(g, theirs.init(given), given)[0]
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6)


def test_numbers_of_python_with_gradients_are_refused_eagerly() -> None:
    tree = {"rate": 0.5, "count": 3, "scale": np.float32(2.0), "w": jnp.array([3.0, 4.0])}
    optimizer = LARS(tree, lr=0.1)
    after = optimizer.step({"rate": None, "count": None, "scale": np.float32(1.0), "w": jnp.ones(2)})
    assert after["rate"] == 0.5 and after["count"] == 3
    np.testing.assert_allclose(after["scale"], 1.9)
    g = jax.grad(lambda p: jnp.sum(p["rate"] * p["scale"] * p["w"]), allow_int=True)(tree)
    with pytest.raises(TypeError, match="the gradient of 'rate' must be None, since only arrays of floats are trained"):
        optimizer.step(g)
    assert optimizer.steps == 1 and optimizer.params is after
    optimizer.step(g | {"rate": None})  # that of the integer is of no type that has numbers


# ------------------------------------------------------------------------------------------------------------ debugging


@pytest.mark.parametrize("flag", ["jax_debug_infs", "jax_debug_nans"])
@pytest.mark.parametrize("rule", ["flash", "timm", "kozistr", "optax", "simclr-popular", "nvidia", "nus", "tf-contrib"])
def test_debuggers_stop_on_nothing_of_ours(rule: str, flag: str) -> None:
    p = {"w": jnp.array([3.0, 4.0]), "zero": jnp.zeros(3), "empty": jnp.zeros((0, 2))}
    g = {"w": jnp.array([0.5, 1.0]), "zero": jnp.zeros(3), "empty": jnp.zeros((0, 2))}
    solvers = [lars(0.1, weight_decay=0.1, rule=rule, nonfinite=x) for x in ("propagate", "skip")]
    solvers.append(lars(0.1, weight_decay=0.1, rule=rule, max_grad_norm=1.0, trust_bounds=(0.0, float("inf"))))
    expected = [solver.update(g, solver.init(p), p) for solver in solvers]
    jax.config.update(flag, True)
    try:
        for solver, plain in zip(solvers, expected, strict=True):
            assert_equal(solver.update(g, solver.init(p), p), plain)
        assert_equal(jax.jit(solvers[0].update)(g, solvers[0].init(p), p), expected[0])
        LARS(p, lr=0.1, weight_decay=0.1, rule=rule).step(g)
    finally:
        jax.config.update(flag, False)


def test_a_state_of_another_kind_is_told_apart() -> None:
    solver = lars(0.1)
    state = solver.init(params())
    assert isinstance(state, LarsState)
    for arguments, place in (((params(), grads(0), state), "third"), ((state, grads(0), params()), "first")):
        with pytest.raises(TypeError, match=rf"in update\(grads, state, params\); got it as the {place} argument"):
            solver.update(*arguments)
