"""Pieces of layers on devices that are none."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
from assertions import to_numpy
from pieces import CUTS, OPTIONS, Pieces
from pretended_devices import Device, NoWaiting
from processes import Ranks

from lars_array import LARS


class Distant(Pieces):
    """Pieces on a device, of which nothing may be read in steps after the first."""

    def __init__(self, device: Device, ends: Any = CUTS["uneven"], **options: Any) -> None:
        self.device, self.is_ready = device, False
        super().__init__(ends, **options)

    def cut(self, arrays: Any, rank: int) -> Any:
        return {name: self.device.put(x) for name, x in super().cut(arrays, rank).items()}

    def outcomes(self, step: Any, grads: Any) -> list[Any]:
        own = [self.cut(grads, rank) for rank in range(self.count)]
        guard = self.device.unread if self.is_ready else contextlib.nullcontext
        is_of_thread = guard is NoWaiting

        def work(rank: int) -> Any:
            with guard() if is_of_thread else contextlib.nullcontext():
                return step(rank, self.optimizers[rank], own[rank])

        with contextlib.nullcontext() if is_of_thread else guard():
            outcomes = self.ranks.outcomes(work)
        self.is_ready = True
        return outcomes

    def step(self, grads: Any, **options: Any) -> None:
        outcomes = self.outcomes(lambda rank, optimizer, own: optimizer.step(own, **options), grads)
        assert outcomes == [None] * self.count, outcomes

    def joined(self) -> Any:
        kept, self.params = self.params, [{n: to_numpy(p) for n, p in params.items()} for params in self.params]
        try:
            return super().joined()
        finally:
            self.params = kept

    def synchronized(self) -> list[Any]:
        """Return what `synchronize` raises on each rank."""
        return self.ranks.outcomes(lambda rank: self.optimizers[rank].synchronize())

    def counts(self) -> list[tuple[int, int]]:
        return [(x.steps, x.skipped_steps) for x in self.optimizers]


class Few:
    """Ranks that hold one layer each, and empty pieces without gradients of the others; a group for each layer."""

    def __init__(self, device: Device, groups: dict[str, dict[str, Any]], **options: Any) -> None:
        self.ranks, self.device, self.groups = Ranks(len(groups)), device, groups
        names = list(groups)
        self.params = [
            {name: device.put(np.ones(3 if k == rank else 0)) for k, name in enumerate(names)}
            for rank in range(self.ranks.count)
        ]

        def make(rank: int) -> LARS:
            own = [{"params": {name: p}, **groups[name]} for name, p in self.params[rank].items()]
            return LARS(own, **OPTIONS, **options, all_reduce=self.ranks.all_reduce(rank))

        self.optimizers = self.ranks.run(make)

    def step(self, grads: dict[str, float]) -> None:
        def work(rank: int) -> None:
            name = list(self.groups)[rank]
            own = dict.fromkeys(self.groups) | {name: self.device.put(np.full(3, grads[name]))}
            self.optimizers[rank].step(own)

        self.ranks.run(work)

    def held(self) -> list[Any]:
        return [to_numpy(params[name]) for name, params in zip(self.groups, self.params, strict=True)]
