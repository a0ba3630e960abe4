"""Memory that JAX and the kernels use alternately: JAX's own arrays, passed from one to the other by donating them.

A donated array is deleted, and JAX's next computation gets its memory once everything that JAX still had to do with it
is done; if another library has a view of the array, JAX copies it instead. So nothing else sees the writes between two
such computations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["barrier", "check_context", "copy", "donate"]

# Arrays of one computation: XLA would take seconds to compile thousands.
_MOST = 256


def _next(token: Any) -> Any:
    return token + jnp.ones((), token.dtype)


@partial(jax.jit, donate_argnums=1, keep_unused=True)
def _donated(token: Any, arrays: Any, also: Any) -> Any:
    del also
    # Tied together, so that each array is a new one and none is left out.
    return jax.lax.optimization_barrier((_next(token), arrays))


@partial(jax.jit, keep_unused=True)
def _copied(token: Any, arrays: Any, also: Any) -> Any:
    del also
    return _next(token), [jnp.copy(x) for x in arrays]


_counted = jax.jit(_next)


def check_context(token: Any) -> None:
    """Raise where JAX would not compute here and now on the device of the token.

    Raises
    ------
    TypeError
        Inside a function that JAX traces.
    ValueError
        Where a mesh of other devices is set.
    """
    try:
        new = _counted(token)
    except ValueError as error:
        way_out = "call it outside of the mesh, or use lars_jax.lars"
        raise ValueError(f"lars_jax.LARS can't run under jax.set_mesh of other devices: {way_out}") from error
    if isinstance(new, jax.core.Tracer):
        raise TypeError(
            "lars_jax.LARS must be called outside of functions that JAX traces, where it would run while they are "
            "traced and not when they are called; under jit use lars_jax.lars"
        )


def donate(token: Any, arrays: Sequence[Any], also: Sequence[Any]) -> tuple[Any, list[Any]]:
    """Return new arrays on the same memory; those given are deleted.

    If another library has a view of an array, the result is a copy, and the array given may not be deleted.

    Parameters
    ----------
    token : array of shape ()
        An integer, committed to the device of the arrays.
    arrays : sequence of jax.Array
        On one device, none of them twice or in `also`.
    also : sequence of jax.Array or None
        Arrays that must be ready before the results are; JAX does not reuse their memory before that.

    Returns
    -------
    tuple (token, arrays)
        The new token is ready when all arrays are.
    """
    return _in_parts(_donated_or_copied, token, arrays, also)


def copy(token: Any, arrays: Sequence[Any], also: Sequence[Any]) -> tuple[Any, list[Any]]:
    """Return copies of arrays; otherwise as `donate`, but nothing is deleted."""
    return _in_parts(_copied, token, arrays, also)


def barrier(token: Any, arrays: Sequence[Any]) -> Any:
    """Return a token that is ready when all arrays are."""
    return _in_parts(_copied, token, (), arrays)[0]


def _donated_or_copied(token: Any, arrays: Any, also: Any) -> Any:
    try:
        return _donated(token, arrays, also)
    except (RuntimeError, ValueError):  # for any other reason, copying fails as well
        return _copied(token, arrays, also)


def _in_parts(
    function: Callable[..., Any], token: Any, arrays: Sequence[Any], also: Sequence[Any]
) -> tuple[Any, list[Any]]:
    done: list[Any] = []
    for start in range(0, max(len(arrays), len(also)), _MOST):
        part = slice(start, start + _MOST)
        token, new = function(token, list(arrays[part]), list(also[part]))
        done += new
    return token, done
