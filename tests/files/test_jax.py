"""`lars_jax.save` and `load`: the eager optimizer with its parameters, and states of the transformation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from assertions import assert_same

import lars_array

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")
import jax.numpy as jnp  # noqa: E402

from lars_jax import LARS, LarsState, lars, load, save  # noqa: E402

OPTIONS: dict[str, Any] = {"momentum": 0.9, "weight_decay": 0.1, "rule": "nvidia"}


def tree(scale: float = 1.0) -> Any:
    return {
        "a": {"w": scale * jnp.arange(6.0).reshape(2, 3), "b": scale * jnp.ones(3, jnp.bfloat16)},
        "c": scale * jnp.ones(()),
    }


def gradients(scale: float = 0.5) -> Any:
    return jax.tree.map(lambda x: (scale * (x + 1)).astype(x.dtype), tree())


def numbers(x: Any) -> Any:
    return list(map(np.asarray, jax.tree.leaves(x)))


def seen(optimizer: Any) -> Any:
    groups = [dict(group) for group in optimizer.param_groups]
    return numbers(optimizer.params), optimizer.state_dict()["state"], repr(groups), optimizer.steps


@pytest.mark.parametrize("donate", [False, True])
def test_the_eager_optimizer_goes_on(tmp_path: Path, donate: bool) -> None:
    options = OPTIONS | {"master_weights": True, "weight_decay_mask": lambda p: jax.tree.map(lambda x: x.ndim > 1, p)}
    one = LARS(tree(), lr=lars_array.warmup_cosine(0.5, 10, 2), **options, donate=donate)
    for _ in range(3):
        one.step(gradients())
    save(tmp_path / "run", one, metadata={"epoch": 1})
    two = LARS(tree(0.0), lr=7.0, **options, donate=donate)
    saved = load(tmp_path / "run", two)
    assert (saved.state, saved.metadata) == (None, {"epoch": 1})
    assert_same(numbers(saved.params), numbers(one.params))
    for optimizer in (one, two):
        for _ in range(2):
            optimizer.step(gradients(0.25))
    assert_same(seen(two), seen(one))


def test_a_state_of_the_transformation_goes_on(tmp_path: Path) -> None:
    rate = lars_array.warmup_cosine(0.5, 10, 2)
    solver = optax.chain(optax.clip(100.0), lars(rate, **OPTIONS))
    inner = lars(rate, **OPTIONS)
    params = tree()
    state = solver.init(params)
    for _ in range(3):
        updates, state = jax.jit(solver.update)(gradients(), state, params)
        params = optax.apply_updates(params, updates)
    save(tmp_path / "run", state, params, rate, **OPTIONS)
    saved = load(tmp_path / "run", params=tree(0.0))
    assert isinstance(saved.state, LarsState)
    assert_same(numbers(saved.params), numbers(params))
    assert_same(numbers(saved.state), numbers(state))
    results = [inner.update(gradients(), s, p) for s, p in ((state[1], params), (saved.state, saved.params))]
    assert_same(*map(numbers, results))


def test_without_a_schedule_of_optax(tmp_path: Path) -> None:
    rate = optax.cosine_decay_schedule(0.5, 10)
    state = lars(rate, **OPTIONS).init(tree())
    with pytest.raises(TypeError, match=r"lr of parameter group 0 must be data to be saved; .*omit=\('lr',\)"):
        save(tmp_path / "run", state, tree(), rate, **OPTIONS)
    save(tmp_path / "run", state, tree(), omit=("lr",), **OPTIONS)
    assert_same(numbers(load(tmp_path / "run", params=tree()).state), numbers(state))
    optimizer = LARS(tree(), rate, **OPTIONS)
    load(tmp_path / "run", optimizer)
    assert optimizer.param_groups[0]["lr"] is rate


def test_all_misfits_are_in_one_message_and_nothing_is_changed(tmp_path: Path) -> None:
    one = LARS(tree(), 0.5, **OPTIONS)
    one.step(gradients())
    save(tmp_path / "run", one)
    other = {"a": {"w": jnp.ones((3, 2)), "b": jnp.ones(3)}, "x": jnp.ones(1)}
    two = LARS(other, 0.5, **OPTIONS)
    two.step(other)
    before = seen(two)
    start = r"6 misfits: state_dict must be of parameters named .*; the momentum buffer of 'a.w' must have "
    for call in (lambda: load(tmp_path / "run", two), lambda: load(tmp_path / "run", params=other)):
        with pytest.raises(ValueError, match=start) as caught:
            call()
        assert caught.type is ValueError
        assert str(tmp_path / "run") in str(caught.value)
    assert_same(seen(two), before)
    two.step(other)


def test_what_is_refused(tmp_path: Path) -> None:
    optimizer = LARS(tree(), 0.5, **OPTIONS)
    save(tmp_path / "run", optimizer)
    state = lars(0.5, **OPTIONS).init(tree())
    for call, message in (
        (lambda: save(tmp_path / "x", optimizer, tree()), "params must not be given for an optimizer"),
        (lambda: save(tmp_path / "x", optimizer, momentum=0.9), "momentum must not be given for an optimizer"),
        (lambda: save(tmp_path / "x", state), "save needs the params and the learning_rate of a state"),
        (lambda: save(tmp_path / "x", state, tree()), "save needs the params and the learning_rate of a state"),
        (lambda: load(tmp_path / "run", "optimizer"), "optimizer must be a lars_jax.LARS; got 'optimizer'"),
        (lambda: load(tmp_path / "run", optimizer, params=tree()), "load takes an optimizer, .*; got both"),
        (lambda: lars_array.load(tmp_path / "run", optimizer), "got an object of lars_jax.optimizer.LARS"),
    ):
        with pytest.raises(TypeError, match=message):
            call()
    lars_array.save(tmp_path / "run", lars_array.init({"w": np.ones(2)}))
    with pytest.raises(ValueError, match=r"it holds the state of lars_array.update"):
        load(tmp_path / "run", optimizer)
    assert [x.name for x in tmp_path.iterdir()] == ["run"]


def test_a_file_alone_and_without_parameters(tmp_path: Path) -> None:
    optimizer = LARS(tree(), 0.5, **OPTIONS)
    optimizer.step(gradients())
    lars_array.save(tmp_path / "run", optimizer)  # without parameters
    assert load(tmp_path / "run").params is None
    assert_same(load(tmp_path / "run").state, optimizer.state_dict())
    other = LARS(tree(2.0), 0.5, **OPTIONS)
    load(tmp_path / "run", other)
    assert_same(numbers(other.params), numbers(tree(2.0)))
    assert_same(other.state_dict(), optimizer.state_dict())
