"""`lars_jax.lars` beside `optax.lars`, and what optax asks of every transformation."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lars_array import warmup_cosine
from lars_jax import LARS, LarsState, lars


@pytest.fixture(autouse=True)
def strict() -> Iterator[None]:
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


# ------------------------------------------------------------------------------------------------- beside the original


@functools.cache
def network(wide: bool) -> tuple[dict[str, Any], Any]:
    """Return the parameters of a small network, and a function for its loss and gradients that is compiled once."""
    rng = np.random.default_rng(0)
    sizes = [(8, 16), (16, 16), (16, 3)]
    params = {
        f"layer_{k}": {"kernel": jnp.asarray(rng.normal(size=size) / size[0] ** 0.5), "bias": jnp.zeros(size[1])}
        for k, size in enumerate(sizes)
    }
    x, y = jnp.asarray(rng.normal(size=(64, 8))), jnp.asarray(rng.integers(0, 3, 64))
    assert x.dtype == (jnp.float64 if wide else jnp.float32)

    def loss(params: Any) -> Any:
        h = x
        for k in range(len(sizes)):
            layer = params[f"layer_{k}"]
            h = h @ layer["kernel"] + layer["bias"][None, :]
            h = jnp.tanh(h) if k < len(sizes) - 1 else h
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(h, y))

    return params, jax.jit(jax.value_and_grad(loss))


def not_biases(params: Any) -> Any:
    return jax.tree.map(lambda p: p.ndim > 1, params)


def train_beside(ours: Any, theirs: Any, tolerance: float, steps: int = 50) -> list[float]:
    """Train by `theirs`, and compare the updates of `ours` at each step; return the losses.

    Both have the same parameters and gradients at each step: of two trainings, rounding errors grow with the steps.
    """
    params, loss_and_gradients = network(jax.config.jax_enable_x64)
    states = [solver.init(params) for solver in (ours, theirs)]
    updates_of = [jax.jit(solver.update) for solver in (ours, theirs)]
    losses = []
    for _ in range(steps):
        value, grads = loss_and_gradients(params)
        both = [update(grads, state, params) for update, state in zip(updates_of, states, strict=True)]
        (our_updates, _), (updates, _) = both
        assert_trees_close(our_updates, updates, tolerance)
        states = [state for _, state in both]
        params = optax.apply_updates(params, updates)
        losses.append(float(value))
    return losses


def numbers(x: Any) -> Any:
    return np.asarray(x) + 0  # booleans can't be subtracted


def assert_trees_close(ours: Any, theirs: Any, tolerance: float) -> None:
    """Compare leaf by leaf, relative to the largest entry."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(map(numbers, jax.tree.leaves(ours)), map(numbers, jax.tree.leaves(theirs)), strict=True):
        assert np.max(np.abs(a - b)) <= tolerance * np.max(np.abs(b)), f"off by {np.max(np.abs(a - b))}"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_decay": 0.01},
        {"weight_decay": 0.01, "nesterov": True, "momentum": 0.8},
        {"weight_decay": 0.01, "weight_decay_mask": not_biases, "trust_ratio_mask": not_biases},
        {"weight_decay": 0.01, "weight_decay_mask": not_biases},
        {"weight_decay": 0.01, "trust_ratio_mask": {"layer_0": False, "layer_1": True, "layer_2": True}},
        {"trust_coefficient": 0.1, "eps": 0.01},
    ],
    ids=lambda options: str({name: getattr(x, "__name__", x) for name, x in options.items()}),
)
def test_by_name_it_is_optaxs_lars(options: dict[str, Any]) -> None:
    schedule = warmup_cosine(0.5, total_steps=50, warmup_steps=10, start_lr=0.1)
    with jax.enable_x64(True):
        losses = train_beside(lars(schedule, rule="optax", **options), optax.lars(schedule, **options), 1e-14)
    assert losses[-1] < losses[0]
    train_beside(lars(schedule, rule="optax", **options), optax.lars(schedule, **options), 2e-6, 20)


def test_masks_of_flash_exclude_what_they_exclude_elsewhere() -> None:
    """A leaf that is not decayed is adapted all the same, as `lars_array.param_groups` has it, and SGD is SGD."""
    params = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([3.0, 4.0])}
    grads = jax.tree.map(jnp.ones_like, params)
    solver = lars(1.0, momentum=0.0, weight_decay=0.1, weight_decay_mask={"a": True, "b": False}, eps=0.0)
    updates, _ = solver.update(grads, solver.init(params), params)
    np.testing.assert_allclose(updates["b"], -0.001 * 5 / 2**0.5, rtol=1e-6)
    ratio = 0.001 * 5 / (2**0.5 + 0.5)
    np.testing.assert_allclose(updates["a"], -ratio * (1 + 0.1 * params["a"]), rtol=1e-6)
    plain = lars(1.0, momentum=0.0, weight_decay=0.1, weight_decay_mask=False, trust_ratio_mask=False)
    np.testing.assert_array_equal(plain.update(grads, plain.init(params), params)[0]["b"], -grads["b"])
    sgd = lars(1.0, momentum=0.0, weight_decay=0.0, weight_decay_mask={"a": True, "b": False})
    np.testing.assert_array_equal(sgd.update(grads, sgd.init(params), params)[0]["b"], -grads["b"])


