"""The compiled kernel: a whole model in one call of compiled code on each thread.

numba is imported when the first optimizer asks for it, not with this module.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np

from lars_array._arrays import ArraySpecs
from lars_array.core import Exchange, RuleInputs, clip_gradients
from lars_array.kernels import blocked
from lars_array.kernels.base import Gradients, KernelArrays, Writing
from lars_array.kernels.tape import record

__all__ = ["Kernel"]


class Kernel(Writing):
    """See `lars_array.kernels`."""

    DESCRIPTION = "NumPy arrays, in place, in loops compiled by numba"

    def __init__(self, arrays: KernelArrays, xp: Any = np) -> None:
        self._count = len(arrays.params)
        self._none = np.empty((self._count, 0))  # in the place of S or C where they are not used
        known: dict[Any, int] = {}
        types = ((p.dtype, master is not None, g.dtype) for p, g, _, master in zip(*arrays, strict=True))
        numbers = np.fromiter((known.setdefault(kinds, len(known)) for kinds in types), np.int32, self._count)
        self._tables = [_table().Table(arrays, np.flatnonzero(numbers == k)) for k in range(len(known))]

    @staticmethod
    def unsupported_reason(params: Sequence[Any]) -> str | None:
        """Return None where numba works and all parameters are NumPy arrays, else why not."""
        return blocked.Kernel.unsupported_reason(params) or _problem()

    @staticmethod
    def fallback() -> Any:
        """Return the blocked kernel."""
        return blocked.Kernel

    @staticmethod
    def specs(arrays: Sequence[Any]) -> Any:
        """Return their `ArraySpecs`."""
        return (_headers().HeaderSpecs if set(map(type, arrays)) == {np.ndarray} else ArraySpecs)(arrays)

    def sums(self, grads: Gradients, operand: Any = None) -> Any:
        """Return `core.sums`."""
        S = np.zeros((self._count, 3))
        self._call("measure", grads, _table().inputs_for_sums(operand, self._count), S, self._none)()
        return S

    def writer(self, grads: Gradients, C: Any, taken: Any = None) -> Callable[[], None]:
        """See `Writing`."""
        inputs = _table().inputs_for_sums(None, self._count)
        return self._call("write", grads, inputs, self._none, np.ascontiguousarray(C))

    def moved(self, held: Any, places: Any) -> Kernel:
        """Return this kernel for arrays of the same types and layouts that lie elsewhere.

        Parameters
        ----------
        held : object
            Keeps the arrays alive.
        places : int64 array of shape (3, layers)
            The addresses of parameters, momentum buffers and master copies, 0 for None.
        """
        kernel = copy.copy(self)
        kernel._tables = [table.moved(held, places) for table in self._tables]
        return kernel

    def part(self, index: Sequence[int]) -> Kernel:
        """Return this kernel for some of its layers, in ascending order."""
        kernel = copy.copy(self)
        kernel._count, kernel._none = len(index), self._none[: len(index)]
        number = np.full(self._count, -1, np.int32)
        number[index] = np.arange(len(index))
        kernel._tables = [table.part(number) for table in self._tables if (number[table.layers] >= 0).any()]
        return kernel

    def prepare(self, inputs: RuleInputs) -> Any:
        """Return the rules and hyper-parameters as compiled code takes them; None if a rule can't be recorded."""
        tapes = [record(rule) for rule in inputs.rules]
        if any(tape is None for tape in tapes):
            return None
        prepared: Any = _table().hyper_of(inputs), _table().programs(tuple(tapes))
        if inputs.clips:
            _table().compile_coefficients(*prepared)
        return prepared

    def fused(
        self,
        grads: Gradients,
        inputs: RuleInputs,
        prepared: Any,
        hyper_row: Any,
        previous_lr: Any,
        *,
        write: bool,
        exchange: Exchange | None = None,
    ) -> tuple[Any, Any, Any]:
        """Compute S and C without calling Python, and take the step as well.

        Parameters
        ----------
        grads : Gradients
            Of this step.
        inputs : RuleInputs
            A row for each combination of hyper-parameters.
        prepared : object
            Returned by `prepare`.
        hyper_row : int32 array of shape (layers,)
            The row of each layer in `inputs`.
        previous_lr : float64 array of shape (layers,)
            The learning rate of each layer's last step, which `inputs` does not hold.
        write : bool
            Whether to do the third stage too: each layer as soon as its coefficients are known.
        exchange : callable, optional
            See `core.plan`; `rescale_grad` is None where nothing is clipped.

        Returns
        -------
        tuple (S, C, gamma)
            Sums and coefficients, and the gradient factor of each row of `inputs`.
        """
        hyper, tapes = prepared
        C, rows = np.empty((self._count, 6)), len(inputs.rules)
        waits = inputs.clips or exchange is not None  # for sums over all layers, or over all processes
        S = squares = None  # known before the coefficients are to be computed, where these wait
        if inputs.clips:
            S = self.sums(grads)
            if exchange is not None:
                S, squares = exchange(S, inputs.hyper.rescale_grad[hyper_row])
            totals = [np.bincount(hyper_row, column, rows) for column in S.T]
            inputs = clip_gradients(inputs, np.stack(totals, axis=1), xp=np, squares=squares)
            hyper = _table().hyper_of(inputs)
            S = S if inputs.operand is None else None  # the third sum is of clipped gradients
        if exchange is not None and S is None:
            factors = inputs.hyper.rescale_grad[hyper_row] if squares is not None else None
            S, _ = exchange(self.sums(grads, _spread(inputs.operand, hyper_row)), factors)
        arrays = hyper_row, _table().weights_of(inputs.operand, rows), previous_lr, hyper
        if S is not None:
            _table().coefficients(S, arrays, tapes, C)
        else:
            S = np.zeros((self._count, 3))
            self._call("both" if write and not waits else "measure", grads, arrays, S, C, tapes)()
        if waits and write:
            self.apply(grads, C)
        return S, C, inputs.gamma

    def _call(self, what: str, grads: Gradients, *by_layer: Any) -> Callable[[], None]:
        """Return a call of compiled code for all tables."""
        calls = [table.call(what, grads, *by_layer) for table in self._tables]

        def run() -> None:
            for call in calls:
                call()

        return run


def _spread(operand: Any, index: Any) -> Any:
    return None if operand is None else [None if x is None else x[index] for x in operand]


def _table() -> Any:
    from lars_array.kernels.compiled import table

    return table


def _headers() -> Any:
    from lars_array.kernels.compiled import headers

    return headers


@cache
def _problem() -> str | None:
    """Return why compiled code can't be run here."""
    try:
        import numba
    except ImportError as error:
        return f"it needs numba, pip install 'lars-array[fast]': {error}"
    if numba.config.DISABLE_JIT:
        return "NUMBA_DISABLE_JIT is set"
    reason: str | None = _headers().problem()
    return reason
