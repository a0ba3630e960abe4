"""Non-finite sums and coefficients: the check per layer, and the error."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import Any

from array_api_compat import size

from lars_array._arrays import COMPUTE, accumulation_dtype, asarray, dtype_name, real_dtype
from lars_array._messages import shown

__all__ = [
    "CAUSES",
    "ELSEWHERE",
    "GRADIENT",
    "PARAMETER",
    "POLICIES",
    "REFUSAL",
    "UPDATE",
    "NonFiniteError",
    "finite",
    "finite_layers",
    "max_finite",
    "max_square_sum",
    "quick_finite",
    "refuse_entries",
    "refuse_nonfinite",
]

POLICIES = ("raise", "skip", "propagate")

# The causes of a rejected step; a device reports the index.
CAUSES = ("gradient", "parameter", "update", "layer elsewhere", "refusal")
GRADIENT, PARAMETER, UPDATE, ELSEWHERE, REFUSAL = range(5)


class NonFiniteError(ValueError):
    """A step was rejected, and nothing was changed, because the update of a layer would not have been finite."""


def max_finite(params: Sequence[Any], *, like: Any, xp: Any) -> Any:
    """Return the largest finite number of each layer's compute dtype, an array of shape (layers,)."""
    types = [real_dtype(p, xp) for p in params]
    limits = {kind: float(xp.finfo(kind).max) for kind in set(types)}
    return asarray([limits[kind] for kind in types], accumulation_dtype(xp), like=like, xp=xp)


def max_square_sum(params: Sequence[Any], dtypes: Sequence[Any], *, like: Any, xp: Any) -> Any:
    """Return the largest sum of squares for which casting each gradient to its compute dtype cannot overflow.

    Parameters
    ----------
    params : sequence of arrays
        One entry per layer.
    dtypes : sequence of dtypes
        The dtypes of their gradients.
    like : array
        An array on the device of the result.
    xp : Array API namespace
        Namespace of the arrays.

    Returns
    -------
    array of shape (layers,), or None
        Infinite for layers whose gradient's type is not wider; None if this applies to all layers.
    """
    wide = [dtype_name(dtype) == "float64" for dtype in dtypes]
    if not any(wide):
        return None
    limit = float(xp.finfo(xp.float32).max) ** 2
    narrowed = [w and COMPUTE[dtype_name(p.dtype)] == "float32" for w, p in zip(wide, params, strict=True)]
    most = [limit if concerned else inf for concerned in narrowed]
    return asarray(most, accumulation_dtype(xp), like=like, xp=xp) if any(narrowed) else None


def finite(S: Any, C: Any, limit: Any, square_limit: Any = None, *, xp: Any) -> Any:
    """Return which layers have sums and coefficients that are finite in their compute dtype.

    Parameters
    ----------
    S, C : arrays of shape (layers, 3) and (layers, 6)
        Sums and coefficients.
    limit : array of shape (layers,)
        From `max_finite`.
    square_limit : array of shape (layers,), optional
        From `max_square_sum`.
    xp : Array API namespace
        Namespace of the arrays.

    Returns
    -------
    bool array of shape (layers,)
        False where the layer's update would not be finite.
    """
    ok = xp.all(xp.isfinite(S), axis=1) & xp.all(xp.abs(C) <= limit[:, None], axis=1)
    return ok if square_limit is None else ok & (S[:, 1] <= square_limit)


def finite_layers(S: Any, C: Any, params: Sequence[Any], dtypes: Sequence[Any], *, xp: Any) -> Any:
    """Return `finite` for layers with these parameters and gradient dtypes."""
    limit = max_finite(params, like=params[0], xp=xp)
    return finite(S, C, limit, max_square_sum(params, dtypes, like=params[0], xp=xp), xp=xp)


def quick_finite(S: Any, C: Any, limit: float, *, xp: Any) -> bool:
    """Return True only if `finite` is true for all layers, by a single test with one limit for all layers."""
    return bool(xp.max(S) < inf) and bool(xp.max(C) <= limit) and bool(xp.min(C) >= -limit)


def refuse_entries(
    rows: Sequence[int], names: Sequence[str], params: Sequence[Any], grads: Sequence[Any], *, S: Any = None, xp: Any
) -> None:
    """Raise NonFiniteError for the first of `rows` that holds a NaN or an infinity, here or elsewhere.

    S holds the sums of all rows where these have pieces on other processes, else it is None.
    """
    for i in rows:
        for kind, x in (("gradient", grads[i]), ("parameter", params[i])):
            count = int(xp.sum(xp.astype(~xp.isfinite(x), xp.int64)))
            if count:
                raise NonFiniteError(
                    f"the {kind} of {shown(names[i])} has {count} non-finite entries of {size(x)}; nothing was changed"
                )
    for i in rows if S is not None else ():
        for kind, column in (("gradient", 1), ("parameter", 0)):
            if not bool(xp.isfinite(S[i, column])):
                raise NonFiniteError(
                    f"the {kind} of {shown(names[i])} is not finite on another process; nothing was changed"
                )


def refuse_nonfinite(
    rows: Sequence[int], names: Sequence[str], params: Sequence[Any], grads: Sequence[Any], *, xp: Any
) -> None:
    """Raise NonFiniteError for the first of `rows` that holds a NaN or an infinity, else for the first."""
    refuse_entries(rows, names, params, grads, xp=xp)
    name, p = names[rows[0]], params[rows[0]]
    raise NonFiniteError(
        f"the update of {shown(name)} overflows {shown(p.dtype)} or the float64 of its norms; nothing was changed"
    )
