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
from lars_array.kernels.masters import copy_all, with_masters
from lars_array.memory import one_of_each
from lars_array.tape import record

__all__ = ["Kernel"]

_DTYPE, _STRIDES, _ALIGNED = attrgetter("dtype"), attrgetter("strides"), attrgetter("flags.aligned")


class Kernel:
    """See `lars_array.kernels`. Layers that don't lie densely in memory are left to the blocked kernel."""

    TAKES = "NumPy arrays, in place, in loops compiled by numba"

    def __init__(
        self, params: Sequence[Any], buffers: Sequence[Any], xp: Any = np, masters: Sequence[Any] | None = None
    ) -> None:
        self.buffers, self._masters = buffers, masters
        # What the tables are arranged for: the gradients' types and strides, the strides of what is written to instead
        # of in place, and the layers that are in none.
        self._dtypes: list[Any] = []
        self._strides: list[Any] | None = None
        self._out_strides: list[Any] | None = None
        self._others: list[int] = []
        self._tables: list[Any] = []
        self.move(params)

    @staticmethod
    def unusable(params: Sequence[Any]) -> str | None:
        """Return None where numba works and all parameters are NumPy arrays, else why not."""
        return blocked.Kernel.unusable(params) or _problem()

    @staticmethod
    def addresses(arrays: Sequence[Any]) -> Any:
        """Return where the data of arrays begin."""
        return _module().addresses(arrays)

    def move(self, params: Sequence[Any]) -> None:
        """Take `params` for the parameters from now on."""
        self._given = params
        self.params, self.copies = with_masters(params, self._masters)
        for table in self._tables:
            table.move(self.params, self.copies)
        if self._others:  # which may lie densely now
            self._blocked.move([params[i] for i in self._others])
            self._strides = None

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

    def apply(self, grads: Sequence[Any], C: Any, written: Any = None, out: Sequence[Any] | None = None) -> None:
        """Do what `core.apply` does for each layer, in place or to `out`, if `written` is None or true."""
        if written is not None and not written:
            copy_all(self._given, out)
            return
        self._arrange_for(grads, out)
        for walk in [table.apply(grads, C, out) for table in self._tables]:
            walk.go()
        if self._others:
            others = None if out is None else [out[i] for i in self._others]
            self._blocked.apply([grads[i] for i in self._others], C[self._others], out=others)

    def take(
        self,
        grads: Sequence[Any],
        prepared: Prepared,
        kind_of: Any,
        *,
        write: bool,
        out: Sequence[Any] | None = None,
    ) -> tuple[Any, Any] | None:
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
        out : sequence of ndarray, optional
            As `apply` has it.

        Returns
        -------
        tuple (S, C) or None
            None, and nothing was done, where layers don't lie densely, gradients are clipped, or a rule can't be put
            on tape.
        """
        self._arrange_for(grads, out)
        tapes = [record(rule) for rule in prepared.rules]
        if self._others or prepared.clips or any(tape is None for tape in tapes):
            return None
        programs = _module().programs(tuple(tapes))
        S, C = np.empty((len(self.params), 3)), np.empty((len(self.params), 6))
        out = out if write else None
        for walk in [table.take(grads, prepared, kind_of, programs, out, write=write) for table in self._tables]:
            walk.go()
            S[walk.layers], C[walk.layers] = walk.S, walk.C
        return S, C

    def _is_dense(self, i: int, g: Any, out: Any) -> bool:
        arrays = [x for x in (self.params[i], g, self.buffers[i], self.copies[i], out) if x is not None]
        return bool(all(x.flags.aligned and x.dtype.isnative for x in arrays) and common_order(arrays) is not None)

    def _arrange_for(self, grads: Sequence[Any], out: Sequence[Any] | None = None) -> None:
        """Have a table for each combination of types, without the layers whose arrays don't lie alike."""
        dtypes, strides = list(map(_DTYPE, grads)), list(map(_STRIDES, grads))
        out_strides = self._out_strides if out is None else list(map(_STRIDES, out))
        aligned = all(map(_ALIGNED, grads)) and (out is None or all(map(_ALIGNED, out)))
        if aligned and strides == self._strides and out_strides == self._out_strides and dtypes == self._dtypes:
            return
        others = [i for i, (g, x) in enumerate(zip(grads, out or [None] * len(grads))) if not self._is_dense(i, g, x)]
        if others != self._others or dtypes != self._dtypes:
            self._arrange(others, dtypes)
        self._strides, self._out_strides = one_of_each(strides) if aligned else None, out_strides

    def _arrange(self, others: list[int], dtypes: list[Any]) -> None:
        rest = set(others)
        of_types: dict[Any, list[int]] = {}
        for i, (p, copy, g_dtype) in enumerate(zip(self.params, self.copies, dtypes, strict=True)):
            if i not in rest:
                of_types.setdefault((p.dtype, None if copy is None else copy.dtype, g_dtype), []).append(i)
        arrays = self.params, self.buffers, self.copies
        self._tables = [_module().Table(*arrays, types[-1], layers) for types, layers in of_types.items()]
        params, buffers = ([x[i] for i in others] for x in (self._given, self.buffers))
        masters = None if self._masters is None else [self._masters[i] for i in others]
        self._blocked = blocked.Kernel(params, buffers, np, masters)
        self._dtypes, self._others = dtypes, others


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
