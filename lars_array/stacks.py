"""What `LARS` does for stacked parameters: to all but their owner, each slice is a parameter of its own.

What is kept of the slices lies together, in one array of the parameter's shape, of which each has a view.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from array_api_compat import array_namespace

from lars_array.arrays import changed_in_place, check_gradient
from lars_array.buffers import new_buffers
from lars_array.memory import check_writable
from lars_array.rows import Stack

__all__ = ["sliced_gradients", "whole"]


def sliced_gradients(stacks: Sequence[Stack], grads: Sequence[Any], rows: Sequence[Any]) -> list[Any]:
    """Return the gradients of all rows from those of the parameters, which are checked where they are cut up.

    Raises
    ------
    ValueError, TypeError
        If a gradient does not fit its parameter.
    """
    found: list[Any] = []
    for stack, g in zip(stacks, grads, strict=True):
        if stack.lead and g is not None:
            _check_still(stack, rows)
            check_gradient(stack.name, g, stack.param)
        found += stack.slices(g)
    return found


def _check_still(stack: Stack, rows: Sequence[Any]) -> None:
    """Refuse a NumPy array that was changed in place: its rows are views of what it was."""
    p = stack.param
    if not isinstance(p, np.ndarray) or not stack.rows:
        return
    if not p.flags.writeable:
        check_writable(stack.name, p)
    known = [rows[row].__array_interface__ for row in (stack.start, stack.start + stack.rows - 1)]
    axes = len(stack.lead)
    if p.shape[:axes] != stack.lead or known != [p[(*axes * (k,), ...)].__array_interface__ for k in (0, -1)]:
        row = rows[stack.start]
        raise changed_in_place(stack.name, row.dtype, (*stack.lead, *row.shape), p)


def whole(stack: Stack, parts: Sequence[Any]) -> Any:
    """Return one new array of the parameter's shape with what is kept of its slices."""
    (together,) = new_buffers([stack.param], array_namespace(stack.param))
    for mine, part in zip(stack.slices(together), parts, strict=True):
        mine[...] = part
    return together
