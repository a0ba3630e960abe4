"""Trees of parameters as named leaves, and other trees matched with them by names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from numbers import Real
from operator import index
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import GetAttrKey, all_leaves, keystr, tree_flatten_with_path

from lars_array._stepper import shown
from lars_jax._messages import check_leaf, check_tree

__all__ = ["Leaves", "as_bool", "as_count", "as_jax"]

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
    boxed: dict[Path, int]  # by the path of an object with one attribute, in which Flax keeps an array

    @classmethod
    def of(cls, tree: Any, what: str = "params", is_leaf: Callable[[Any], bool] | None = None) -> Leaves:
        """Return the leaves of a tree; `what` is its name in messages."""
        check_tree(what, tree)
        found, structure = tree_flatten_with_path(tree, is_leaf=is_leaf)
        names = [keystr(path, simple=True, separator=".") or "0" for path, _ in found]
        counts = Counter(names)
        names = [keystr(path) if counts[name] > 1 else name for name, (path, _) in zip(names, found)]
        paths = [tuple(keystr((key,), simple=True) for key in path) for path, _ in found]
        boxes = {i: paths[i][:-1] for i, (keys, _) in enumerate(found) if keys and isinstance(keys[-1], GetAttrKey)}
        of_boxes = Counter(boxes.values())
        boxed = {path: i for i, path in boxes.items() if of_boxes[path] == 1}
        return cls(tree, names, [leaf for _, leaf in found], structure, paths, boxed)

    @classmethod
    def of_arrays(cls, tree: Any) -> Leaves:
        """Return the leaves of a tree as JAX arrays; raise TypeError for one that can't be a parameter of `lars`."""
        leaves = cls.of(tree)
        values = list(map(as_jax, leaves.values))
        for name, p in zip(leaves.names, values):
            check_leaf(name, p)
        return leaves._replace(values=values)

    def match(self, other: Any, what: str, optional: Collection[str] = ()) -> list[Any]:
        """Return one entry of another tree, or None, for each leaf.

        Parameters
        ----------
        other : pytree
            Of this structure, with None for leaves or whole branches; or with the same names, whatever the types of its
            dicts and modules, such as a State of Flax for its module. A module may hold more than `other` does.
        what : str
            Its name in messages.
        optional : collection of str, optional
            The names of leaves that may be missing.

        Raises
        ------
        ValueError
            If it has other names.
        """
        with suppress(ValueError, TypeError):
            found = self.structure.flatten_up_to(other)
            if all_leaves([x for x in found if x is not None]):
                return list(found)
        tree = Leaves.of(other, what, lambda x: x is None)
        places, missing = self._places(tree, optional)
        counts = Counter(places)
        extra = [name for i, name in enumerate(tree.names) if tree.values[i] is not None and counts[i] != 1]
        if missing or extra or other is None:
            difference = _difference(missing, extra, other)
            raise ValueError(f"{what} must have the structure of the parameters; {difference}")
        return [None if i is None else tree.values[i] for i in places]

    def spread(
        self, option: str, value: Any, wanted: str, read: Callable[[Any], Any], optional: Collection[str] = ()
    ) -> list[Any]:
        """Return the value of an option for each leaf, None for one that needs none.

        Parameters
        ----------
        option : str
            Its name in messages.
        value : object, tree, or callable
            One value for all leaves; a tree of values by the names of the leaves, or of branches that they are on; or a
            function that returns one of these, given the parameters, with None for other leaves. A module with
            ``__call__`` is a tree if it fits.
        wanted : str
            What the option holds, for messages.
        read : callable
            Returns the value for an entry of the tree, None for what is no entry.
        optional : collection of str, optional
            The names of leaves for which there may be no value.

        Raises
        ------
        TypeError, ValueError
            If a value is of another type, or the tree does not fit.
        """
        leaves = [None if name in optional else leaf for name, leaf in zip(self.names, self.values)]
        params = self.structure.unflatten(leaves) if optional else self.tree
        if callable(value) and all_leaves([value]):
            value = value(params)
        try:
            return self._spread(option, value, wanted, read, optional)
        except (TypeError, ValueError) as problem:
            if not callable(value):
                raise
            try:
                value = value(params)
            except Exception:
                raise problem from None
        return self._spread(option, value, wanted, read, optional)

    def _spread(
        self, option: str, value: Any, wanted: str, read: Callable[[Any], Any], optional: Collection[str]
    ) -> list[Any]:
        tree = Leaves.of(value, option, lambda x: x is None or read(x) is not None)
        places, missing = self._places(tree, optional)
        unused = set(range(len(tree.names))) - set(places)
        extra = [i for i in sorted(unused) if tree.values[i] is not None]
        if _is_module_beside(tree.structure, self.structure):
            extra = []
        if extra:
            empty = set(Leaves.of(self.tree, is_leaf=lambda x: not jax.tree.leaves(x)).paths) - set(self.paths)
            extra = [i for i in extra if empty.isdisjoint(_upwards(tree.paths[i]))]
        if missing or extra:
            difference = _difference(missing, [tree.names[i] for i in extra], value)
            raise ValueError(f"{option} must have the structure of the parameters, or begin as it does; {difference}")
        found = [None if i is None else read(tree.values[i]) for i in places]
        for name, i, x in zip(self.names, places, found):
            if i is not None and x is None and name not in optional:
                raise TypeError(f"{option} must hold {wanted}; got {shown(tree.values[i])} for {shown(name)}")
        return found

    def _places(self, other: Leaves, optional: Collection[str]) -> tuple[list[int | None], list[str]]:
        """Return the place of each leaf's entry in another tree, and the names of leaves that should have one.

        It is at the path of the leaf, above it, or in the only attribute there.
        """
        at = {path: i for i, path in enumerate(other.paths)}
        places = [next((at[x] for x in _upwards(path) if x in at), other.boxed.get(path)) for path in self.paths]
        if any(i is not None for i in places) and _is_module_beside(self.structure, other.structure):
            return places, []
        return places, [name for name, i in zip(self.names, places) if i is None and name not in optional]


def _upwards(path: Path) -> Iterator[Path]:
    """Yield a path and those above it."""
    return (path[:length] for length in range(len(path), -1, -1))


def _is_module_beside(tree: Any, other: Any) -> bool:
    """Return whether a structure is a module's, and another isn't, which need not have all that the module holds."""
    kind, _ = tree.node_data() or (tuple, None)
    of_other, _ = other.node_data() or (None, None)
    return kind is not of_other and not issubclass(kind, (Mapping, list, tuple))


def _difference(missing: Sequence[str], extra: Sequence[str], given: Any) -> str:
    parts = [f"it has nothing for {shown(missing[0])}"] if missing else []
    parts += [f"no parameter is at {shown(extra[0])}"] if extra else []
    return f"got {shown(given)}" if all_leaves([given]) or not parts else " and ".join(parts)


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
    return {0: False, 1: True}.get(np.asarray(x).item())


def as_count(x: Any) -> int | None:
    """Return an integer of at least 0, None for anything else, such as a traced one."""
    try:
        return index(x) if not isinstance(x, bool) and index(x) >= 0 else None
    except TypeError:
        return None
