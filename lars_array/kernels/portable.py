"""The kernel for any Array API namespace with writable arrays: `core`, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lars_array import core
from lars_array.kernels.base import Gradients, KernelArrays, Writing

__all__ = ["Kernel"]


class Kernel(Writing):
    """See `lars_array.kernels`."""

    DESCRIPTION = "writable arrays of any Array API library"

    def __init__(self, arrays: KernelArrays, xp: Any) -> None:
        self._trained, self._copies, self._buffers, self._xp = arrays.trained, arrays.copies, arrays.buffers, xp

    @staticmethod
    def unsupported_reason(params: Sequence[Any]) -> str | None:
        """Return None: it takes all parameters that an optimizer does."""
        return None

    @staticmethod
    def fallback() -> Any:
        """Return None: it takes all layouts."""
        return None

    def sums(self, grads: Gradients, operand: Any = None) -> Any:
        """Return `core.sums`."""
        return core.sums(self._trained, grads.arrays, self._buffers, operand, xp=self._xp)

    def writer(self, grads: Gradients, C: Any, taken: Any = None) -> Callable[[], None]:
        """See `Writing`; the results of all rows are computed here."""
        rows, pairs = zip(self._trained, grads.arrays, self._buffers, self._copies, strict=True), []
        for i, (p, g, v, copy) in enumerate(rows):
            new_p, new_v = core.apply(p, g, v, C[i, :], xp=self._xp)
            new_copy = None if copy is None else self._xp.astype(new_p, copy.dtype)
            for old, new in ((p, new_p), (v, new_v), (copy, new_copy)):
                if old is not None:
                    pairs.append((old, new if taken is None else self._xp.where(taken, new, old)))

        def write() -> None:
            for old, new in pairs:
                old[...] = new

        return write
