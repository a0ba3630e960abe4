"""`lars_jax.lars` on eight devices, in a process of its own: how many there are is settled when JAX starts."""

from __future__ import annotations

from typing import Any

import jax
import pytest
from devices import printed_by


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    (result,) = printed_by("sharded_steps.py", 8)
    of_runs: dict[str, Any] = result
    return of_runs


def test_sharded_steps_are_the_unsharded_ones(found: dict[str, Any]) -> None:
    for name, run in found["runs"].items():
        assert run["distance"] <= 1e-6, f"{name}: off by {run['distance']}"
        assert run["compilations"] == 1, f"{name}: compiled {run['compilations']} times"
    assert found["pmap"] <= 1e-6


JOINED = pytest.mark.skipif(jax.__version_info__ < (0, 7, 2), reason="XLA joins them since JAX 0.7.2")


@JOINED
@pytest.mark.parametrize("name", ["line, first axes", "line, last axes", "line, last axes, stacked"])
def test_all_norms_of_a_model_take_one_all_reduce(found: dict[str, Any], name: str) -> None:
    assert found["runs"][name]["collectives"] == {"all-reduce": 1}


@pytest.mark.parametrize("name", ["line, mapped", "plane, mapped", "line, mapped, stacked"])
def test_under_shard_map_too(found: dict[str, Any], name: str) -> None:
    assert found["runs"][name]["collectives"] == {"all-reduce": 1}


def test_a_third_sum_of_clipped_gradients_takes_another(found: dict[str, Any]) -> None:
    assert found["runs"]["plane, mapped, clipped"]["collectives"] == {"all-reduce": 2}


@JOINED
def test_on_two_axes_jit_takes_one_for_each_set_of_devices(found: dict[str, Any]) -> None:
    """XLA joins what is summed over the same devices: here over all, over a row and over a column of them."""
    assert found["runs"]["plane"]["collectives"] == {"all-reduce": 3}
