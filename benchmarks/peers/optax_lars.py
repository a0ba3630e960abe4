"""optax's LARS, whose ratio divides by the norm of the decayed gradient."""

from __future__ import annotations

from typing import Any

from benchmarks.contestant import DECAY, ETA, LR, MOMENTUM, Run
from benchmarks.peers.jax_run import jax_run

__all__ = ["build"]


def build(params: list[Any], grads: list[Any], *, donate: bool) -> Run:
    """``optax.lars`` and ``optax.apply_updates`` in one compiled function."""
    import optax

    optimizer = optax.lars(LR, weight_decay=DECAY, trust_coefficient=ETA, momentum=MOMENTUM)

    def update(params: Any, state: Any, grads: Any) -> Any:
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return jax_run(params, grads, optimizer.init, update, donate=donate)