# -------------------------------------------------------------------------------------------------- optax's contract


def parabola(dtype: Any) -> tuple[Any, Any, Any]:
    target = jnp.asarray([1.0, -1.0, 1.0], dtype)
    return jnp.asarray([-1.0, 10.0, 1.0], dtype), target, lambda x: jnp.sum(jnp.abs(x - target) ** 2)


def rosenbrock(dtype: Any) -> tuple[Any, Any, Any]:
    def f(x: Any) -> Any:
        return jnp.abs(1.0 - x[0]) ** 2 + 100.0 * jnp.abs(x[1] - x[0] ** 2) ** 2

    return jnp.zeros(2, dtype), jnp.ones(2, dtype), f


@pytest.mark.parametrize("target", [parabola, rosenbrock])
@pytest.mark.parametrize("options", [{"learning_rate": 1e-3}, {"learning_rate": 1.0, "always_adapt": True}], ids=str)
def test_it_converges_and_is_compiled_once(target: Any, options: dict[str, Any]) -> None:
    solver = lars(**options)
    start, goal, objective = target(jnp.float32)
    traces = 0

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        nonlocal traces
        traces += 1
        updates, state = solver.update(jax.grad(objective)(params), state, params, not_known_to_it=1)
        return optax.apply_updates(params, updates), state

    params, state = start, solver.init(start)
    for _ in range(10000):
        params, state = step(params, state)
    np.testing.assert_allclose(params, goal, rtol=3e-2, atol=3e-2)
    assert traces == 1 and step._cache_size() == 1
    assert int(state.count) == 10000


def test_the_state_can_be_mapped_over_parameters() -> None:
    params = {"a": jnp.ones(3), "b": [jnp.ones((2, 2))]}
    for momentum in (0.9, 0.0):
        solver = lars(0.1, momentum=momentum)
        state = solver.init(params)
        mapped = optax.tree.map_params(solver, lambda v: v + 1, state)
        if momentum:
            np.testing.assert_array_equal(mapped.trace["b"][0], np.ones((2, 2)))
        specs = optax.tree.map_params(
            solver, lambda _, spec: spec, state, {"a": "A", "b": ["B"]}, transform_non_params=lambda _: None
        )
        assert specs == LarsState(None, {"a": "A", "b": ["B"]} if momentum else None, None, None)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64", "complex64"])
def test_dtypes_are_kept(dtype: str) -> None:
    with jax.enable_x64(dtype == "float64"):
        solver = lars(0.1, weight_decay=0.1)
        params = jnp.asarray([1.0, 2.0], dtype)
        state = jax.jit(solver.init)(params)
        assert state.trace.dtype == {"bfloat16": "float32", "float16": "float32"}.get(dtype, dtype)
        updates, after = jax.jit(solver.update)(params, state, params)
        assert updates.dtype == params.dtype and not updates.weak_type
        assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
        loop = jax.lax.fori_loop(0, 3, lambda _, held: solver.update(params, held[1], params), (updates, after))
        assert int(loop[1].count) == 4


def test_half_precision_does_not_freeze() -> None:
    """The squares of these gradients are zeros in float16, and those of the parameters overflow it."""
    p = jnp.full(1000, 300.0, jnp.float16)
    g = jnp.full(1000, 1e-5, jnp.float16)
    theirs, ours = optax.lars(1.0), lars(1.0, rule="optax")
    frozen, _ = theirs.update(g, theirs.init(p), p)
    np.testing.assert_array_equal(optax.apply_updates(p, frozen), p)
    moved, _ = ours.update(g, ours.init(p), p)
    np.testing.assert_allclose(np.asarray(moved, np.float32), -0.3, rtol=2e-3)
    assert np.all(optax.apply_updates(p, moved) < p)


