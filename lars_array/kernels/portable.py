"""The kernel that any Array API namespace with writable arrays can run: `core`, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lars_array import core
from lars_array.kernels.masters import with_masters

__all__ = ["Kernel"]


class Kernel:
    """See `lars_array.kernels`."""

    TAKES = "writable arrays of any Array API library"

    def __init__(
        self, params: Sequence[Any], buffers: Sequence[Any], xp: Any, masters: Sequence[Any] | None = None
    ) -> None:
        self.buffers, self.xp = buffers, xp
        self.params, self.copies = with_masters(params, masters)

    @staticmethod
    def unusable(params: Sequence[Any]) -> str | None:
        """Return None: it takes everything that an optimizer does."""
        return None

    def sums(self, grads: Sequence[Any], operand: Any = None) -> Any:
        """Return `core.sums`."""
        return core.sums(self.params, grads, self.buffers, operand, xp=self.xp)

    def apply(self, grads: Sequence[Any], C: Any, written: Any = None) -> None:
        """Write `core.apply` of each layer into its parameters and its buffer, if `written` is None or true."""
        for i, (p, g, v, copy) in enumerate(zip(self.params, grads, self.buffers, self.copies, strict=True)):
            new_p, new_v = core.apply(p, g, v, C[i, :], xp=self.xp)
            rounded = None if copy is None else self.xp.astype(new_p, copy.dtype)
            for old, new in ((p, new_p), (v, new_v), (copy, rounded)):
                if old is not None:
                    old[...] = new if written is None else self.xp.where(written, new, old)
