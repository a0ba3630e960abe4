"""`Recorder` and the learning rates, over `lars_jax.LARS`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lars_jax
from lars_array import Recorder
from lars_jax import LARS

HYPER: dict[str, Any] = {"momentum": 0.9, "weight_decay": 0.1, "nonfinite": "skip"}


@pytest.fixture(autouse=True)
def strict() -> Iterator[None]:
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.mark.parametrize("donate", [False, True], ids=["kept", "donated"])
def test_each_step_taken_is_recorded(donate: bool) -> None:
    optimizer = LARS({"w": jnp.ones((3, 2)), "b": [jnp.ones(2)]}, 0.1, **HYPER, donate=donate)
    recorder, rows = Recorder(optimizer), []
    for step in range(4):
        size = np.nan if step == 1 else 0.5 + step
        optimizer.step({"w": jnp.full((3, 2), size), "b": [None if step == 0 else jnp.full(2, size)]})
        recorder.record()
        norms, ratios = optimizer.norms(), optimizer.trust_ratios()
        if step != 1:
            rows.append([[*norms.get(x, (np.nan, np.nan)), ratios.get(x, np.nan)] for x in ("w", "b.0")])
    assert recorder.steps.tolist() == [0, 1, 2]
    assert recorder.layers == ["w", "b.0"]
    arrays = recorder.parameter_norms, recorder.gradient_norms, recorder.trust_ratios
    np.testing.assert_array_equal(np.stack(arrays, axis=-1), rows)


def test_a_transformation_is_refused() -> None:
    with pytest.raises(
        TypeError, match="optimizer must be a LARS of lars_array, lars_torch or lars_jax, not functions"
    ):
        Recorder(lars_jax.lars(0.1))


def test_last_lr_is_the_value_of_the_schedule() -> None:
    mask = {"w": True, "b": False}
    schedule = optax.linear_schedule(1.0, 0.0, 4)
    optimizer = LARS({"w": jnp.ones(3), "b": jnp.ones(2)}, schedule, weight_decay=0.1, weight_decay_mask=mask)
    assert optimizer.last_lr == [1.0, 1.0]
    for expected in (1.0, 0.75, 0.5):
        optimizer.step({"w": jnp.ones(3), "b": jnp.ones(2)})
        assert optimizer.last_lr == [expected, expected]
    assert {type(lr) for lr in optimizer.last_lr} == {float}
