"""The kernel that any Array API namespace with writable arrays can run: `core`, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lars_array import core
from lars_array.kernels.masters import destinations, with_masters

__all__ = ["Kernel"]


class Kernel:
    """See `lars_array.kernels`."""

    TAKES = "writable arrays of any Array API library"

    def __init__(
        self, params: Sequence[Any], buffers: Sequence[Any], xp: Any, masters: Sequence[Any] | None = None
    ) -> None:
        self.buffers, self.xp, self._masters = buffers, xp, masters
        self.move(params)

    @staticmethod
    def unusable(params: Sequence[Any]) -> str | None:
        """Return None: it takes everything that an optimizer does."""
        return None

    def move(self, params: Sequence[Any]) -> None:
        """Take `params` for the parameters from now on."""
        self.params, self.copies = with_masters(params, self._masters)

    def sums(self, grads: Sequence[Any], operand: Any = None) -> Any:
        """Return `core.sums`."""
        return core.sums(self.params, grads, self.buffers, operand, xp=self.xp)

    def apply(self, grads: Sequence[Any], C: Any, written: Any = None, out: Sequence[Any] | None = None) -> None:
        """Write `core.apply` of each layer to its parameters, in place or in `out`, and its buffer.

        Where `written` is not None and false these stay what they are, and `out` becomes a copy.
        """
        places = destinations(self.params, self.copies, out)
        arrays = zip(self.params, grads, self.buffers, self.copies, *places, strict=True)
        for i, (p, g, v, copy, p_place, copy_place) in enumerate(arrays):
            new_p, new_v = core.apply(p, g, v, C[i, :], xp=self.xp)
            new_copy = None if copy is None else self.xp.astype(new_p, copy.dtype)
            for old, new, place in ((p, new_p, p_place), (v, new_v, v), (copy, new_copy, copy_place)):
                if place is not None:
                    place[...] = new if written is None else self.xp.where(written, new, old)
