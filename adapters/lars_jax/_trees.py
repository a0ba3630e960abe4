"""Trees of parameters as named leaves, and other trees matched with them by names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from operator import index
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import GetAttrKey, all_leaves, keystr, tree_flatten_with_path

from lars_array._stepper import shown
from lars_jax._messages import check_tree

__all__ = ["Leaves", "as_bool", "as_count", "as_jax", "spread"]

Path = tuple[str, ...]


class Leaves(NamedTuple):
    """The leaves of a tree of parameters.

    A name is the path with dots, such as "encoder.0.kernel", as torch names parameters; a tree that is one leaf has
    the name "0", as in `lars_array`. Paths with the same name, by dots in a key, are named as JAX writes them.
    """

    tree: Any
    names: list[str]
    values: list[Any]
    structure: Any
    paths: list[Path]

    @classmethod
    def of(cls, tree: Any) -> Leaves:
        """Return the leaves of a tree."""
        check_tree("params", tree)
        found, structure = tree_flatten_with_path(tree)
        names = [keystr(path, simple=True, separator=".") or "0" for path, _ in found]
        repeated = {name for name, count in Counter(names).items() if count > 1}
        names = [keystr(path) if name in repeated else name for name, (path, _) in zip(names, found)]
        return cls(tree, names, [leaf for _, leaf in found], structure, [_keys(path) for path, _ in found])

    def match(self, other: Any, what: str, optional: Sequence[bool] | None = None) -> list[Any]:
        """Return one entry of another tree, or None, for each leaf.

        Parameters
        ----------
        other : pytree
            Of this structure, with None for leaves or whole branches; or with the same names, whatever the types of its
            dicts and modules, such as a State of Flax for its module. A module may hold more than `other` does.
        what : str
            Its name in messages.
        optional : sequence of bool, optional
            Which leaves may be missing.

        Raises
        ------
        ValueError
            If it has other names.
        """
        check_tree(what, other)
        try:
            found = list(self.structure.flatten_up_to(other))
            if all_leaves([x for x in found if x is not None]):
                return found
        except (ValueError, TypeError):
            pass
        entries = _Entries(other)
        places = [entries.at(path) for path in self.paths]
        needed = [True] * len(places) if optional is None else [not x for x in optional]
        missing = [name for name, place, is_needed in zip(self.names, places, needed) if is_needed and place is None]
        counts = Counter(place for place in places if place is not None)
        if counts and _may_lack(self.structure, jax.tree.structure(other)):
            missing = []
        extra = [keys for i, keys in enumerate(entries.paths) if entries.values[i] is not None and counts[i] != 1]
        if missing or extra or other is None:
            raise ValueError(f"{what} must have the structure of the parameters; {_difference(missing, extra, other)}")
        return [None if place is None else entries.values[place] for place in places]


def spread(
    option: str, value: Any, leaves: Leaves, wanted: str, *reads: Callable[[Any], Any], optional: Sequence[bool] = ()
) -> list[Any]:
    """Return an option's value for each leaf, None for one that needs none.

    Parameters
    ----------
    option : str
        Its name in messages.
    value : object, tree, or callable
        One value for all leaves; a tree of values by the names of the leaves, or of branches that they are on; or a
        function that returns one of these, given the parameters, with None for other leaves. A module with ``__call__``
        is a tree if it fits.
    leaves : Leaves
        The parameters.
    wanted : str
        What the option holds, for messages.
    *reads : callable
        Each returns the value for an entry of the tree, or None for what is none; the first that fits all is used.
    optional : sequence of bool
        For which leaves there may be no value.

    Raises
    ------
    TypeError, ValueError
        If a value is of another type, or the tree does not fit.
    """
    for is_result in (False, True):
        problem: Exception | None = None
        if is_result or not (callable(value) and all_leaves([value])):
            for read in reads:
                found = _spread(option, value, leaves, wanted, read, optional)
                if not isinstance(found, Exception):
                    return found
                problem = found
        if is_result or not callable(value):
            assert problem is not None
            raise problem
        present = [None if optional and optional[i] else leaf for i, leaf in enumerate(leaves.values)]
        try:
            value = value(leaves.structure.unflatten(present) if any(optional) else leaves.tree)
        except Exception:
            if problem is None:  # a function
                raise
            raise problem from None
    raise AssertionError


def _spread(
    option: str, value: Any, leaves: Leaves, wanted: str, read: Callable[[Any], Any], optional: Sequence[bool]
) -> list[Any] | Exception:
    one = None if value is None else read(value)
    if one is not None:
        return [one] * len(leaves.names)
    entries = _Entries(value, lambda x: read(x) is not None)
    values = [read(x) for x in entries.values]
    places = [entries.at(path) for path in leaves.paths]
    found = [None if place is None else values[place] for place in places]
    lacking = [i for i, x in enumerate(found) if x is None and not (optional and optional[i])]
    extra = set(range(len(values))) - set(places)
    extra = {i for i in extra if entries.values[i] is not None}
    if _may_lack(of_value := jax.tree.structure(value), leaves.structure):
        extra = set()
    if extra:
        empty = _Entries(leaves.tree, lambda x: not jax.tree.leaves(x))
        nodes = {path for path, x in zip(empty.paths, empty.values) if not jax.tree.leaves(x)}
        extra = {i for i in extra if not any(entries.paths[i][:n] in nodes for n in range(len(entries.paths[i]) + 1))}
    given = [i for i in lacking if places[i] is not None]
    if given and not extra:
        name, x = leaves.names[given[0]], entries.values[places[given[0]]]  # type: ignore[index]
        return TypeError(f"{option} must hold {wanted}; got {shown(x)} for {shown(name)}")
    if len(lacking) < len(found) and _may_lack(leaves.structure, of_value):
        lacking = []
    if lacking or extra:
        missing = [leaves.names[i] for i in lacking]
        difference = _difference(missing, [entries.paths[i] for i in sorted(extra)], value)
        return ValueError(f"{option} must have the structure of the parameters, or begin as it does; {difference}")
    return found


class _Entries:
    """The leaves of a tree by the names on their paths, None among them."""

    def __init__(self, tree: Any, is_entry: Callable[[Any], bool] = lambda x: False) -> None:
        found, _ = tree_flatten_with_path(tree, is_leaf=lambda x: x is None or is_entry(x))
        self.values = [value for _, value in found]
        self.paths = [_keys(path) for path, _ in found]
        self._places = {path: i for i, path in enumerate(self.paths)}
        # Flax keeps an array in an object with one attribute, which may be in one of two trees only.
        boxes = {i: keys[:-1] for i, keys in enumerate(self.paths) if keys and isinstance(found[i][0][-1], GetAttrKey)}
        counts = Counter(boxes.values())
        self._boxed = {path: i for i, path in boxes.items() if counts[path] == 1}

    def at(self, path: Path) -> int | None:
        """Return the place of the entry for a leaf: at its path, above it, or in the only attribute there."""
        above = (path[:length] for length in range(len(path), -1, -1))
        return next((self._places[x] for x in above if x in self._places), self._boxed.get(path))


def _keys(path: Sequence[Any]) -> Path:
    return tuple(keystr((key,), simple=True) for key in path)


def _may_lack(tree: Any, other: Any) -> bool:
    """Return whether a structure is a module's, which may hold more than there are entries for in another's."""
    kind, _ = tree.node_data() or (tuple, None)
    of_other, _ = other.node_data() or (None, None)
    return kind is not of_other and not issubclass(kind, (Mapping, list, tuple))


def _difference(missing: Sequence[str], extra: Sequence[Path], given: Any) -> str:
    if all_leaves([given]):
        return f"got {shown(given)}"
    parts = [f"it has nothing for {shown(missing[0])}"] if missing else []
    parts += [f"no parameter is at {shown('.'.join(extra[0]))}"] if extra else []
    return " and ".join(parts) or f"got {shown(given)}"


# ------------------------------------------------------------------------------------------------- entries as values


def as_jax(leaf: Any) -> Any:
    """Return a JAX array for a NumPy array and for a floating-point number, and anything else as it is."""
    return jnp.asarray(leaf) if isinstance(leaf, np.ndarray | np.generic | float | complex) else leaf


def as_bool(x: Any) -> Any:
    """Return True or False for a number or an array of shape () that is 1 or 0, a traced one as it is, else None."""
    if not isinstance(x, Real | np.generic | np.ndarray | jax.Array) or getattr(x, "shape", ()) != ():
        return None
    if isinstance(x, jax.core.Tracer):
        return x
    value = np.asarray(x).item()
    return bool(value) if value in (0, 1) else None


def as_count(x: Any) -> int | None:
    """Return an integer of at least 0, None for anything else."""
    if isinstance(x, bool | jax.core.Tracer) or getattr(getattr(x, "dtype", None), "kind", "") == "b":
        return None
    try:
        return index(x) if index(x) >= 0 else None
    except TypeError:
        return None
