"""Memory that is handed out as arrays of JAX, and used again once nobody sees it."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from lars_array.buffers import aligned_zeros
from lars_array.kernels.helpers import together
from lars_array.kernels.threads import thread_count

__all__ = ["Rooms", "lent_copies"]

PART = 1 << 20  # elements that a thread copies at once


class Rooms:
    """Copies of one array after the other, each in memory that nobody sees.

    The last two are kept to be used again: one may be looked at while the next is made. What is older and still seen
    is its owner's.
    """

    def __init__(self) -> None:
        self._rooms: list[tuple[Any, Any]] = []  # memory, and a weak reference to what JAX holds while it is seen

    def free(self, like: Any) -> Any:
        """Return memory that nobody sees, for a copy of an array."""
        free = next((memory for memory, seen in self._rooms if seen() is None), None)
        return aligned_zeros(like.size, like.dtype).reshape(like.shape) if free is None else free

    def lend(self, memory: Any) -> Any:
        """Return an array of JAX on memory that was `free`. It is not to be written to while that, or a view, lives."""
        lent = memory[...]  # an object of its own, which lives as long as JAX has a use for the memory
        others = [room for room in self._rooms if room[0] is not memory]
        self._rooms = [*others[-1:], (memory, weakref.ref(lent))]
        return jnp.from_dlpack(lent, copy=False)


def lent_copies(rooms: Sequence[Rooms], arrays: Sequence[Any]) -> list[Any]:
    """Return arrays of JAX with the numbers of arrays of NumPy, which are C-contiguous."""
    targets = [room.free(x) for room, x in zip(rooms, arrays)]
    pairs = [(target.reshape(-1), source.reshape(-1)) for target, source in zip(targets, arrays)]
    parts = iter([(t[k : k + PART], s[k : k + PART]) for t, s in pairs for k in range(0, t.size, PART)])

    def work() -> None:
        for target, source in parts:
            np.copyto(target, source)

    together(work, thread_count(2))
    return [room.lend(target) for room, target in zip(rooms, targets)]
