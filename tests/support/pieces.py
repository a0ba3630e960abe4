"""A small model whose layers are cut into pieces, one for each rank, and its training whole and in pieces."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from processes import Ranks
from references import gaussian

from lars_array import LARS

SHAPES: dict[str, tuple[int, ...]] = {"w": (7, 5), "b": (5,), "u": (4, 3, 2), "s": (6,)}
SECOND = ("b", "s")  # the layers of the second group
OPTIONS: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "trust_coefficient": 0.1}
OF_SECOND: dict[str, Any] = {"weight_decay": 0.0, "adapt": False, "lr": 0.05}
STEPS = 20

# Where the pieces of three ranks end, as parts of the length.
CUTS: dict[str, Sequence[float]] = {
    "even": (0, 1 / 3, 2 / 3, 1),
    "uneven": (0, 0.2, 0.9, 1),
    "first empty": (0, 0, 0.5, 1),
    "middle empty": (0, 0.6, 0.6, 1),
    "all on one": (0, 0, 1, 1),
}

Named = dict[str, Any]


def model(seed: int, dtype: Any = "f8") -> Named:
    rng = np.random.default_rng(seed)
    return {name: gaussian(rng, shape, dtype) for name, shape in SHAPES.items()}


def cut(x: Any, ends: Sequence[float], rank: int) -> Any:
    """Return a copy of a rank's piece of an array."""
    first, last = (round(len(x) * end) for end in (ends[rank], ends[rank + 1]))
    return x[first:last].copy()


def cut_all(arrays: Mapping[str, Any], ends: Sequence[float], rank: int, *, whole: Sequence[str] = ()) -> Named:
    """Return a rank's pieces of all arrays but those in `whole`, which it has all of."""
    return {name: x.copy() if name in whole else cut(x, ends, rank) for name, x in arrays.items()}


def groups_of(params: Named, **of_second: Any) -> list[dict[str, Any]]:
    """Return parameters in the two groups of the model."""
    second = {name: p for name, p in params.items() if name in SECOND}
    first = {name: p for name, p in params.items() if name not in SECOND}
    return [{"params": first}, {"params": second, **OF_SECOND, **of_second}]


class Pieces:
    """An optimizer on each rank, over its pieces of the model.

    Parameters
    ----------
    ends : sequence of float
        See `CUTS`.
    whole : sequence of str
        Layers that all ranks have all of.
    make : callable, optional
        Returns an optimizer, given the pieces of a rank, its number and its `all_reduce`.
    dtype : dtype
        Of the parameters.
    **options
        For `LARS`, beside `OPTIONS`.
    """

    def __init__(
        self,
        ends: Sequence[float] = CUTS["uneven"],
        *,
        whole: Sequence[str] = (),
        make: Callable[[Named, int, Any], LARS] | None = None,
        dtype: Any = "f8",
        **options: Any,
    ) -> None:
        self.ends, self.whole, self.count = ends, whole, len(ends) - 1
        self.ranks = Ranks(self.count)
        self.params = [self.cut(model(0, dtype), rank) for rank in range(self.count)]
        of_second = {"all_reduce": None} if whole else {}

        def default(params: Named, rank: int, all_reduce: Any) -> LARS:
            return LARS(groups_of(params, **of_second), **OPTIONS | options, all_reduce=all_reduce)

        made = make or default
        self.optimizers = self.ranks.run(lambda r: made(self.params[r], r, self.ranks.all_reduce(r)))

    def cut(self, arrays: Named, rank: int) -> Named:
        return cut_all(arrays, self.ends, rank, whole=self.whole)

    def step(self, grads: Named, **options: Any) -> None:
        """Take a step on all ranks; raise what the first of them raises."""
        self.ranks.run(lambda r: self.optimizers[r].step(self.cut(grads, r), **options))

    def outcomes(self, step: Callable[[int, LARS, Named], Any], grads: Named) -> list[Any]:
        """Return what ``step(rank, optimizer, gradients)`` returns or raises on each rank."""
        return self.ranks.outcomes(lambda r: step(r, self.optimizers[r], self.cut(grads, r)))

    def joined(self) -> Named:
        """Return the whole parameters; raise where copies on several ranks differ."""
        found = {}
        for name in SHAPES:
            parts = [params[name] for params in self.params]
            if name in self.whole:
                assert len({part.tobytes() for part in parts}) == 1, f"the copies of {name} differ"
                parts = parts[:1]
            found[name] = np.concatenate(parts)
        return found


def trained_whole(steps: int = STEPS, *, dtype: Any = "f8", **options: Any) -> tuple[Named, LARS]:
    """Return the model after steps of one process, and the optimizer."""
    params = model(0, dtype)
    optimizer = LARS(groups_of(params), **OPTIONS | options)
    for seed in range(1, steps + 1):
        optimizer.step(model(seed, dtype))
    return params, optimizer


def assert_models_close(ours: Mapping[str, Any], theirs: Mapping[str, Any], allowed: float) -> None:
    """Compare all layers, relative to the largest entry of each."""
    assert ours.keys() == theirs.keys()
    for name, x in theirs.items():
        off = np.max(np.abs(ours[name].astype("c16") - x.astype("c16")), initial=0)
        largest = np.max(np.abs(x.astype("c16")), initial=0)
        assert ours[name].shape == x.shape and off <= allowed * largest, f"{name} is off by {off} of {largest}"


def assert_same_telemetry(pieces: Pieces, whole: LARS | None = None, allowed: float = 1e-12) -> None:
    """Norms and trust ratios have the same bits on all ranks, and are those of whole layers."""
    first, *others = [(x.norms(), x.trust_ratios()) for x in pieces.optimizers]
    assert first[0].keys() == SHAPES.keys()
    for other in others:
        assert other == first, "norms or trust ratios differ between ranks"
    if whole is not None:
        norms, ratios = whole.norms(), whole.trust_ratios()
        for name in SHAPES:
            np.testing.assert_allclose(first[0][name], norms[name], rtol=allowed)
            np.testing.assert_allclose(first[1][name], ratios[name], rtol=allowed)
