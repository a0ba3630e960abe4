"""Trees of parameters as lists of named leaves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["as_jax", "is_bool", "is_count", "leaves_as", "named_leaves", "spread"]


def named_leaves(tree: Any) -> tuple[list[str], list[Any], Any]:
    """Return names, leaves and structure of a tree.

    A name is the path with dots, such as "encoder.0.kernel", as torch names parameters; a tree that is one leaf has
    the name "0", as in `lars_array`. Paths with the same name, by dots in a key, are named as JAX writes them.
    """
    paths, structure = jax.tree_util.tree_flatten_with_path(tree)
    names = [jax.tree_util.keystr(path, simple=True, separator=".") or "0" for path, _ in paths]
    repeated = {name for name, count in Counter(names).items() if count > 1}
    names = [jax.tree_util.keystr(path) if name in repeated else name for name, (path, _) in zip(names, paths)]
    return names, [leaf for _, leaf in paths], structure


def as_jax(leaf: Any) -> Any:
    """Return a JAX array for a NumPy array, and anything else as it is."""
    return jnp.asarray(leaf) if isinstance(leaf, np.ndarray | np.generic) else leaf


def leaves_as(structure: Any, tree: Any, what: str) -> list[Any]:
    """Return one entry of `tree`, or None, for each leaf of `structure`; `what` is its name in messages."""
    try:
        return list(structure.flatten_up_to(tree))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{what} must have the structure of the parameters; {error}") from None


def is_bool(x: Any) -> bool:
    """Return whether `x` is True or False."""
    return isinstance(x, bool | np.bool_)


def is_count(x: Any) -> bool:
    """Return whether `x` is an integer of at least 0."""
    return isinstance(x, int) and not isinstance(x, bool) and x >= 0


def spread(option: str, value: Any, params: Any, is_valid: Callable[[Any], bool], wanted: str) -> list[Any]:
    """Return an option's value for each leaf of `params`.

    Parameters
    ----------
    option : str
        Its name in messages.
    value : object, tree, or callable
        One value for all leaves; a tree of values, of the structure of `params` or a prefix of it; or a function that
        returns one of these, given `params`.
    params : pytree
        The parameters.
    is_valid : callable
        Whether a value has the right type.
    wanted : str
        The type's name in messages.

    Raises
    ------
    TypeError, ValueError
        If a value is of another type, or the tree does not fit.
    """
    tree = value(params) if callable(value) else value

    def over(part: Any, subtree: Any) -> Any:
        if not is_valid(part) and jax.tree.leaves(subtree):
            raise TypeError(f"{option} must hold {wanted}; got {part!r}")
        return jax.tree.map(lambda _: part, subtree)

    try:
        full = jax.tree.map(over, tree, params, is_leaf=lambda x: x is None or is_valid(x))
    except ValueError as error:
        raise ValueError(f"{option} must have the structure of the parameters, or begin as it does; {error}") from None
    return leaves_as(jax.tree.structure(params), full, option)
