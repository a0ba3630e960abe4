"""The NumPy kernel: memory is walked in blocks that stay in cache, and written in place.

Blocks have a fixed size and their sums are added in a fixed order: results do not depend on the number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lars_array.kernels.layout import Pieces
from lars_array.kernels.masters import copy_all, destinations, with_masters
from lars_array.kernels.scratch import scratch
from lars_array.kernels.squares import sum_of_squares, sum_of_squares_of
from lars_array.kernels.threads import run

__all__ = ["Kernel"]

READ_BLOCK = 1 << 20  # elements of one partial sum
WRITE_BLOCK = 1 << 18  # elements: what threads lose by waiting for the interpreter outweighs what smaller blocks gain


class Kernel:
    """See `lars_array.kernels`."""

    TAKES = "NumPy arrays, in place, in cache-sized blocks"

    def __init__(
        self, params: Sequence[Any], buffers: Sequence[Any], xp: Any = np, masters: Sequence[Any] | None = None
    ) -> None:
        self.buffers, self._masters = list(buffers), masters  # views of these, made once
        self.move(params)

    @staticmethod
    def unusable(params: Sequence[Any]) -> str | None:
        """Return None for NumPy arrays, else why not."""
        strange = next((type(p).__name__ for p in params if not isinstance(p, np.ndarray)), None)
        return None if strange is None else f"it takes NumPy arrays only, not {strange}"

    @staticmethod
    def addresses(arrays: Sequence[Any]) -> Any:
        """Return where the data of arrays begin."""
        return np.array([x.__array_interface__["data"][0] for x in arrays], np.int64)

    def move(self, params: Sequence[Any]) -> None:
        """Take `params` for the parameters from now on."""
        self._given = params
        self.params, self.copies = with_masters(params, self._masters)

    def sums(self, grads: Sequence[Any], operand: Any = None) -> Any:
        """Return what `core.sums` does."""
        count = len(self.params)
        weights = None if operand is None else [[0.0] * count if x is None else x.tolist() for x in operand]
        looks_back = [weights is not None and weights[2][i] != 0 and v is not None for i, v in enumerate(self.buffers)]
        arrays = zip(self.params, grads, self.buffers, looks_back, strict=True)
        pieces = Pieces([[p, g, v] if back else [p, g] for p, g, v, back in arrays], block=READ_BLOCK)
        partial = np.zeros((len(pieces.sizes), 3))

        def third_sum(i: int, blocks: list[Any], p_squares: float, g_squares: float) -> float:
            if weights is None:
                return g_squares
            gamma, w, h = (x[i] for x in weights)
            if w == 0 and not looks_back[i]:
                return float(gamma**2 * g_squares)
            return sum_of_squares_of(blocks, [w, gamma, h][: len(blocks)], w**2 * p_squares + gamma**2 * g_squares)

        def visit(k: int) -> None:
            for blocks in pieces.blocks(k):
                p_squares, g_squares = sum_of_squares(blocks[0]), sum_of_squares(blocks[1])
                partial[k] += p_squares, g_squares, third_sum(pieces.layer[k], blocks, p_squares, g_squares)

        run(visit, pieces.sizes)
        S = np.zeros((count, 3))
        np.add.at(S, pieces.layer, partial)
        return S

    def apply(self, grads: Sequence[Any], C: Any, written: Any = None, out: Sequence[Any] | None = None) -> None:
        """Do what `core.apply` does for each layer, in place or to `out`, if `written` is None or true.

        Backwards through memory, since the end of it is what `sums` has left in cache.
        """
        if written is not None and not written:
            copy_all(self._given, out)
            return
        places, copies = destinations(self.params, self.copies, out)
        stays = [place is p for p, place in zip(self.params, places, strict=True)]
        others = [copy if stay else place for stay, place, copy in zip(stays, places, copies, strict=True)]
        arrays = zip(self.params, grads, self.buffers, others, strict=True)
        layers = [[p, g, *(x for x in rest if x is not None)] for p, g, *rest in arrays]
        pieces = Pieces(layers, block=WRITE_BLOCK, reads_only=[(1,) if stay else (0, 1) for stay in stays])
        rows = C.tolist()

        def visit(k: int) -> None:
            i = pieces.layer[k]
            for p, g, *rest in pieces.blocks(k):
                _apply(p, g, None if self.buffers[i] is None else rest[0], rows[i], p if stays[i] else rest[-1])
                if copies[i] is not None:
                    np.copyto(rest[-1], p)

        run(visit, pieces.sizes, backwards=True)


def _apply(p: Any, g: Any, v: Any, c: Sequence[float], out: Any) -> None:
    """`core.difference`, an operation at a time, each into memory that is there, and the new p into `out`.

    Terms of weight zero are left out, but once the gradient always goes in: a nan in it is not to be lost.
    """
    m, alpha, beta, kappa, lam, mu = map(p.dtype.type, c)
    total = scratch(p.size, p.dtype, 0)
    if v is not None:
        np.multiply(v, m, out=v)
        _add(v, total, alpha, g)
        if beta:
            _add(v, total, beta, p)
        np.multiply(v, kappa, out=total)
    else:
        lam, mu = lam + kappa * alpha, mu + kappa * beta
        np.multiply(g, lam, out=total)
        lam = 0
    for weight, x in ((lam, g), (mu, p)):
        if weight:
            _add(total, scratch(p.size, p.dtype, 1), weight, x)
    np.subtract(p, total, out=out)


def _add(total: Any, part: Any, weight: Any, x: Any) -> None:
    np.multiply(x, weight, out=part)
    np.add(total, part, out=total)
