"""What all optimizers of JAX have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.contestant import Run

__all__ = ["jax_run", "moved"]


def jax_run(
    params: list[Any],
    grads: list[Any],
    init: Callable[[Any], Any],
    update: Callable[[Any, Any, Any], Any],
    *,
    donate: bool,
) -> Run:
    """Return the run of a pure function under ``jax.jit``.

    Parameters
    ----------
    params, grads : list of ndarray
        Emptied: JAX has arrays of its own.
    init : callable
        From parameters to the state.
    update : callable
        ``update(params, state, grads) -> (params, state)``.
    donate : bool
        Whether it may write into the old parameters and state.

    Returns
    -------
    Run
        Of a call that waits for its results.
    """
    import jax

    with jax.default_device(jax.devices("cpu")[0]):
        own_params, own_grads = moved(params), moved(grads)
        held = (own_params, init(own_params))
    compiled = jax.jit(update, donate_argnums=(0, 1) if donate else ())

    def step() -> None:
        nonlocal held
        held = jax.block_until_ready(compiled(*held, own_grads))

    return Run(step, lambda: [np.asarray(p) for p in held[0]])


def moved(arrays: list[Any]) -> list[Any]:
    """Copy one array after the other, giving back the first before the next is made."""
    import jax.numpy as jnp

    arrays.reverse()
    return [jnp.array(arrays.pop(), copy=True) for _ in range(len(arrays))]
