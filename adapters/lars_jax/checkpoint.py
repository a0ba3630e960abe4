"""Conversion between the states of `lars_jax.lars` and of `lars_array.LARS`, whose form `lars_jax.LARS` shares."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lars_array._arrays import accumulation_dtype, compute_dtype, form_of
from lars_array._stepper import shown
from lars_array.hyperparams import needs_buffer
from lars_array.state.checkpoint import read_checkpoint
from lars_jax._trees import Leaves
from lars_jax.transformation import LarsState, bind_arguments, momentum_buffers

__all__ = ["from_state_dict", "regrouped", "to_state_dict"]


def to_state_dict(state: Any, params: Any, learning_rate: Any, **options: Any) -> dict[str, Any]:
    """Return the state of `lars` as `lars_array.LARS.load_state_dict` takes it.

    Parameters
    ----------
    state : LarsState, or pytree that holds one
        From ``init`` or ``update``; alone, or in another state, such as that of `optax.chain`.
    params : pytree
        The parameters.
    learning_rate : float, array of shape (), or schedule
        As `lars` was given: a state of optax does not hold it.
    **options
        The other arguments that `lars` was called with.

    Returns
    -------
    dict
        By the names of the leaves, their paths with dots; arrays are NumPy's. Leaves with the same masks and
        `layer_axes` form a group.

    Raises
    ------
    ValueError, TypeError
        If there is no such state or it does not fit the parameters, or as `lars` does.
    """
    leaves = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, LarsState))
    states = [x for x in leaves if isinstance(x, LarsState)]
    if len(states) != 1:
        raise ValueError(f"state must hold one state of lars; it holds {len(states)}")
    found, tree = states[0], Leaves.of(params)
    trace = [None] * len(tree.names) if found.trace is None else momentum_buffers(found, tree)
    bound = bind_arguments(learning_rate, **options)
    of_names = {}
    for name, v, first, previous_lr in zip(tree.names, trace, found.first.tolist(), found.previous_lr.tolist()):
        buffer = {} if v is None or first else {"momentum_buffer": np.array(v)}
        of_names[name] = {"previous_lr": previous_lr, **buffer}
    groups = bound.groups(tree.names, bound.of_leaves(tree))
    return {"steps": int(found.count), "skipped_steps": 0, "param_groups": groups, "state": of_names}


def from_state_dict(state_dict: Mapping[str, Any], params: Any) -> LarsState:
    """Return the state of `lars` from one of `lars_array.LARS`, of torch's optimizer in that form, or of `LARS` here.

    Parameters
    ----------
    state_dict : mapping
        From ``state_dict``; not modified. Its hyper-parameters are ignored: they are arguments of `lars`.
    params : pytree
        The parameters, the names of whose leaves are those in `state_dict`.

    Returns
    -------
    LarsState
        Buffers are copies; of zeros where there was none; none at all where the momentum is 0.

    Raises
    ------
    ValueError, TypeError
        If the state does not fit the parameters.
    """
    tree = Leaves.of_arrays(params)
    array_of = {name: form_of(p.dtype, p.shape) for name, p in zip(tree.names, tree.values)}
    options = _options_of_names(state_dict, tree.names)
    names = [group["names"] for group in state_dict["param_groups"]]
    read = read_checkpoint(state_dict, names, [array_of[name] for name in options])
    state = [read.state[name] for name in tree.names]
    if any("master" in own for own in state):
        raise ValueError("state_dict must not hold master weights, which lars does not keep")
    known = [own.get("momentum_buffer") for own in state]
    buffers = [
        jnp.zeros(p.shape, compute_dtype(p, jnp)) if v is None else jnp.array(v, dtype=compute_dtype(p, jnp))
        for p, v in zip(tree.values, known)
    ]
    return LarsState(
        count=jnp.asarray(read.steps, jnp.int32),
        trace=tree.structure.unflatten(buffers) if any(map(needs_buffer, read.groups)) else None,
        first=jnp.asarray([v is None for v in known], jnp.bool),
        previous_lr=jnp.asarray([own["previous_lr"] for own in state], accumulation_dtype(jnp)),
    )


def regrouped(state_dict: Mapping[str, Any], names_of_groups: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Return a state dict with its names in other groups, each with the options of the group where its names were.

    Raises
    ------
    ValueError
        If names of one new group come from groups with different options, or are missing.
    TypeError
        If `state_dict` is not one.
    """
    options = _options_of_names(state_dict, [name for names in names_of_groups for name in names])
    for names in names_of_groups:
        first = options[names[0]]
        for name in names:
            differing = {key for key in options[name] if options[name][key] != first.get(key)}
            if differing or len(options[name]) < len(first):
                raise ValueError(
                    f"state_dict must have the same options for {shown(names[0])} and {shown(name)}, which are in one "
                    f"group here; their {min(differing, default='options')} differs"
                )
    groups = [options[names[0]] | {"names": list(names)} for names in names_of_groups]
    return {**state_dict, "param_groups": groups}


def _options_of_names(state_dict: Any, wanted: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the options in the group of each name; raise for other names than are wanted."""
    groups = state_dict.get("param_groups") if isinstance(state_dict, Mapping) else None
    if not isinstance(groups, (list, tuple)) or not all(isinstance(group, Mapping) for group in groups):
        raise TypeError(f"state_dict must be what state_dict() returned; got {shown(state_dict)}")
    if not all("names" in group for group in groups):
        raise ValueError("state_dict must hold groups with the key 'names'")
    counts = Counter(name for group in groups for name in group["names"])
    counts.subtract(wanted)
    kinds = {"an unknown or repeated": 1, "no": -1}
    parts = {what: [shown(name) for name, surplus in counts.items() if surplus * k > 0] for what, k in kinds.items()}
    if any(parts.values()):
        found = " and ".join(f"{what} {', '.join(names):.100}" for what, names in parts.items() if names)
        raise ValueError(f"state_dict must be of parameters named as these are; it has {found}")
    # `layer_axes` are the parameters' own here.
    options = [{key: x for key, x in group.items() if key != "names"} | {"layer_axes": 0} for group in groups]
    return {name: own for group, own in zip(groups, options) for name in group["names"]}
