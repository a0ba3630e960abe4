"""The compiled kernel: a whole model in one call of compiled code on each thread.

numba is imported when the first optimizer asks for it, not with this module.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from operator import attrgetter
from typing import Any

import numpy as np

from lars_array.core import Prepared
from lars_array.kernels import blocked
from lars_array.kernels.layout import common_order
from lars_array.memory import one_of_each
from lars_array.tape import record

__all__ = ["Kernel"]

_STRIDES, _ALIGNED = attrgetter("strides"), attrgetter("flags.aligned")


class Kernel:
    """See `lars_array.kernels`. Layers that don't lie densely in memory are left to the blocked kernel."""

    TAKES = "NumPy arrays, in place, in loops compiled by numba"

    def __init__(self, params: Sequence[Any], buffers: Sequence[Any], xp: Any = np) -> None:
        self.params, self.buffers = params, buffers
        self._strides = one_of_each(map(_STRIDES, params))
        self._scattered = [i for i, p in enumerate(params) if not self._is_dense(i)]
        self._arrange(self._scattered)

    @staticmethod
    def unusable(params: Sequence[Any]) -> str | None:
        """Return None where numba works and all parameters are NumPy arrays, else why not."""
        return blocked.Kernel.unusable(params) or _problem()

    @staticmethod
    def addresses(arrays: Sequence[Any]) -> Any:
        """Return where the data of arrays begin."""
        return _module().addresses(arrays)

    def sums(self, grads: Sequence[Any], operand: Any = None) -> Any:
        """Return what `core.sums` does."""
        self._arrange_for(grads)
        S = np.empty((len(self.params), 3))
        for walk in [table.sums(grads, operand) for table in self._tables]:
            walk.go()
            S[walk.layers] = walk.S
        if self._others:
            mine = None if operand is None else [None if x is None else x[self._others] for x in operand]
            S[self._others] = self._blocked.sums([grads[i] for i in self._others], mine)
        return S

    def apply(self, grads: Sequence[Any], C: Any, written: Any = None) -> None:
        """Do what `core.apply` does for each layer, in place, if `written` is None or true."""
        if written is not None and not written:
            return
        self._arrange_for(grads)
        for walk in [table.apply(grads, C) for table in self._tables]:
            walk.go()
        if self._others:
            self._blocked.apply([grads[i] for i in self._others], C[self._others])

    def take(self, grads: Sequence[Any], prepared: Prepared, kind_of: Any, *, write: bool) -> tuple[Any, Any] | None:
        """Return S and C, computed without asking Python, and if `write` is true take the step as well.

        Parameters
        ----------
        grads : sequence of ndarray
            One a layer.
        prepared : Prepared
            A row for each kind of layers, those that differ in their sums only.
        kind_of : int64 array of shape (layers,)
            The kind of each layer.
        write : bool
            Whether to do what `apply` does too: each layer as soon as its coefficients are known.

        Returns
        -------
        tuple (S, C) or None
            None, and nothing was done, where layers don't lie densely, gradients are clipped, or a rule can't be put
            on tape.
        """
        self._arrange_for(grads)
        tapes = [record(rule) for rule in prepared.rules]
        if self._others or prepared.clips or any(tape is None for tape in tapes):
            return None
        programs = _module().programs(tuple(tapes))
        S, C = np.empty((len(self.params), 3)), np.empty((len(self.params), 6))
        for walk in [table.take(grads, prepared, kind_of, programs, write=write) for table in self._tables]:
            walk.go()
            S[walk.layers], C[walk.layers] = walk.S, walk.C
        return S, C

    def _is_dense(self, i: int, g: Any = None) -> bool:
        arrays = [x for x in (self.params[i], g, self.buffers[i]) if x is not None]
        return bool(
            self.params[i].dtype.isnative
            and all(x.flags.aligned for x in arrays)
            and common_order(arrays) is not None
        )

    def _arrange_for(self, grads: Sequence[Any]) -> None:
        """Take the layers out of the tables whose gradient does not lie as its parameter does."""
        others = self._scattered
        if list(map(_STRIDES, grads)) != self._strides or not all(map(_ALIGNED, grads)):
            others = [i for i, g in enumerate(grads) if not self._is_dense(i, g)]
        if others != self._others:
            self._arrange(others)

    def _arrange(self, others: list[int]) -> None:
        rest = set(others)
        of_type: dict[Any, list[int]] = {}
        for i, p in enumerate(self.params):
            if i not in rest:
                of_type.setdefault(p.dtype, []).append(i)
        self._others = others
        self._blocked = blocked.Kernel([self.params[i] for i in others], [self.buffers[i] for i in others])
        self._tables = [_module().Table(self.params, self.buffers, layers) for layers in of_type.values()]


def _module() -> Any:
    from lars_array.kernels import table

    return table


@cache
def _problem() -> str | None:
    """Return why compiled code can't be run here."""
    try:
        import numba
    except ImportError as error:
        return f"it needs numba, pip install lars-array[fast]: {error}"
    if numba.config.DISABLE_JIT:
        return "NUMBA_DISABLE_JIT is set"
    from lars_array.kernels import machine

    return machine.problem()
