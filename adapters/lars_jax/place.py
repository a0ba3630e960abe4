"""Parameters in memory of JAX that nobody else holds while it is written to; what is the same on a CPU and on CUDA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from operator import is_
from typing import Any

import jax
import numpy as np

from lars_jax.turns import copied, handed_over, waited_for
from lars_jax.values import devices_of

__all__ = ["Place"]


class Place:
    """The parameters of one optimizer: arrays of JAX outside, arrays that can be written to inside.

    With `donate` the arrays that are written to are handed out after a step, and taken back by the next; else copies
    are handed out.

    Parameters
    ----------
    device : jax.Device
        Where they lie.
    names : sequence of str
        For messages.
    leaves : sequence of arrays
        Copied.
    donate : bool
        Whether what is handed out is what the next step writes to.

    Attributes
    ----------
    memory : list of arrays
        The parameters, for `lars_array.LARS`: of NumPy, or of CuPy.
    knows : bool
        Whether it is known here, when a step returns, if it was taken.
    """

    knows: bool

    def __init__(self, device: Any, names: Sequence[str], leaves: Sequence[Any], donate: bool) -> None:
        self._device, self._names, self._donate = device, list(names), donate
        self._mark = jax.device_put(np.zeros((), np.uint32), device)
        with self.here():
            self._start(leaves)

    def _start(self, leaves: Sequence[Any]) -> None:
        given = [x if isinstance(x, jax.Array) else np.asarray(x) for x in leaves]
        self._mark, self._own = copied(self._mark, jax.device_put(given, self._device), ())
        for name, mine, x in zip(self._names, self._own, given):
            if mine.dtype != x.dtype:
                raise TypeError(f"JAX makes {mine.dtype!r} of {name!r}, {x.dtype!r}; see jax_enable_x64")
        self._kind = type(self._mark)
        self._shapes, self._dtypes = [x.shape for x in self._own], [x.dtype for x in self._own]
        self._wide = any(np.finfo(kind).bits == 64 for kind in self._dtypes if kind.kind in "fc")
        self._shardings: list[Any] = [None] * len(self._own)  # of gradients that were found to lie here
        self._views: list[Any] = [None] * len(self._own)
        self._seen: list[int] = []  # where the gradients lay that these are views of
        self._kinds: list[Any] = []
        self._given: list[Any] = []
        self._old: list[Any] = []
        self._addresses: list[int] = []
        self.memory: list[Any] = []
        self._sync()
        self._find()

    def here(self) -> AbstractContextManager[Any]:
        """Return a context in which all that follows is done."""
        raise NotImplementedError

    def _sync(self) -> None:
        """Go on where JAX has come to the mark."""
        raise NotImplementedError

    def _view(self, array: Any, *, write: bool = False) -> Any:
        """Return an array of the library of `memory` on that of an array, which it doesn't keep alive."""
        raise NotImplementedError

    def fits(self, given: Sequence[Any]) -> bool:
        """Return whether these arrays are for certain as the parameters are: of JAX, and what `check` lets pass.

        A tenth of a microsecond for each question and array, so that thousands of arrays can be asked.
        """
        if set(map(type, given)) != {self._kind} or True in [x.is_deleted() for x in given]:
            return False
        if [x.shape for x in given] != self._shapes or [x.dtype for x in given] != self._dtypes:
            return False
        shardings = [x.sharding for x in given]
        if not all(map(is_, shardings, self._shardings)):
            if any(x.device_set != {self._device} for x in shardings):
                return False
            self._shardings = shardings
        return True

    def check(self, what: str, array: Any) -> None:
        """Refuse an array that does not lie here; `what` it is called in messages."""
        if isinstance(array, jax.Array) and (found := devices_of(array)) != [self._device]:
            raise TypeError(
                f"{what} must lie on the parameters' device {self._device}, else use lars_jax.lars; "
                f"got {', '.join(map(str, found))}"
            )

    def begin(self, given: Sequence[Any]) -> tuple[list[Any], bool]:
        """See that nobody looks at the memory, so that it may be written to.

        Parameters
        ----------
        given : sequence of arrays or None
            Gradients, or new parameters; checked.

        Returns
        -------
        tuple (views, moved)
            Arrays of the library of `memory` that are on theirs until `end`, None for None; and whether `memory` holds
            other arrays now.
        """
        if self._wide and not jax.config.jax_enable_x64:
            raise TypeError("parameters of 64 bits can be stepped only where jax_enable_x64 is set, as it was for them")
        given = [_in_order(x, p) for x, p in zip(given, self._own)]
        self._given = [x for x in given if isinstance(x, jax.Array)]
        seen = [x.unsafe_buffer_pointer() for x in self._given]
        also = self._awaited(self._given)
        old = self._own
        if self._donate:
            self._take_back(seen, also)
        elif also:
            self._mark = waited_for(self._mark, also)
        self._sync()
        views, moved = self._viewed(given, seen), self._find()
        self._old = old if moved else []
        return views, moved

    def _awaited(self, given: list[Any]) -> list[Any]:
        """Return those arrays that are not known to be there before JAX has come to the next mark."""
        return given

    def _take_back(self, seen: Sequence[int], also: Sequence[Any]) -> None:
        if True in (deleted := [x.is_deleted() for x in self._own]):
            raise ValueError(
                f"parameter {self._names[deleted.index(True)]!r} was deleted: with donate=True what a step returns are "
                "the parameters themselves, and they must be there for the next one"
            )
        # Gradients may be the parameters themselves, also those that occupy nothing.
        apart = self._occupied.isdisjoint(seen) and set(map(id, self._own)).isdisjoint(map(id, self._given))
        self._mark, self._own = (handed_over if apart else copied)(self._mark, self._own, also)

    def _viewed(self, given: Sequence[Any], seen: list[int]) -> list[Any]:
        """Return views of arrays; those of the last time, where they lie in the same place."""
        if len(seen) < len(given):  # not all are of JAX
            self._seen = []
            return [None if x is None else self._view(x) for x in given]
        kinds = [x.dtype for x in given]
        if kinds != self._kinds:
            self._kinds, self._seen = kinds, []
        if seen != self._seen:
            both = zip(self._views, self._seen or [-1] * len(seen), seen, given)
            self._views, self._seen = [v if old == new else self._view(x) for v, old, new, x in both], seen
        return list(self._views)

    def _find(self) -> bool:
        """Look where the parameters are now, and return whether that is elsewhere."""
        addresses = [x.unsafe_buffer_pointer() for x in self._own]
        if addresses == self._addresses:
            return False
        self._addresses, self.memory = addresses, [self._view(x, write=True) for x in self._own]
        self._occupied = {place for place, x in zip(addresses, self._own) if x.size}
        return True

    def refill(self, arrays: Sequence[Any]) -> bool:
        """Write other numbers to the memory, and return whether it is elsewhere now; `end` is to follow."""
        if True in [x.is_deleted() for x in self._own]:
            self._start(arrays)
            return True
        views, moved = self.begin(arrays)
        for p, x in zip(self.memory, views):
            p[...] = x
        return moved

    def numbers(self, groups: Sequence[dict[str, Any]], found_inf: Any) -> AbstractContextManager[Any]:
        """Return a context in which arrays of JAX among numbers are those of the library; it yields `found_inf`."""
        raise NotImplementedError

    def end(self) -> list[Any]:
        """Return the parameters as they are now, arrays of JAX."""
        shown = self._handed_out()
        for x in self._old:  # among them those that were not donated, since something else sees them
            x.delete()
        self._given, self._old = [], []
        return shown

    def _handed_out(self) -> list[Any]:
        raise NotImplementedError

    def outside(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Return a state dict with arrays of NumPy."""
        return state_dict

    def inside(self, state: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Mapping[str, Any]]:
        """Return the state of each parameter with arrays of the library of `memory`."""
        return state

    def __getstate__(self) -> dict[str, Any]:
        number, leaves = self._device.local_hardware_id, [np.array(x) for x in self._own]
        return {"number": number, "names": self._names, "leaves": leaves, "donate": self._donate}


def _in_order(x: Any, p: Any) -> Any:
    """Return an array whose elements lie in the order of the parameter's, as views take for granted."""
    # `Array.format` tells it too, in forty times as long.
    if not isinstance(x, jax.Array) or getattr(x, "_pjrt_layout", None) == getattr(p, "_pjrt_layout", None):
        return x
    return jax.device_put(x, p.format if hasattr(p, "format") else p.layout)
