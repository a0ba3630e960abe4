"""Masks of a tree of parameters: which leaves are decayed, and which are adapted."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

import lars_array
from lars_array import is_bias_or_norm
from lars_array._arrays import is_array
from lars_jax._trees import Leaves

__all__ = ["param_groups"]


def param_groups(
    params: Any, weight_decay: Any, *, no_decay: Any = is_bias_or_norm, no_adapt: Any = is_bias_or_norm
) -> dict[str, Any]:
    """Return the weight decay and the masks that exclude parameters as the groups of `lars_array.param_groups` do.

    Parameters
    ----------
    params : pytree
        The parameters; leaves that are no floating-point arrays are excluded.
    weight_decay : float, array of shape (), or schedule
        Weight decay of the parameters that are not excluded.
    no_decay : callable, iterable, or None
        Parameters without weight decay, as there; a name is a path with dots. By default parameters with at most one
        axis, and biases.
    no_adapt : callable, iterable, or None
        In the same form, the parameters that are not adapted and take SGD steps.

    Returns
    -------
    dict
        "weight_decay", "weight_decay_mask" and "trust_ratio_mask", arguments of `lars` and `LARS`.

    Raises
    ------
    TypeError, ValueError
        As there.

    Warns
    -----
    UserWarning
        For a regular expression that no name matches.

    Examples
    --------
    >>> import jax.numpy as jnp, lars_jax
    >>> params = {"dense": {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}}
    >>> param_groups(params, 1e-4)["weight_decay_mask"]
    {'dense': {'bias': False, 'kernel': True}}
    >>> solver = lars_jax.lars(0.1, **param_groups(params, 1e-4))
    """
    tree = Leaves.of(params)
    arrays = {
        name: x for name, x in zip(tree.names, tree.values) if is_array(x) and jnp.issubdtype(x.dtype, jnp.inexact)
    }
    groups = lars_array.param_groups(arrays, 1.0, no_decay=no_decay, no_adapt=no_adapt)
    decayed = {name for group in groups if group["weight_decay"] for name in group["params"]}
    adapted = {name for group in groups if group.get("adapt", True) for name in group["params"]}
    masks = {"weight_decay_mask": decayed, "trust_ratio_mask": adapted}
    found = {mask: tree.structure.unflatten([name in own for name in tree.names]) for mask, own in masks.items()}
    return {"weight_decay": weight_decay, **found}