def test_hyper_parameters_can_be_injected_and_changed() -> None:
    params, grads = [-jnp.ones((2, 3)), jnp.ones((2, 5, 2))], [jnp.ones((2, 3)), -jnp.ones((2, 5, 2))]
    plain, injected = lars(0.1, weight_decay=0.1), optax.inject_hyperparams(lars)(0.1, weight_decay=0.1)
    state, held = plain.init(params), jax.jit(injected.init)(params)
    update = jax.jit(injected.update)
    for _ in range(3):
        expected, state = plain.update(grads, state, params)
        found, held = update(grads, held, params)
        assert_trees_close(found, expected, 1e-6)
        assert_trees_close(held.inner_state, state, 1e-6)
    compiled = update._cache_size()
    held.hyperparams["learning_rate"] = jnp.asarray(0.0, jnp.float32)
    assert not np.any(update(grads, held, params)[0][0])
    assert update._cache_size() == compiled


@pytest.mark.parametrize(
    "options", [{"momentum": 0.9, "nesterov": True}, {"rescale_grad": 0.5}, {"max_grad_norm": 0.1}, {"dampening": 0.5}]
)
def test_every_number_may_be_a_schedule(options: dict[str, Any]) -> None:
    def schedule(value: float) -> Any:
        return lambda step: jnp.where(step < 0, 0.0, value)

    scheduled = {name: x if name == "nesterov" else schedule(x) for name, x in options.items()}
    p, g = jnp.array([3.0, 4.0]), jnp.array([1.0, 2.0])
    plain, solver = lars(0.1, weight_decay=0.1, **options), lars(schedule(0.1), weight_decay=0.1, **scheduled)
    state, other = plain.init(p), solver.init(p)
    for _ in range(2):
        expected, state = plain.update(g, state, p)
        found, other = jax.jit(solver.update)(g, other, p)
        np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("params", [jnp.ones(2), {"a": jnp.ones(2)}], ids=["one leaf", "a dict"])
def test_a_state_without_momentum_is_none_with_it(params: Any) -> None:
    state = lars(0.1, momentum=0.0).init(params)
    with pytest.raises((TypeError, ValueError), match=r"the (trace of state|momentum buffer of '0') must"):
        lars(0.1).update(params, state, params)


def test_it_takes_part_in_chains_and_wrappers() -> None:
    params = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([1.0])}
    grads = jax.tree.map(jnp.ones_like, params)
    alone = lars(0.1, weight_decay=0.1)
    expected, _ = alone.update(grads, alone.init(params), params)
    half = optax.chain(lars(0.1, weight_decay=0.1), optax.scale(0.5))
    found, _ = jax.jit(half.update)(grads, half.init(params), params)
    assert_trees_close(found, jax.tree.map(lambda u: 0.5 * u, expected), 1e-6)
    masked = optax.masked(lars(0.1, weight_decay=0.1), {"a": True, "b": False})
    found, _ = jax.jit(masked.update)(grads, masked.init(params), params)
    assert_trees_close(found, {"a": expected["a"], "b": grads["b"]}, 1e-6)
    every_second = optax.MultiSteps(lars(0.1, weight_decay=0.1), 2)
    state = every_second.init(params)
    with jax.numpy_dtype_promotion("standard"):  # optax divides a number by a count
        found, state = jax.jit(every_second.update)(grads, state, params)
        assert not any(np.any(u) for u in jax.tree.leaves(found))
        found, state = jax.jit(every_second.update)(grads, state, params)
    assert_trees_close(found, expected, 1e-6)
    parts = optax.partition({"x": lars(0.1, weight_decay=0.1), "y": optax.sgd(1.0)}, {"a": "x", "b": "y"})
    found, _ = jax.jit(parts.update)(grads, parts.init(params), params)
    assert_trees_close(found, {"a": expected["a"], "b": -grads["b"]}, 1e-6)
    finite = optax.apply_if_finite(lars(0.1), 3)
    found, _ = finite.update(jax.tree.map(lambda g: g * jnp.nan, grads), finite.init(params), params)
    assert not np.any(found["a"])


def test_under_vmap_and_grad() -> None:
    solver = lars(0.1, weight_decay=0.1, trust_coefficient=0.5)
    many = jnp.arange(1.0, 7.0).reshape(3, 2)
    states = jax.vmap(solver.init)(many)
    found, _ = jax.vmap(solver.update)(many, states, many)
    for row, p in zip(found, many, strict=True):
        assert_trees_close(row, solver.update(p, solver.init(p), p)[0], 1e-6)

    def after(rate: Any) -> Any:
        tuned = lars(rate, weight_decay=0.1, trust_coefficient=0.5)
        return jnp.sum(many[0] + tuned.update(many[0], tuned.init(many[0]), many[0])[0])

    slope = (after(0.1001) - after(0.0999)) / 2e-4
    np.testing.assert_allclose(jax.grad(after)(0.1), slope, rtol=1e-2)


