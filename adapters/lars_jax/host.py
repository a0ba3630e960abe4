"""Parameters on a CPU: memory of JAX, seen and stepped by NumPy's kernels, once JAX is done with it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import jax
import numpy as np

from lars_array.addresses import array_at
from lars_jax.place import Place
from lars_jax.rooms import Rooms, lent_copies
from lars_jax.turns import copied
from lars_jax.values import first_cpu

__all__ = ["HostPlace"]

# Bytes. From about there on an array has new memory from the system each time, which takes longer than the step.
LARGE = 32 << 20


class HostPlace(Place):
    """See `Place`. Gradients may be arrays of NumPy, too."""

    knows = True

    def _start(self, leaves: Sequence[Any]) -> None:
        super()._start(leaves)
        # Of bfloat16 NumPy has no word in DLPack.
        large = [x.nbytes >= max(LARGE, 1) and x.dtype.kind in "fc" for x in self._own]
        self._rooms = [Rooms() if yes and not self._donate else None for yes in large]

    def here(self) -> AbstractContextManager[Any]:
        """Return a context that does nothing."""
        return nullcontext()

    def _sync(self) -> None:
        self._mark.block_until_ready()

    def _awaited(self, given: list[Any]) -> list[Any]:
        jax.block_until_ready(given)
        return []

    def _view(self, array: Any, *, write: bool = False) -> Any:
        if not isinstance(array, jax.Array):
            return np.asarray(array)
        return array_at(array.unsafe_buffer_pointer(), array.shape, array.dtype, write=write)

    @contextmanager
    def numbers(self, groups: Sequence[dict[str, Any]], found_inf: Any) -> Iterator[Any]:
        """Yield what `found_inf` says."""
        self.check("found_inf", found_inf)
        yield None if found_inf is None else bool(found_inf)

    def _handed_out(self) -> list[Any]:
        if self._donate:
            return list(self._own)
        self._mark, copies = copied(self._mark, [x for x, room in zip(self._own, self._rooms) if room is None], ())
        rooms = [room for room in self._rooms if room is not None]
        lent = iter(lent_copies(rooms, [x for x, room in zip(self.memory, self._rooms) if room is not None]))
        self._sync()
        others = iter(copies)
        return [next(others if room is None else lent) for room in self._rooms]

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(first_cpu(), state["names"], state["leaves"], state["donate"])  # type: ignore[misc]
