"""The sums of layers that several devices share, in one collective for the whole model."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import reduce
from operator import and_
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import all_leaves

from lars_jax._trees import Leaves

__all__ = ["NAMESPACE", "mapped_axes", "sum_over_devices"]

Axes = tuple[Hashable, ...]


def _stack_replicated(arrays: Sequence[Any], *arguments: Any, **options: Any) -> Any:
    return jnp.stack(list(map(_replicated, arrays)), *arguments, **options)


def _replicated(x: Any) -> Any:
    """Return the sums of slices that lie on several devices of an explicit mesh as an array that all have whole."""
    sharding = getattr(jax.typeof(x), "sharding", None) if hasattr(jax, "typeof") else None
    if sharding is None or not any(sharding.spec):
        return x
    return jax.sharding.reshard(x, jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec()))


# `jax.numpy` for the stages of a step, which put the sums of all layers into one table.
NAMESPACE = SimpleNamespace(**vars(jnp) | {"stack": _stack_replicated})


def mapped_axes(axis_name: Any, leaves: Leaves) -> list[Axes]:
    """Return the mapped axes that each leaf is split over, as `lars` was given them."""
    value = () if axis_name is None else axis_name
    wanted = "names of mapped axes"
    try:
        found = leaves.spread("axis_name", value, wanted, _name)
    except (TypeError, ValueError):  # a tuple is a tree where the parameters are one too, else several names
        found = leaves.spread("axis_name", value, wanted, _names)
    return [names or () for names in found]


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


def _name(x: Any) -> Axes | None:
    if x is None:
        return ()
    try:
        hash(x)
    except TypeError:
        return None
    return (x,) if all_leaves([x]) else None


def _names(x: Any) -> Axes | None:
    if type(x) is tuple and all(name is not None and _name(name) is not None for name in x):
        return x
    return _name(x)
