"""Turns in which JAX and the kernels use the same memory: JAX's own arrays, handed to and fro by donating them.

A donated array is dead to whoever holds it, and JAX's next computation has its memory once all that JAX was still to do
with it is done; if something outside of JAX sees it too, JAX copies. So nobody sees what is written to between two such
computations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["copied", "handed_over", "waited_for"]

# As many arrays go into one computation: thousands would take XLA seconds to compile.
_MOST = 256


def _count(mark: Any) -> Any:
    return mark + jnp.ones((), mark.dtype)


@partial(jax.jit, donate_argnums=1, keep_unused=True)
def _handed_over(mark: Any, arrays: Any, also: Any) -> Any:
    del also
    # Tied together, so that no array is what it was before and nothing is left out.
    return jax.lax.optimization_barrier((_count(mark), arrays))


@partial(jax.jit, keep_unused=True)
def _copied(mark: Any, arrays: Any, also: Any) -> Any:
    del also
    return _count(mark), [jnp.copy(x) for x in arrays]


def handed_over(mark: Any, arrays: Sequence[Any], also: Sequence[Any]) -> tuple[Any, list[Any]]:
    """Return the same arrays anew, on the same memory, those given being deleted.

    Where something outside of JAX sees an array, what is returned is a copy, and the array given may not be deleted.

    Parameters
    ----------
    mark : array of shape ()
        An integer, committed to the device of the arrays.
    arrays : sequence of jax.Array
        On one device, none of them twice or among the next.
    also : sequence of jax.Array or None
        What is to be done with, too, before the result is there; JAX does not use its memory again before that.

    Returns
    -------
    tuple (mark, arrays)
        The mark is another array, there when all the others are.
    """
    return _in_parts(_handed_over_or_copied, mark, arrays, also)


def copied(mark: Any, arrays: Sequence[Any], also: Sequence[Any]) -> tuple[Any, list[Any]]:
    """Return copies of arrays; all else is as for `handed_over`, but that nothing is deleted."""
    return _in_parts(_copied, mark, arrays, also)


def waited_for(mark: Any, also: Sequence[Any]) -> Any:
    """Return a mark that is there when all arrays are."""
    return _in_parts(_copied, mark, (), also)[0]


def _handed_over_or_copied(mark: Any, arrays: Any, also: Any) -> Any:
    try:
        return _handed_over(mark, arrays, also)
    except (RuntimeError, ValueError):  # if it is for another reason, copies can't be made either
        return _copied(mark, arrays, also)


def _in_parts(
    function: Callable[..., Any], mark: Any, arrays: Sequence[Any], also: Sequence[Any]
) -> tuple[Any, list[Any]]:
    done: list[Any] = []
    for start in range(0, max(len(arrays), len(also)), _MOST):
        part = slice(start, start + _MOST)
        mark, new = function(mark, list(arrays[part]), list(also[part]))
        done += new
    return mark, done
