"""`lars_array.update`, compiled by JAX."""

from __future__ import annotations

from typing import Any

from benchmarks.contestant import OPTIONS, Run
from benchmarks.peers.jax_run import jax_run

__all__ = ["build"]


def build(params: list[Any], grads: list[Any], *, donate: bool) -> Run:
    """Flash's rule; what is not finite goes through, since a compiled function can't raise."""
    from lars_array import init, update

    def jitted(params: Any, state: Any, grads: Any) -> Any:
        return update(params, grads, state, nonfinite="propagate", **OPTIONS)

    return jax_run(params, grads, init, jitted, donate=donate)
