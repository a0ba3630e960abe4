"""What is done about sums and coefficients that are not finite."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from array_api_compat import size

from lars_array.arrays import asarray
from lars_array.dtypes import accumulation_dtype, real_dtype

__all__ = ["NonFiniteError", "finite", "largest", "refuse_nonfinite"]


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


def finite(S: Any, C: Any, limit: Any, *, xp: Any) -> Any:
    """Return where sums and coefficients are finite in the type that a layer is computed in.

    Parameters
    ----------
    S, C : arrays of shape (layers, 3) and (layers, 6)
        Sums and coefficients.
    limit : array of shape (layers,)
        From `largest`.
    xp : Array API namespace
        Namespace of the arrays.

    Returns
    -------
    bool array of shape (layers,)
        False where the layer's update would not be finite.
    """
    return xp.all(xp.isfinite(S), axis=1) & xp.all(xp.abs(C) <= limit[:, None], axis=1)


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
