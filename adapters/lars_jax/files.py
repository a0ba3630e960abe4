"""Saving and loading by `lars_array.save` and `load`: the eager optimizer with its parameters, and states of `lars`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

import lars_array
from lars_array import Saved
from lars_array._arrays import form_of
from lars_array._stepper import shown, uninterrupted
from lars_array.hyperparams import DEFAULTS
from lars_array.state.checkpoint import Problems, check_params, fitted, located_in_file, read_checkpoint
from lars_jax._trees import Leaves
from lars_jax.checkpoint import from_state_dict, to_state_dict
from lars_jax.optimizer import LARS

__all__ = ["load", "save"]


def save(
    path: Any,
    optimizer_or_state: Any,
    params: Any = None,
    learning_rate: Any = None,
    *,
    metadata: Mapping[str, Any] | None = None,
    omit: Collection[str] = (),
    **options: Any,
) -> None:
    """Save the state of an optimizer and its parameters, see `lars_array.save`.

    Parameters
    ----------
    path : str or path
        As there.
    optimizer_or_state : LARS, or pytree that holds a LarsState
        An eager optimizer, which is saved with its parameters; or a state of `lars`, alone or in another one, such as
        that of ``optax.chain``.
    params : pytree, optional
        The parameters; with a state only, and needed there.
    learning_rate : float, array of shape (), or schedule, optional
        With a state only, as `lars` was given; leave it out with ``omit=("lr",)``.
    metadata : dict, optional
        As there.
    omit : collection of str, optional
        As there.
    **options
        With a state only, the other arguments that `lars` was called with.

    Raises
    ------
    ValueError, TypeError, OSError
        As there, and as `to_state_dict` does.
    """
    if isinstance(optimizer_or_state, LARS):
        given = {"params": params, "learning_rate": learning_rate, **options}
        wrong = next((name for name, x in given.items() if x is not None), None)
        if wrong is not None:
            raise TypeError(f"{wrong} must not be given for an optimizer, which has its own; got {shown(given[wrong])}")
        state: Any = optimizer_or_state
        tree = optimizer_or_state.params
    else:
        if params is None or (learning_rate is None and "lr" not in omit):
            raise TypeError("save needs the params and the learning_rate of a state, which does not hold them")
        rate = 0.0 if learning_rate is None else learning_rate
        tree, state = params, to_state_dict(optimizer_or_state, params, rate, **options)
    leaves = Leaves.of(tree)
    arrays = {name: np.asarray(x) for name, x in zip(leaves.names, leaves.values) if _is_array(x)}
    lars_array.save(path, state, params=arrays, metadata=metadata, omit=omit)


def load(path: Any, optimizer: LARS | None = None, *, params: Any = None) -> Saved:
    """Load a file of `save`, of `lars_array.save` or of `lars_torch.save`.

    Parameters
    ----------
    path : str or path
        The file.
    optimizer : LARS, optional
        Takes over the state, and the parameters if the file has them.
    params : pytree, optional
        The parameters of a state of `lars`, in its structure and with its names, shapes and types; not modified.

    Returns
    -------
    Saved
        With `params`: "state" is a `LarsState`, and "params" are a tree like `params` of JAX arrays. With neither: as
        `lars_array.load` returns it.

    Raises
    ------
    ValueError, TypeError, OSError
        As `lars_array.load` does. Then nothing was changed.
    """
    if optimizer is not None and not isinstance(optimizer, LARS):
        raise TypeError(f"optimizer must be a lars_jax.LARS; got {shown(optimizer)}")
    if optimizer is not None and params is not None:
        raise TypeError("load takes an optimizer, which has its own params, or params; got both")
    saved = lars_array.load(path)
    if optimizer is None and params is None:
        return saved
    tree = Leaves.of(params if optimizer is None else optimizer.params)
    own = {name: x for name, x in zip(tree.names, tree.values) if _is_array(x)}
    problems, state = Problems(), saved.state
    with located_in_file(path):
        if not isinstance(state, Mapping):
            raise ValueError("it holds the state of lars_array.update, which LARS can't take over")
        with problems.noted():
            groups = _groups_of(state, own) if optimizer is None else optimizer.param_groups
            names = [list(group["names"]) for group in groups]
            state = fitted(state, groups)
            trained = [name for group in names for name in group]
            forms = [form_of(own[name].dtype, own[name].shape) for name in trained]
            read_checkpoint(state, names, forms)
        if saved.params is not None:
            with problems.noted():
                check_params(saved.params, own)
        problems.raise_all()
        if optimizer is None:
            state = from_state_dict(state, params)
    new = _tree(tree, saved.params)
    if optimizer is None:
        return saved._replace(state=state, params=new)
    with uninterrupted():
        if new is not None:
            optimizer.replace_params(new)
        optimizer.load_state_dict(state)
    return Saved(None, optimizer.params, saved.metadata)


def _groups_of(state: Mapping[str, Any], own: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return groups as those in a file, if these are of the parameters' names, else one with all names.

    `lars` has its own hyper-parameters: those that were omitted in the file are of no consequence.
    """
    groups = [list(group["names"]) for group in state["param_groups"]]
    names = [name for group in groups for name in group]
    groups = groups if sorted(names) == sorted(own) else [list(own)]
    return [{"names": names, "lr": 0.0, **DEFAULTS} for names in groups]


def _is_array(x: Any) -> bool:
    return hasattr(x, "dtype") and hasattr(x, "shape") and x.dtype != object


def _tree(tree: Leaves, arrays: Mapping[str, Any] | None) -> Any:
    """Return a tree with saved arrays in the place of its own."""
    if arrays is None:
        return None
    leaves = [jnp.asarray(arrays[name]) if name in arrays else x for name, x in zip(tree.names, tree.values)]
    return tree.structure.unflatten(leaves)
