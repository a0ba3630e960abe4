"""Parameters on a CPU: memory of ours, lent to JAX."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import jax
import numpy as np

from lars_array.kernels.threads import thread_count, together
from lars_jax.memory import Lent, own_copy, room_for, view
from lars_jax.values import check_has_values, devices_of, first_cpu

__all__ = ["HostPlace"]

_PATIENCE = 0.005  # seconds: how long what is computed already may take to let go of its parameters


class HostPlace:
    """See `lars_jax.places.Place`. The memory is ours, and JAX is lent it, or copies.

    Parameters
    ----------
    leaves : sequence of arrays
        Copied.
    donate : bool
        Whether what is handed out is what the next step writes to.
    """

    knows = True

    def __init__(self, leaves: Sequence[Any], donate: bool) -> None:
        self.memory = [own_copy(leaf) for leaf in leaves]
        self._donate = donate
        self._lent: list[list[Lent]] = [[] for _ in self.memory]

    def here(self) -> AbstractContextManager[Any]:
        """Return a context that does nothing."""
        return nullcontext()

    def check(self, what: str, array: Any) -> None:
        """Refuse an array of JAX that lies elsewhere."""
        if isinstance(array, jax.Array) and (found := devices_of(array)) != [first_cpu()]:
            raise TypeError(
                f"{what} must lie on the first CPU device, as the parameters, else use lars_jax.lars; "
                f"got {', '.join(map(str, found))}"
            )

    def begin(self, given: Sequence[Any]) -> tuple[list[Any], bool]:
        """See that nobody looks at the memory, or leave it to whoever does."""
        views = [None if x is None else view(x) for x in given]
        return views, self._donate and self._take_back()

    def refill(self, arrays: Sequence[Any]) -> bool:
        """Write other numbers to the memory, and return whether it is elsewhere now."""
        views, moved = self.begin(arrays)
        for p, x in zip(self.memory, views):
            p[...] = x
        return moved

    @contextmanager
    def numbers(self, groups: Sequence[dict[str, Any]], found_inf: Any) -> Iterator[Any]:
        """Yield what `found_inf` says."""
        if found_inf is not None:
            check_has_values("found_inf", found_inf)
            self.check("found_inf", found_inf)
            found_inf = bool(found_inf)
        yield found_inf

    def end(self) -> list[Any]:
        """Return the parameters as arrays of JAX, on our memory or on copies of it."""
        memory = self.memory if self._donate else self._rooms()
        lent: list[Lent] = []
        copies = iter([] if self._donate else list(zip(memory, self.memory, strict=True)))
        here = threading.get_ident()

        def work() -> None:
            if threading.get_ident() == here:  # what JAX is set to is a thread's own
                lent.extend(map(Lent, memory))
            for target, source in copies:
                np.copyto(target, source)

        together(work, 1 if self._donate else thread_count(2))
        shown = [one.array for one in lent]
        for known, one in zip(self._lent, lent, strict=True):
            known[:] = [one] if self._donate else [*known[-1:], one]  # what is older is its owner's business
            if not self._donate:
                one.forget()
        return shown

    def _rooms(self) -> list[Any]:
        """Return memory that nobody sees, for a copy of each parameter."""
        rooms = []
        for known, p in zip(self._lent, self.memory):
            free = next((lent for lent in known if not lent.is_seen()), None)
            rooms.append(room_for(p) if free is None else free.memory)
            if free is not None:
                known.remove(free)
        return rooms

    def _take_back(self) -> bool:
        """Delete what was lent, and return whether some of it is left to others, who look at it all the same."""
        lent = [known[0] for known in self._lent]
        for one in lent:
            one.array.delete()
            one.forget()
        deadline = time.monotonic() + _PATIENCE
        while any(one.is_seen() for one in lent) and time.monotonic() < deadline:
            time.sleep(0)
        seen = [k for k, one in enumerate(lent) if one.is_seen()]
        for k in seen:
            self.memory[k] = own_copy(self.memory[k])
        return bool(seen)

    def outside(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Return a state dict as it is."""
        return state_dict

    def inside(self, state: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
        """Return the state of each parameter as it is."""
        return {name: dict(own) for name, own in state.items()}

    def __getstate__(self) -> dict[str, Any]:
        return {"memory": self.memory, "donate": self._donate}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["memory"], state["donate"])  # type: ignore[misc]
