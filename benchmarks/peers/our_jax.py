"""`lars_jax`: the transformation under jit, and the eager optimizer."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.contestant import DECAY, ETA, LR, MOMENTUM, OPTIONS, Run, UnavailableError
from benchmarks.peers.jax_run import jax_run, moved

__all__ = ["build", "build_eager", "build_eager_copying"]


def build(params: list[Any], grads: list[Any], *, donate: bool) -> Run:
    """``lars_jax.lars`` and ``optax.apply_updates`` in one compiled function."""
    import optax

    from lars_jax import lars

    optimizer = lars(LR, momentum=MOMENTUM, weight_decay=DECAY, trust_coefficient=ETA)

    def update(params: Any, state: Any, grads: Any) -> Any:
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return jax_run(params, grads, optimizer.init, update, donate=donate)


def build_eager(params: list[Any], grads: list[Any]) -> Run:
    """``lars_jax.LARS``, which may write into the old parameters, as the compiled functions may."""
    return _eager(params, grads, donate=True)


def build_eager_copying(params: list[Any], grads: list[Any]) -> Run:
    """``lars_jax.LARS`` where the old parameters stay what they were."""
    return _eager(params, grads, donate=False)


def _eager(params: list[Any], grads: list[Any], *, donate: bool) -> Run:
    from lars_jax import LARS

    own_params, own_grads = moved(params), moved(grads)
    try:
        optimizer = LARS(own_params, **OPTIONS, nonfinite="propagate", kernel="compiled", donate=donate)
    except ValueError as error:  # no such kernel, or not here
        raise UnavailableError(str(error)) from error
    del own_params
    return Run(lambda: optimizer.step(own_grads), lambda: [np.asarray(p) for p in optimizer.params])
