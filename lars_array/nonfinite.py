"""What is done about sums and coefficients that are not finite."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from array_api_compat import size

from lars_array.arrays import asarray
from lars_array.dtypes import real_dtype

__all__ = ["NonFiniteError", "finite", "nonfinite_layers", "refuse_nonfinite"]


class NonFiniteError(ValueError):
    """A step was refused, and nothing changed, because a layer's update would not have been finite."""


def finite(S: Any, C: Any, params: Sequence[Any], *, xp: Any) -> Any:
    """Return where sums and coefficients are finite in the type that a layer is computed in.

    Parameters
    ----------
    S, C : arrays of shape (layers, 3) and (layers, 6)
        Sums and coefficients.
    params : sequence of arrays
        One entry a layer.
    xp : Array API namespace
        Namespace of the arrays.

    Returns
    -------
    bool array of shape (layers,)
        False where the layer's update would not be finite.
    """
    types = [real_dtype(p, xp) for p in params]
    largest = {kind: float(xp.finfo(kind).max) for kind in set(types)}
    limit = asarray([largest[kind] for kind in types], C.dtype, like=C, xp=xp)
    return xp.all(xp.isfinite(S), axis=1) & xp.all(xp.abs(C) <= limit[:, None], axis=1)


def nonfinite_layers(S: Any, C: Any, params: Sequence[Any], policies: Sequence[str], *, xp: Any) -> list[int]:
    """Return the layers whose update would not be finite and whose policy is not "propagate".

    Parameters
    ----------
    S, C : arrays of shape (layers, 3) and (layers, 6)
        Sums and coefficients; their values are read.
    params : sequence of arrays
        One entry a layer.
    policies : sequence of str
        The option `nonfinite` of each layer.
    xp : Array API namespace
        Namespace of the arrays.

    Returns
    -------
    list of int
        Usually empty.
    """
    if set(policies) == {"propagate"}:
        return []
    ok = finite(S, C, params, xp=xp)
    if bool(xp.all(ok)):
        return []
    return [i for i, policy in enumerate(policies) if policy != "propagate" and not bool(ok[i])]


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
