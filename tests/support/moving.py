"""The same optimizer twice, one that steps in place and one that writes the new parameters elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from assertions import assert_same, fingerprint
from references import gaussian

from lars_array import LARS

HYPER: dict[str, Any] = {"lr": 0.3, "momentum": 0.9, "weight_decay": 0.01, "trust_coefficient": 0.1}
SHAPES: dict[str, tuple[int, ...]] = {"w": (6, 40, 7), "b": (40,), "none": (0,), "one": (), "large": (700, 701)}


def numbers(seed: int, dtype: Any = "f4", shapes: dict[str, tuple[int, ...]] = SHAPES) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {name: gaussian(rng, shape, dtype) for name, shape in shapes.items()}


def room_for(params: dict[str, Any]) -> dict[str, Any]:
    """Return arrays of other numbers, which must not count."""
    return {name: np.full_like(p, 7) for name, p in params.items()}


class Pair:
    """The same optimizer twice: one steps in place, the other back and forth between two sets of arrays."""

    def __init__(self, params: dict[str, Any], grouped: Callable[[Any], Any] = lambda x: x, **options: Any) -> None:
        self.staying = {name: p.copy(order="K") for name, p in params.items()}
        self.now, self.room = params, room_for(params)
        self.plain, self.moving = (LARS(grouped(x), **options) for x in (self.staying, self.now))

    def step(self, grads: dict[str, Any], **options: Any) -> None:
        before, given = fingerprint(self.now), fingerprint(grads)
        self.plain.step(grads, **options)
        there = {name: None if g is None else self.room[name] for name, g in grads.items()}
        self.moving.step(grads, out=there, **options)
        assert fingerprint(grads) == given, "a gradient was changed"
        for name, x in there.items():
            if x is not None:
                self.now[name], self.room[name] = x, self.now[name]
        old = {name: p if grads[name] is None else self.room[name] for name, p in self.now.items()}
        assert fingerprint(old) == before, "the old parameters were written to"
        self.assert_same()

    def assert_same(self) -> None:
        assert_same(self.now, self.staying)
        shown = {name: p for group in self.moving.param_groups for name, p in zip(group["names"], group["params"])}
        assert shown.keys() == self.now.keys() and all(shown[name] is p for name, p in self.now.items())
        ours, theirs = self.moving.state_dict(), self.plain.state_dict()
        assert_same(ours, theirs)
        assert_same([self.moving.norms(), self.moving.trust_ratios()], [self.plain.norms(), self.plain.trust_ratios()])
