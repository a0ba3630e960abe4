"""The layers that one `lars_array.update` shares with other processes: no optimizer keeps what these have agreed on."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import repeat
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np

from lars_array.layers import LayerOf
from lars_array.state.inputs import Layout
from lars_array.state.shards import AllReduce, Shards, checked_all_reduce, names_of_layers, refusals_are_told
from lars_array.state.store import ParamState

if TYPE_CHECKING:
    from lars_array.state.exchange import Exchange

__all__ = ["SharedUpdate", "sharing"]


class Agreement(NamedTuple):
    """What processes know of each other once they have compared their layers, and an array like those they add."""

    processes: int
    like: Any
    xp: Any


# By the function, or for a method by its object: a bound method is another one each time. Which of them have agreed
# must not depend on when an object is deleted, since the processes have to know the same of each other.
_agreed: WeakKeyDictionary[Any, dict[Any, dict[tuple[str, ...], Agreement]]] = WeakKeyDictionary()
_kept: dict[int, tuple[Any, dict[Any, dict[tuple[str, ...], Agreement]]]] = {}  # of owners without weak references


def _agreements(all_reduce: AllReduce) -> dict[tuple[str, ...], Agreement]:
    """Return what the processes of a function have agreed on, by their layers; the last used are the last."""
    owner = getattr(all_reduce, "__self__", None)
    owner = all_reduce if owner is None or isinstance(owner, ModuleType) else owner
    try:
        known = _agreed.setdefault(owner, {})
    except TypeError:
        known = _kept.setdefault(id(owner), (owner, {}))[1]
    return known.setdefault(getattr(all_reduce, "__name__", None), {})


class SharedUpdate:
    """The layers of an update by the functions that add up their sums.

    Parameters
    ----------
    all_reduce : callable or None
        That of the groups which have none of their own.

    Attributes
    ----------
    shards : list of Shards
        Until `read`, those of the last update with this function, which an error is told with.
    """

    def __init__(self, all_reduce: Any) -> None:
        self._all_reduce = checked_all_reduce(all_reduce)
        self.shards: list[Shards] = []
        self._state: ParamState | None = None
        known = {} if all_reduce is None else _agreements(all_reduce)
        for layers, agreement in list(known.items())[-1:]:
            nothing, none = np.zeros(0, np.int64), np.zeros(0, bool)
            rows = (nothing, none, none, nothing, nothing)
            self.shards = [Shards(all_reduce, layers, *rows, agreement.like, agreement.xp)]
            self.shards[0].processes = agreement.processes

    def read(self, layout: Layout, hyper: Mapping[str, Any], layer_of: LayerOf, layers: Any) -> None:
        """Find the layers of parameters; raise TypeError or ValueError if they can't be shared."""
        groups, state = layout.groups, ParamState(layer_of)
        functions = [checked_all_reduce(group.overrides.get("all_reduce", self._all_reduce)) for group in groups]
        axes = [group.overrides.get("layer_axes", hyper.get("layer_axes", 0)) for group in groups]
        state.layers = names_of_layers(layers)
        if state.layers is None and not any(functions):
            return
        for number, group in enumerate(groups):
            state.names += group.names
            state.params += group.arrays
            count = len(group.names)
            state.all_reduce += repeat(functions[number], count)
            state.layer_axes += repeat(axes[number], count)
            state.group_of = np.append(state.group_of, np.full(count, number, np.int32))
        state.counted, state.copies = [True] * len(state.names), [1] * len(state.names)
        state.check_layers()
        self.shards[:] = state.shards
        for shards in self.shards:
            known = _agreements(shards.all_reduce).get(tuple(shards.layers))
            shards.processes, shards.is_awaited = 0 if known is None else known.processes, True
        self._state = state

    def exchange(self, index: Sequence[int], joined: Sequence[Sequence[int]], groups: Any) -> Exchange | None:
        """Return the sums over all processes for the rows of the parameters at `index`; None if nothing is shared."""
        if self._state is None:
            return None
        from lars_array.state.exchange import Exchange  # only what has pieces of layers pays for it

        return Exchange(self.shards, self._state.row_numbers(index), joined).prepare(groups, None)

    def is_skipped_without_rows(self, groups: Any) -> bool:
        """Take part in an update for which nothing has a gradient here; return whether it is skipped."""
        exchange = self.exchange([], [], groups)
        if exchange is None:
            return False
        exchange(np.empty((0, 3)), np.empty(0))
        exchange.complete()
        return exchange.check_finite()

    def refuse_traced(self, *values: Any) -> None:
        """Raise TypeError for arrays that JAX traces, if layers are shared."""
        jax = sys.modules.get("jax")
        if self.shards and jax is not None and any(isinstance(x, jax.core.Tracer) for x in values):
            raise TypeError(
                "all_reduce can't be called in an update that is traced; lars_jax.lars adds sums over devices and "
                "processes under jit"
            )

    def remember(self) -> None:
        """Keep what the processes have agreed on for later updates."""
        for shards in self.shards:
            if shards.processes:
                known, layers = _agreements(shards.all_reduce), tuple(shards.layers)
                known.pop(layers, None)
                known[layers] = Agreement(shards.processes, shards.like, shards.xp)


@contextmanager
def sharing(all_reduce: Any) -> Iterator[SharedUpdate]:
    """Yield the layers of an update, and tell the other processes of an error in it."""
    shared = SharedUpdate(all_reduce)
    try:
        with refusals_are_told(shared.shards):
            yield shared
    finally:
        shared.remember()
