"""Conversion between the states of `lars_jax.lars` and of `lars_array.LARS`, whose form `lars_jax.LARS` shares."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lars_array._arrays import accumulation_dtype, compute_dtype
from lars_array._stepper import shown
from lars_array.hyperparams import complete, needs_buffer
from lars_array.state.checkpoint import read_checkpoint
from lars_jax._messages import check_leaf
from lars_jax._trees import Leaves, as_jax
from lars_jax.transformation import LarsState, bind_arguments

__all__ = ["from_state_dict", "regrouped", "to_state_dict"]


def to_state_dict(state: Any, params: Any, learning_rate: Any, **options: Any) -> dict[str, Any]:
    """Return the state of `lars` as `lars_array.LARS.load_state_dict` takes it.

    Parameters
    ----------
    state : LarsState, or pytree that holds one
        From ``init`` or ``update``; alone, or in another state, such as that of ``optax.chain``.
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
    found = _found(state)
    tree = Leaves.of(params)
    names = tree.names
    trace = [None] * len(names) if found.trace is None else tree.match(found.trace, "the trace of state")
    if found.first.shape != (len(names),):
        raise ValueError(f"state must be of as many leaves as the parameters, {len(names)}; got {found.first.shape[0]}")
    bound = bind_arguments(learning_rate, **options)
    groups, group_of = bound.groups(bound.of_leaves(tree))
    param_groups = [
        complete(group) | {"names": [name for name, number in zip(names, group_of) if number == k]}
        for k, group in enumerate(groups)
    ]
    of_names = {}
    for name, v, first, previous_lr in zip(names, trace, found.first.tolist(), found.previous_lr.tolist()):
        buffer = {} if v is None or first else {"momentum_buffer": np.array(v)}
        of_names[name] = {"previous_lr": previous_lr, **buffer}
    return {"steps": int(found.count), "skipped_steps": 0, "param_groups": param_groups, "state": of_names}


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
    tree = Leaves.of(params)
    names, leaves = tree.names, list(map(as_jax, tree.values))
    for name, p in zip(names, leaves):
        check_leaf(name, p)
    of_groups = _names_of_groups(state_dict)
    given = [name for own in of_groups for name in own]
    _check_names(given, names)
    array_of = {name: np.broadcast_to(np.zeros((), p.dtype), p.shape) for name, p in zip(names, leaves)}
    read = read_checkpoint(regrouped(state_dict, of_groups), of_groups, [array_of[name] for name in given])
    state = [read.state[name] for name in names]
    if any("master" in own for own in state):
        raise ValueError("state_dict must not hold master weights, which lars does not keep")
    kinds = [compute_dtype(p, jnp) for p in leaves]
    known = [own.get("momentum_buffer") for own in state]
    buffers = [
        jnp.zeros(p.shape, kind) if v is None else jnp.array(v, dtype=kind) for p, v, kind in zip(leaves, known, kinds)
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
    _names_of_groups(state_dict)
    options: dict[str, dict[str, Any]] = {}
    for group in state_dict["param_groups"]:
        own = {key: x for key, x in group.items() if key != "names"} | {"layer_axes": 0}  # which parameters have here
        options |= dict.fromkeys(group["names"], own)
    _check_names(list(options), [name for names in names_of_groups for name in names])
    groups = []
    for names in names_of_groups:
        for name in names:
            if options[name] != options[names[0]]:
                differing = {key for key in options[name] if options[name][key] != options[names[0]].get(key)}
                raise ValueError(
                    f"state_dict must say the same of {shown(names[0])} and {shown(name)}, which are in one group "
                    f"here; their {min(differing, default='options')} differs"
                )
        groups.append(options[names[0]] | {"names": list(names)})
    return {**state_dict, "param_groups": groups}


def _names_of_groups(state_dict: Any) -> list[list[str]]:
    if not isinstance(state_dict, Mapping) or not isinstance(state_dict.get("param_groups"), (list, tuple)):
        raise TypeError(f"state_dict must be what state_dict() returned; got {shown(state_dict)}")
    groups = state_dict["param_groups"]
    if not all(isinstance(group, Mapping) and "names" in group for group in groups):
        raise ValueError("state_dict must hold groups with the key 'names'")
    return [list(group["names"]) for group in groups]


def _check_names(given: Sequence[str], wanted: Sequence[str]) -> None:
    counts = Counter(given)
    counts.subtract(wanted)
    for name, surplus in counts.items():
        if surplus:
            found = "an unknown or repeated" if surplus > 0 else "no"
            raise ValueError(f"state_dict must be of parameters named as these are; it has {found} {shown(name)}")


def _found(state: Any) -> LarsState:
    leaves = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, LarsState))
    found = [x for x in leaves if isinstance(x, LarsState)]
    if len(found) != 1:
        raise ValueError(f"state must hold one state of lars; it holds {len(found)}")
    return found[0]
