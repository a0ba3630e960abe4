"""What is done about sums and coefficients that are not finite."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import Any

from array_api_compat import size

from lars_array.arrays import asarray
from lars_array.dtypes import COMPUTE, accumulation_dtype, dtype_name, real_dtype

__all__ = ["NonFiniteError", "all_finite", "finite", "largest", "most_squares", "refuse_nonfinite"]


class NonFiniteError(ValueError):
    """A step was refused, and nothing changed, because a layer's update would not have been finite."""


def largest(params: Sequence[Any], *, like: Any, xp: Any) -> Any:
    """Return the largest number of the type that each layer is computed in, an array of shape (layers,) beside `like`.

    Parameters
    ----------
    params : sequence of arrays
        One entry a layer.
    like : array
        An array on the device where the result shall be.
    xp : Array API namespace
        Namespace of the arrays.

    Returns
    -------
    array of shape (layers,)
        In the type that sums are accumulated in.
    """
    types = [real_dtype(p, xp) for p in params]
    limits = {kind: float(xp.finfo(kind).max) for kind in set(types)}
    return asarray([limits[kind] for kind in types], accumulation_dtype(xp), like=like, xp=xp)


def most_squares(params: Sequence[Any], dtypes: Sequence[Any], *, like: Any, xp: Any) -> Any:
    """Return up to which sum of its squares a gradient is certain to fit into the type that its layer is computed in.

    Parameters
    ----------
    params : sequence of arrays
        One entry a layer.
    dtypes : sequence of dtypes
        Those of their gradients.
    like : array
        An array on the device where the result shall be.
    xp : Array API namespace
        Namespace of the arrays.

    Returns
    -------
    array of shape (layers,), or None
        Infinite where the gradient's type is no wider; None where all of it would be.
    """
    wide = [dtype_name(dtype) == "float64" for dtype in dtypes]
    if not any(wide):
        return None
    limit = float(xp.finfo(xp.float32).max) ** 2
    narrowed = [w and COMPUTE[dtype_name(p.dtype)] == "float32" for w, p in zip(wide, params, strict=True)]
    most = [limit if concerned else inf for concerned in narrowed]
    return asarray(most, accumulation_dtype(xp), like=like, xp=xp) if any(narrowed) else None


def finite(S: Any, C: Any, limit: Any, most: Any = None, *, xp: Any) -> Any:
    """Return where sums and coefficients are finite in the type that a layer is computed in.

    Parameters
    ----------
    S, C : arrays of shape (layers, 3) and (layers, 6)
        Sums and coefficients.
    limit : array of shape (layers,)
        From `largest`.
    most : array of shape (layers,), optional
        From `most_squares`.
    xp : Array API namespace
        Namespace of the arrays.

    Returns
    -------
    bool array of shape (layers,)
        False where the layer's update would not be finite.
    """
    ok = xp.all(xp.isfinite(S), axis=1) & xp.all(xp.abs(C) <= limit[:, None], axis=1)
    return ok if most is None else ok & (S[:, 1] <= most)


def all_finite(S: Any, C: Any, limit: float, *, xp: Any) -> bool:
    """Return True only where `finite` is true of all layers: at once, for a limit that holds for all of them."""
    return bool(xp.max(S) < inf) and bool(xp.max(C) <= limit) and bool(xp.min(C) >= -limit)


def refuse_nonfinite(name: str, p: Any, g: Any, *, xp: Any) -> None:
    """Raise for the layer `name`, saying what of it is not finite.

    Parameters
    ----------
    name : str
        The layer's name.
    p, g : arrays
        Its parameters and its gradient.
    xp : Array API namespace
        Namespace of the arrays.

    Raises
    ------
    NonFiniteError
        Always.
    """
    for what, x in (("gradient", g), ("parameter", p)):
        count = int(xp.sum(xp.astype(~xp.isfinite(x), xp.int64)))
        if count:
            raise NonFiniteError(
                f"the {what} of {name!r} has {count} non-finite entries of {size(x)}; nothing was changed"
            )
    raise NonFiniteError(
        f"the update of {name!r} overflows {p.dtype!r} or the float64 of its norms; nothing was changed"
    )
