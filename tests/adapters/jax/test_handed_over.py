"""Arrays that are handed to the eager optimizer, and what it hands out: layouts, masters, copies given away."""

from __future__ import annotations

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lars_array
from lars_jax import LARS, lars

layouts = pytest.importorskip("jax.experimental.layout")

DONATE = pytest.mark.parametrize("donate", [False, True])


@DONATE
def test_arrays_may_lie_in_another_order(donate: bool) -> None:
    if not hasattr(layouts, "Format"):
        pytest.skip("this JAX has no formats")
    zeros, numbers = jnp.zeros((2, 3)), jnp.arange(6.0).reshape(2, 3)
    columns = layouts.Format(layouts.Layout(major_to_minor=(1, 0)), zeros.sharding)
    optimizer = LARS({"w": zeros}, lr=1.0, donate=donate)
    given = jax.device_put(numbers, columns)
    np.testing.assert_array_equal(optimizer.step({"w": given})["w"], -numbers)
    optimizer.replace_params({"w": given})
    np.testing.assert_array_equal(optimizer.params["w"], numbers)
    np.testing.assert_array_equal(given, numbers)


@DONATE
def test_parameters_that_are_replaced_have_masters_of_their_own(donate: bool) -> None:
    optimizer = LARS({"w": jnp.ones(4, jnp.bfloat16)}, lr=0.5, momentum=0.9, master_weights=True, donate=donate)
    grads = {"w": jnp.ones(4)}
    optimizer.step(grads)
    optimizer.replace_params({"w": jnp.full(4, 10, jnp.bfloat16)})
    assert optimizer.step(grads)["w"].tolist() == [9.0625] * 4  # 10 - 0.5 · 1.9, rounded


@pytest.mark.parametrize("how", ["skipped", "refused"])
def test_copies_that_were_given_away_are_made_again(how: str) -> None:
    optimizer = LARS({"w": jnp.ones(4)}, lr=0.5)
    jax.jit(lambda tree: jax.tree.map(lambda x: 1.5 * x, tree), donate_argnums=0)(optimizer.step({"w": jnp.ones(4)}))
    if how == "skipped":
        found: Any = optimizer.step({"w": jnp.ones(4)}, found_inf=True)
    else:
        with pytest.raises(ValueError):
            optimizer.step({"w": jnp.full(4, jnp.nan)})
        found = optimizer.params
    assert found["w"].tolist() == [0.5] * 4


def test_an_empty_parameter_may_be_its_own_gradient() -> None:
    optimizer = LARS({"w": jnp.ones(3), "e": jnp.zeros(0)}, lr=0.5, donate=True)
    optimizer.replace_params(optimizer.params)
    found = optimizer.step({"w": jnp.ones(3), "e": optimizer.params["e"]})
    assert found["w"].tolist() == [0.5] * 3 and found["e"].shape == (0,)


@DONATE
def test_norms_are_known_wherever_parameters_have_come_to_lie(donate: bool) -> None:
    optimizer = LARS({"w": jnp.full(4, 0.5)}, lr=0.1, donate=donate)
    optimizer.step({"w": jnp.ones(4)})
    seen = np.asarray(optimizer.params["w"])
    before = optimizer.norms()
    assert before
    optimizer.replace_params({"w": jnp.ones(4)})
    assert optimizer.norms() == before
    del seen


def test_state_of_32_bits_stays_so_where_64_are_allowed() -> None:
    params = {"w": jnp.ones(3)}
    transformation = lars(0.1, always_adapt=True)
    state = transformation.init(params)
    with jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64():
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            _, new = transformation.update(params, state, params)
    assert new.previous_lr.dtype == state.previous_lr.dtype


@DONATE
def test_gradients_may_change_their_library_and_some_may_be_missing(donate: bool) -> None:
    rng = np.random.default_rng(0)
    first, g = ([rng.normal(size=5).astype(np.float32) for _ in range(2)] for _ in range(2))
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}
    optimizer, reference = LARS(first, donate=donate, **options), lars_array.LARS([p.copy() for p in first], **options)
    of_jax = list(map(jnp.asarray, g))
    given = [of_jax, g, [of_jax[0], g[1]], [None, of_jax[1]], [of_jax[0], None], [None, g[1]], [None, None], of_jax]
    for grads in given:
        found = optimizer.step(grads)
        reference.step([None if x is None else np.array(x) for x in grads])
    expected = reference.param_groups[0]["params"]
    assert [np.asarray(p).tobytes() for p in found] == [p.tobytes() for p in expected]
    assert optimizer.steps == reference.steps == len(given)
    assert repr(optimizer) == f"lars_jax.{reference!r}"


def test_gradients_may_lie_where_the_parameters_do() -> None:
    optimizer, plain = (LARS({"w": jnp.arange(4.0)}, lr=0.5, donate=donate) for donate in (True, False))
    for _ in range(2):
        other = optimizer.params["w"].addressable_data(0)  # another array on the same memory
        found, expected = optimizer.step({"w": other}), plain.step({"w": jnp.array(plain.params["w"])})
        assert found["w"].tolist() == expected["w"].tolist()
