"""What messages say of objects that may be anything: short, and with the way out."""

from __future__ import annotations

from typing import Any

import jax

from lars_array._arrays import COMPUTE, check_parameter, dtype_name
from lars_array._stepper import shown

__all__ = ["check_leaf", "check_tree", "is_torch", "no_parameters", "shown"]


def check_tree(what: str, tree: Any) -> None:
    """Raise TypeError for an iterator, which JAX takes for a leaf; `what` is its name in messages."""
    if hasattr(tree, "__next__"):
        raise TypeError(f"{what} must be a tree of arrays, such as a list or a dict; got the iterator {shown(tree)}")


def check_leaf(name: str, leaf: Any) -> None:
    """Raise TypeError for a leaf that can't be a parameter of `lars`; one without values but with a dtype can."""
    if isinstance(leaf, jax.ShapeDtypeStruct) and dtype_name(leaf.dtype) in COMPUTE:
        return
    if _is_odd(leaf):
        raise TypeError(f"parameter {shown(name)} must be an array{_way_out(leaf)}; got {shown(leaf)}")
    check_parameter(name, leaf)


def no_parameters(params: Any) -> Exception:
    """Return the error for a tree without parameters."""
    text = "optimizer got an empty parameter list: params must be a tree with floating-point arrays"
    odd = next(filter(_is_odd, jax.tree.leaves(params)), None)
    if odd is None:
        return ValueError(f"{text}; got {shown(params)}")
    return TypeError(f"{text}{_way_out(odd)}; got {shown(odd)}")


def _is_odd(leaf: Any) -> bool:
    return not hasattr(leaf, "dtype") or is_torch(leaf)


def is_torch(x: Any) -> bool:
    """Return whether an object is a tensor or a module of torch."""
    return any(kind.__module__.split(".")[0] == "torch" for kind in type(x).__mro__)


def _way_out(leaf: Any) -> str:
    if is_torch(leaf):
        return ", and torch parameters belong in lars_torch.LARS"
    return ", and None where nothing is trained, as equinox.filter puts it" if callable(leaf) else ""