def test_what_is_donated_is_used() -> None:
    solver = lars(0.1, weight_decay=0.1)
    params = {"w": jnp.ones(1 << 16)}
    state = solver.init(params)

    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = solver.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    compiled = jax.jit(step, donate_argnums=(0, 1))
    places = {params["w"].unsafe_buffer_pointer(), state.trace["w"].unsafe_buffer_pointer()}
    new_params, new_state = compiled(params, state, {"w": jnp.ones(1 << 16)})
    assert params["w"].is_deleted() and state.trace["w"].is_deleted()
    assert {new_params["w"].unsafe_buffer_pointer(), new_state.trace["w"].unsafe_buffer_pointer()} == places


# ----------------------------------------------------------------------------------------------------------- odd input


def test_a_gradient_that_is_none_leaves_its_leaf_alone() -> None:
    solver = lars(0.1, weight_decay=0.1, dampening=0.5)
    params = {"a": jnp.array([3.0, 4.0]), "b": None, "c": jnp.array([1.0])}
    state = solver.init(params)
    updates, after = solver.update({"a": jnp.ones(2), "b": None, "c": None}, state, params)
    assert updates["b"] is None and updates["c"] is None
    assert after.first.tolist() == [False, True] and after.previous_lr[1] == 0
    updates, after = solver.update({"a": None, "b": None, "c": None}, after, params)
    assert int(after.count) == 2 and jax.tree.leaves(updates) == []


def test_arrays_of_numpy_are_taken_for_jaxs() -> None:
    params = {"w": np.ones(3, np.float32)}
    solver = lars(0.1, weight_decay=0.1)
    updates, _ = solver.update(params, solver.init(params), params)
    expected, _ = solver.update(jax.tree.map(jnp.asarray, params), solver.init(params), params)
    np.testing.assert_array_equal(updates["w"], expected["w"])


def test_keys_with_dots_are_told_apart() -> None:
    params = {"a.b": jnp.full(2, 3.0), "a": {"b": jnp.full(2, 5.0)}}
    optimizer, solver = LARS(params, lr=0.1, weight_decay=0.1), lars(0.1, momentum=0.0, weight_decay=0.1)
    updates, _ = solver.update(params, solver.init(params), params)
    assert_trees_close(optimizer.step(params), optax.apply_updates(params, updates), 1e-6)
    assert optimizer.norms().keys() == {"['a']['b']", "['a.b']"}


def test_a_step_that_is_not_finite_is_skipped_or_taken() -> None:
    params = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([1.0])}
    grads = {"a": jnp.array([jnp.nan, 1.0]), "b": jnp.array([1.0])}
    skipping, plain = lars(0.1, nonfinite="skip"), lars(0.1)
    state = skipping.init(params)
    updates, after = jax.jit(skipping.update)(grads, state, params)
    assert not any(np.any(u) for u in jax.tree.leaves(updates))
    assert_trees_close(after, state, 0.0)
    updates, _ = plain.update(grads, plain.init(params), params)
    assert np.isnan(updates["a"][0]) and updates["b"] == -0.1


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda s, st, p: lars(-1.0), ValueError, "Invalid learning rate: -1.0"),
        (lambda s, st, p: lars(0.1, rule="no"), ValueError, "rule must be one of"),
        (lambda s, st, p: lars(0.1, nonfinite="raise"), ValueError, "nonfinite must be 'propagate' or 'skip'"),
        (lambda s, st, p: lars(0.1, weight_decay_mask=None), TypeError, "weight_decay_mask must be a bool"),
        (lambda s, st, p: s.update(p, st), ValueError, "update of lars needs params"),
        (lambda s, st, p: s.update({"a": p["a"]}, st, p), ValueError, "updates must have the structure"),
        (lambda s, st, p: s.update(p, (), p), TypeError, "state must be what init or update of lars returned"),
        (lambda s, st, p: s.update(p | {"b": jnp.ones(2)}, st, p), ValueError, "the gradient of 'b' must have"),
        (lambda s, st, p: s.init({"n": jnp.arange(3)}), TypeError, "parameter 'n' must be of one of the types"),
        (lambda s, st, p: s.init({"n": "w"}), TypeError, "parameter 'n' must be an array"),
        (
            lambda s, st, p: lars(0.1, trust_ratio_mask={"a": 2, "b": True}).update(p, st, p),
            TypeError,
            "trust_ratio_mask must hold True or False; got 2 for 'a'",
        ),
        (
            lambda s, st, p: lars(0.1, trust_ratio_mask={"a": True}).update(p, st, p),
            ValueError,
            "trust_ratio_mask must have the structure",
        ),
    ],
)
def test_refusals(call: Any, kind: type[Exception], message: str) -> None:
    solver, params = lars(0.1), {"a": jnp.ones(2), "b": jnp.ones(1)}
    with pytest.raises(kind, match=message):
        call(solver, solver.init(params), params)
