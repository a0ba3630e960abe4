"""The CUDA kernel: a whole model in three launches, without waiting for the device.

CuPy is imported when the first optimizer over its arrays is made, not with this module.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from array_api_compat import is_cupy_array

from lars_array._arrays import dtype_name
from lars_array._interrupts import defer_signals
from lars_array.core import Rule
from lars_array.kernels import portable
from lars_array.kernels.base import Gradients, KernelArrays, Writing
from lars_array.kernels.cuda import device
from lars_array.kernels.cuda.tables import DeviceTables

__all__ = ["Kernel"]

# A complex number is two real ones.
_REAL = {"complex64": "float32", "complex128": "float64"}


class Kernel(Writing):
    """See `lars_array.kernels`."""

    DESCRIPTION = "CuPy arrays, in place, a whole model in three launches"
    Device: Any = device.Device

    def __init__(self, arrays: KernelArrays, xp: Any) -> None:
        self._arrays, self._xp = arrays._replace(grads=()), xp
        self._types = [(_element(p), _element(g)) for p, g in zip(arrays.params, arrays.grads, strict=True)]
        self._device = self.Device.on(arrays.params[0])
        self._found_inf = self._device.zeros((), np.float32)
        self._stages: DeviceTables | None = None  # made by `sums` and `apply`
        self._steps: tuple[Any, DeviceTables | None] = None, None  # rows, and their tables made by `enqueue`
        self._captured = False  # whether a graph was captured, which leaves its own addresses in the tables

    @staticmethod
    def unsupported_reason(params: Sequence[Any]) -> str | None:
        """Return None for CuPy arrays where there is a CUDA device, else why not."""
        strange = next((type(p).__name__ for p in params if not is_cupy_array(p)), None)
        return device.problem() if strange is None else f"it takes CuPy arrays only, not {strange}"

    @staticmethod
    def fallback() -> Any:
        """Return the portable kernel."""
        return portable.Kernel

    def is_capturing(self) -> bool:
        """Return whether launches are captured in a graph."""
        return bool(self._device.is_capturing())

    def sums(self, grads: Gradients, operand: Any = None) -> Any:
        """Return `core.sums`, in an array that the next call overwrites."""
        tables, weights = self._stage_tables(grads), None
        if operand is not None:
            columns = [self._xp.zeros_like(operand[0]) if x is None else x for x in operand]
            weights = self._xp.stack(columns, axis=1)
        tables.set(weights=weights)
        tables.launch("sums", "coefficients")
        return tables.S

    def writer(self, grads: Gradients, C: Any, taken: Any = None) -> Callable[[], None]:
        """See `Writing`."""
        tables = self._stage_tables(grads)
        tables.C[...] = C
        tables.set(taken=taken)
        return lambda: tables.launch("apply")

    def enqueue(
        self,
        grads: Gradients,
        rows: Any,
        rules: Sequence[Rule],
        policies: Sequence[str],
        state: Any,
        found_inf: Any,
        *,
        clips: bool,
    ) -> tuple[Any, Any] | None:
        """Queue a whole step, which the device decides on.

        Parameters
        ----------
        grads : Gradients
            Of this step.
        rows : DeviceRows
            The rows; the same object as long as it holds the same.
        rules, policies : sequences
            Rule and `nonfinite` of each group.
        state : DeviceState
            Hyper-parameters; and the state of parameters and the counts of steps, which the device updates.
        found_inf : array of shape (), or None
            The step is skipped where it isn't zero.
        clips : bool
            Whether gradients are clipped by their global norm.

        Returns
        -------
        tuple (S, gamma) or None
            Sums and gradient factors, arrays that the next step overwrites. None, and nothing was done, where a rule
            has no tape, or one too long, or parts of a layer are of several types.
        """
        tables = self._step_tables(rows)
        if tables is None or not tables.load(rules, policies):
            return None
        self._set_gradients(tables, grads)
        if found_inf is not None and found_inf.dtype != np.float32:
            self._found_inf[...] = found_inf  # in memory that stays, for graphs
            found_inf = self._found_inf
        defer_signals()  # until the step is counted
        third = any(rule.norm_of != "gradient" for rule in rules)
        tables.set(hyper=state.hyper, first=state.first, previous_lr=state.previous_lr, counts=state.counts)
        tables.set(found_inf=found_inf, clips=clips, third=third and not clips, third_is_clipped=False)
        if tables.one_launch is not None and not clips and set(policies) == {"propagate"}:
            tables.one_launch.launch()
            return tables.S, tables.gamma
        tables.launch("sums")
        if clips:
            tables.launch("gradient_norm")
        if clips and third:  # over clipped gradients: memory is read again
            tables.set(third=True, third_is_clipped=True)
            tables.launch("sums")
        tables.launch("coefficients", "apply")
        return tables.S, tables.gamma

    def _stage_tables(self, grads: Gradients) -> DeviceTables:
        """Return the tables for `sums` and `apply`, which keep the parts of a layer apart."""
        if self._stages is None:
            self._stages = DeviceTables(self._device, self._arrays, self._types)
        self._set_gradients(self._stages, grads)
        return self._stages

    def _step_tables(self, rows: Any) -> DeviceTables | None:
        """Return the tables for `enqueue`; None if parts of a layer are of several types."""
        if rows is not self._steps[0]:
            mixed = any(len({self._types[i] for i in index}) > 1 for index in rows.joined)
            self._steps = rows, None if mixed else DeviceTables(self._device, self._arrays, self._types, rows)
        return self._steps[1]

    def _set_gradients(self, tables: DeviceTables, grads: Gradients) -> None:
        self._captured = self._captured or self.is_capturing()
        tables.grads.write(grads.addresses, always=self._captured)


def _element(x: Any) -> str:
    name = dtype_name(x.dtype)
    return _REAL.get(name, name)
