"""`update` under jax.jit is the eager one, and is traced once."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from references import assert_close
from strategies import layers_of

from lars_array import RULES, NonFiniteError, init, update

jax = pytest.importorskip("jax")


@pytest.fixture(autouse=True)
def in_64_bits() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


OPTIONS: dict[str, Any] = {"momentum": 0.9, "weight_decay": 0.1, "trust_coefficient": 0.1, "max_grad_norm": 3.0}


def on_jax(arrays: dict[str, Any]) -> dict[str, Any]:
    return {name: jax.numpy.asarray(x) for name, x in arrays.items()}


@pytest.mark.parametrize("rule", RULES)
def test_jit_is_eager_and_is_traced_once(rule: str) -> None:
    traces = 0

    @jax.jit
    def jitted(params: Any, grads: Any, state: Any, lr: Any) -> Any:
        nonlocal traces
        traces += 1
        return update(params, grads, state, lr=lr, rule=rule, **OPTIONS)

    params, gradients = layers_of(4, steps=4)
    params = on_jax(params)
    ours, our_state = params, init(params)
    theirs, their_state = params, init(params)
    for step, grads in enumerate(map(on_jax, gradients)):
        lr = 0.1 / (step + 1)
        ours, our_state = jitted(ours, grads, our_state, lr)
        theirs, their_state = update(theirs, grads, their_state, lr=lr, rule=rule, **OPTIONS)
    assert traces == 1, f"traced {traces} times in 4 steps"
    assert list(ours) == sorted(theirs)  # jit sorts, and so the state must not depend on the order
    assert_states_close(ours, our_state, theirs, their_state)


def assert_states_close(ours: Any, our_state: Any, theirs: Any, their_state: Any, allowed: float = 1e-12) -> None:
    for name in theirs:
        assert_close(np.asarray(ours[name]), np.asarray(theirs[name]), allowed, name)
        mine, other = (np.asarray(state.momentum_buffers[name]) for state in (our_state, their_state))
        assert_close(mine, other, allowed, f"momentum of {name}")
    assert int(our_state.step) == int(their_state.step) == 4
    assert np.array_equal(our_state.first, their_state.first)
    assert_close(np.asarray(our_state.previous_lr), np.asarray(their_state.previous_lr), allowed, "previous lr")


def test_steps_under_jit_and_eager_ones_may_take_turns() -> None:
    # jit sorts a mapping by its keys. Layers that have missed a step tell whether the state goes by name or by place.
    params, gradients = layers_of(4, steps=4)
    options: dict[str, Any] = OPTIONS | {"rule": "nvidia", "dampening": 0.5}
    eager = functools.partial(update, **options)
    jitted = jax.jit(eager)
    results = []
    for functions in ([eager] * 4, [eager, jitted, eager, jitted]):
        now, state = on_jax(params), init(on_jax(params))
        for step, (function, grads) in enumerate(zip(functions, map(on_jax, gradients), strict=True)):
            missing = {"long": None, "kernel": None} if step < 2 else {"bias": None} if step == 2 else {}
            now, state = function({name: now[name] for name in params}, grads | missing, state, lr=0.1 / (step + 1))
        results.append((now, state))
    assert_states_close(*results[1], *results[0])


@pytest.mark.parametrize("dtype", ["f8", "f4", "f2"])
def test_jit_is_the_numpy_optimizer(dtype: str) -> None:
    params, gradients = layers_of(4, dtype, steps=4)
    for named in (params, *gradients):
        del named["scalar"]  # which NumPy's update turns into something else
    jitted = jax.jit(functools.partial(update, lr=lambda step: 0.1 / (step + 1), rule="simclr-popular", **OPTIONS))
    ours, our_state = on_jax(params), init(on_jax(params))
    theirs, their_state = params, init(params)
    for grads in gradients:
        ours, our_state = jitted(ours, on_jax(grads), our_state)
        theirs, their_state = update(
            theirs, grads, their_state, lr=lambda step: 0.1 / (step + 1), rule="simclr-popular", **OPTIONS
        )
    allowed = {"f8": 1e-12, "f4": 1e-5, "f2": 4e-3}[dtype]
    assert_states_close(ours, our_state, theirs, their_state, allowed)


def test_nonfinite_policies_under_jit() -> None:
    params, (grads,) = layers_of(4, steps=1)
    params, grads = on_jax(params), on_jax(grads)
    grads["long"] = grads["long"].at[0].set(np.nan)
    state = init(params)
    skip = jax.jit(functools.partial(update, lr=0.1, nonfinite="skip", **OPTIONS))
    ours, after = skip(params, grads, state)
    for name, p in params.items():
        assert np.array_equal(ours[name], p)
    assert int(after.step) == 0 and bool(np.all(after.first))
    propagated, after = jax.jit(functools.partial(update, lr=0.1, **OPTIONS))(params, grads, state)
    assert not np.isfinite(np.asarray(propagated["long"])).all()
    assert int(after.step) == 1
    with pytest.raises(NonFiniteError, match="'long'"):
        update(params, grads, state, lr=0.1, **OPTIONS)
    with pytest.raises(TypeError, match="can't be traced"):
        jax.jit(functools.partial(update, lr=0.1, nonfinite="raise", **OPTIONS))(params, grads, state)
