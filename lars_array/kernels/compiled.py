"""The compiled kernel: a whole model in one call of compiled code on each thread.

numba is imported when the first optimizer asks for it, not with this module.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import repeat
from typing import Any

import numpy as np

from lars_array.core import Prepared, clipped
from lars_array.kernels import blocked
from lars_array.kernels.layout import common_order
from lars_array.kernels.masters import copy_all, with_masters
from lars_array.tape import record

__all__ = ["Kernel"]


class Kernel:
    """See `lars_array.kernels`. Layers that don't lie densely in memory are left to the blocked kernel."""

    TAKES = "NumPy arrays, in place, in loops compiled by numba"

    def __init__(
        self, params: Sequence[Any], buffers: Sequence[Any], xp: Any = np, masters: Sequence[Any] | None = None
    ) -> None:
        self.buffers, self._masters = buffers, masters
        # What the tables are arranged for: the types of gradients, and the layers that are in none; and how gradients,
        # and what is written to instead of in place, looked when that was found out.
        self._types_of: Any = None
        self._others: list[int] = []
        self._looks: Any = None
        self._out_looks: Any = None
        self._tables: list[Any] = []
        self._prepared: Prepared | None = None
        self._known: Any = None
        self.move(params)

    @staticmethod
    def unusable(params: Sequence[Any]) -> str | None:
        """Return None where numba works and all parameters are NumPy arrays, else why not."""
        return blocked.Kernel.unusable(params) or _problem()

    @staticmethod
    def addresses(arrays: Sequence[Any]) -> Any:
        """Return where the data of arrays begin."""
        return _headers().addresses(arrays)

    @staticmethod
    def looks(arrays: Sequence[Any]) -> Any:
        """Return their `lars_array.looks.Looks`."""
        return _headers().HeaderLooks(arrays)

    def move(self, params: Sequence[Any]) -> None:
        """Take `params` for the parameters from now on."""
        self._given = params
        self.params, self.copies = with_masters(params, self._masters)
        for table in self._tables:
            table.move(self.params, self.copies)
        if self._others:  # which may lie densely now
            self._blocked.move([params[i] for i in self._others])
            self._looks = None

    def sums(self, grads: Sequence[Any], operand: Any = None) -> Any:
        """Return what `core.sums` does."""
        found = self._arranged_for(grads)
        S = np.zeros((len(self.params), 3))
        self._add_sums(found, operand, S)
        if self._others:
            mine = None if operand is None else [None if x is None else x[self._others] for x in operand]
            S[self._others] = self._blocked.sums([grads[i] for i in self._others], mine)
        return S

    def apply(self, grads: Sequence[Any], C: Any, written: Any = None, out: Sequence[Any] | None = None) -> None:
        """Do what `core.apply` does for each layer, in place or to `out`, if `written` is None or true."""
        if written is not None and not written:
            copy_all(self._given, out)
            return
        found = self._arranged_for(grads, out)
        for walk in [table.apply(found, C) for table in self._tables]:
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
    ) -> tuple[Any, Any, Any] | None:
        """Return S and C, computed without asking Python, and if `write` is true take the step as well.

        Parameters
        ----------
        grads : sequence of ndarray
            One a layer.
        prepared : Prepared
            A row for each kind of layers, those that differ in their sums only.
        kind_of : int32 array of shape (layers,)
            The kind of each layer.
        write : bool
            Whether to do what `apply` does too: each layer as soon as its coefficients are known.
        out : sequence of ndarray, optional
            As `apply` has it.

        Returns
        -------
        tuple (S, C, gamma) or None
            Sums and coefficients, and a row for each kind of what gradients are multiplied by. None, and nothing was
            done, where layers don't lie densely or a rule can't be put on tape.
        """
        found, known = self._arranged_for(grads, out), self._read(prepared)
        if self._others or known is None:
            return None
        hyper, programs = known
        S, C = np.zeros((len(self.params), 3)), np.empty((len(self.params), 6))
        clips = prepared.clips
        if clips:  # by how much, the sums over all layers tell
            self._add_sums(found, None, S)
            of_kinds = [np.bincount(kind_of, column, len(prepared.rules)) for column in S.T]
            prepared = clipped(prepared, np.stack(of_kinds, axis=1), xp=np)
            hyper = _module().hyper_of(prepared)
        if clips and prepared.operand is None:
            _module().coefficients(S, kind_of, hyper, programs, C)
        else:
            if clips:
                S[...] = 0
            at_once = write and not clips
            asked = found, prepared, kind_of, hyper, programs, S, C
            for walk in [table.take(*asked, write=at_once) for table in self._tables]:
                walk.go()
        if clips and write:
            self.apply(grads, C, out=out)
        return S, C, prepared.gamma

    def _read(self, prepared: Prepared) -> Any:
        """Return what tapes start from, and the tapes; None where a rule can't be put on tape. As long as `prepared` is
        the same object, nothing in it has changed."""
        if prepared is not self._prepared:
            tapes = [record(rule) for rule in prepared.rules]
            unknown = any(tape is None for tape in tapes)
            self._known = None if unknown else (_module().hyper_of(prepared), _module().programs(tuple(tapes)))
            self._prepared = prepared
        return self._known

    def _add_sums(self, grads: Any, operand: Any, S: Any) -> None:
        for walk in [table.sums(grads, operand, S) for table in self._tables]:
            walk.go()

    def _is_dense(self, i: int, g: Any, out: Any) -> bool:
        arrays = [x for x in (self.params[i], g, self.buffers[i], self.copies[i], out) if x is not None]
        return bool(all(x.flags.aligned and x.dtype.isnative for x in arrays) and common_order(arrays) is not None)

    def _arranged_for(self, grads: Sequence[Any], out: Sequence[Any] | None = None) -> Any:
        """Have a table for each combination of types, without the layers whose arrays don't lie alike."""
        places = None if self._looks is None else self._looks.places(grads)
        places_out = None if self._out_looks is None or out is None else self._out_looks.places(out)
        if places is None or (places_out is None and out is not None):
            looks, places = self.looks(grads), self.addresses(grads)
            out_looks, places_out = (None, None) if out is None else (self.looks(out), self.addresses(out))
            pairs = zip(grads, out or repeat(None, len(grads)), strict=True)
            others = [i for i, (g, x) in enumerate(pairs) if not self._is_dense(i, g, x)]
            dtypes = looks.dtypes()
            if self._types_of is None or others != self._others or dtypes != self._types_of.dtypes():
                self._arrange(others, dtypes)
            self._types_of = self._looks = looks
            self._out_looks = out_looks
        return _module().Seen(places, places_out, (grads, out))

    def _arrange(self, others: list[int], dtypes: Sequence[Any]) -> None:
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
        self._others = others


def _module() -> Any:
    from lars_array.kernels import table

    return table


def _headers() -> Any:
    from lars_array.kernels import headers

    return headers


@cache
def _problem() -> str | None:
    """Return why compiled code can't be run here."""
    try:
        import numba
    except ImportError as error:
        return f"it needs numba, pip install lars-array[fast]: {error}"
    if numba.config.DISABLE_JIT:
        return "NUMBA_DISABLE_JIT is set"
    reason: str | None = _headers().problem()
    return reason
