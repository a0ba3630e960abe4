"""What messages say of objects that may be anything: short, and with the way out."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from typing import Any

import jax

from lars_array._arrays import COMPUTE, check_parameter, dtype_name

__all__ = ["check_leaf", "is_torch", "no_parameters", "short"]

_SHORT = reprlib.Repr()
_SHORT.maxother = _SHORT.maxstring = 80
_SHORT.maxlevel = 3


def short(x: Any) -> str:
    """Return the repr of an object, cut to a length that can be read."""
    text = " ".join(_SHORT.repr(x).split())
    return text if len(text) <= 160 else f"{text[:150]}..."


def check_leaf(name: str, leaf: Any) -> None:
    """Raise TypeError for a leaf that can't be a parameter of `lars`; one without values but with a dtype can."""
    if isinstance(leaf, jax.ShapeDtypeStruct) and dtype_name(leaf.dtype) in COMPUTE:
        return
    if _is_odd(leaf):
        raise TypeError(f"parameter {name!r} must be an array{_way_out(leaf)}; got {short(leaf)}")
    check_parameter(name, leaf)


def no_parameters(leaves: Sequence[Any]) -> Exception:
    """Return the error for the leaves of a tree without parameters."""
    text = "optimizer got an empty parameter list: params must be a tree with floating-point arrays"
    odd = next(filter(_is_odd, leaves), None)
    if odd is None:
        return ValueError(f"{text}; got {len(leaves)} leaves of other types")
    return TypeError(f"{text}{_way_out(odd)}; got {short(odd)}")


def _is_odd(leaf: Any) -> bool:
    return not hasattr(leaf, "dtype") or is_torch(leaf)


def is_torch(x: Any) -> bool:
    """Return whether an object is a tensor or a module of torch."""
    return any(kind.__module__.split(".")[0] == "torch" for kind in type(x).__mro__)


def _way_out(leaf: Any) -> str:
    if is_torch(leaf):
        return ", and torch parameters belong in lars_torch.LARS"
    if hasattr(leaf, "__next__"):
        return ", and JAX takes an iterator for one leaf: make it a list or a dict"
    return ", and None where nothing is trained, as equinox.filter puts it" if callable(leaf) else ""
