"""The sums of layers that several devices share, in one collective for the whole model."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import reduce
from operator import and_
from typing import Any

import jax
import jax.numpy as jnp

from lars_jax._trees import spread

__all__ = ["mapped_axes", "sum_over_devices"]

Axes = tuple[Hashable, ...]


def mapped_axes(axis_name: Any, params: Any) -> list[Axes]:
    """Return the mapped axes that each leaf is split over, as `lars` was given them."""
    given = spread("axis_name", () if axis_name is None else axis_name, params, _is_axes, "names of mapped axes")
    return [() if names is None else names if isinstance(names, tuple) else (names,) for names in given]


def sum_over_devices(S: Any, axes: Sequence[Axes]) -> Any:
    """Return sums over whole layers from those over the parts on this device.

    Parameters
    ----------
    S : array of shape (rows, 3)
        The result of `lars_array.core.sums`.
    axes : sequence of tuple
        The mapped axes that each row is split over.

    Returns
    -------
    array of shape (rows, 3)
        S itself if no row is split.
    """
    every = tuple(dict.fromkeys(name for names in axes for name in names))
    if not every:
        return S
    # A row that each device has whole counts once: on the first device along the axes that it isn't split over.
    kinds = list(dict.fromkeys(axes))
    masks = [
        reduce(and_, [jax.lax.axis_index(name) == 0 for name in every if name not in names], jnp.asarray(True))
        for names in kinds
    ]
    counts = jnp.stack(masks)[jnp.asarray([kinds.index(names) for names in axes])]
    return jax.lax.psum(jnp.where(counts[:, None], S, 0.0), every)


def _is_axes(x: Any) -> bool:
    return x is None or isinstance(x, (str, tuple))
