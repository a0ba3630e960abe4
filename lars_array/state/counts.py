"""The counts of steps that a device has taken, skipped and rejected, and a copy of them that the host reads."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from array_api_compat import is_cupy_array, is_torch_array

from lars_array._arrays import synchronize
from lars_array._messages import shown
from lars_array.nonfinite import CAUSES, ELSEWHERE, REFUSAL, NonFiniteError
from lars_array.state.shards import RefusedElsewhereError

__all__ = ["ENTRIES", "PinnedCounts", "StepCounts"]

ENTRIES = 4  # of the counts


class StepCounts(NamedTuple):
    """Steps taken, skipped and rejected by a device, and the code of the last rejected layer."""

    taken: int = 0
    skipped: int = 0
    rejected: int = 0
    offender: int = 0

    def error(self, names: Sequence[str]) -> NonFiniteError | RefusedElsewhereError:
        """Return the error for the last rejected step, given the names of all rows."""
        row, cause = divmod(self.offender, len(CAUSES))
        name, kind = names[row], CAUSES[cause]
        if cause == REFUSAL:
            return RefusedElsewhereError(
                "not all processes took part alike in an earlier step, which changed nothing: one has refused it, "
                "lacks a gradient, or has other hyper-parameters"
            )
        if cause == ELSEWHERE:
            reason = "a layer of another process was not finite"
        elif kind == "update":
            reason = f"the update of {shown(name)} overflowed its type or the float64 of its norms"
        else:
            reason = f"the norm of the {kind} of {shown(name)} was not finite"
        return NonFiniteError(f"{reason} in an earlier step, which changed nothing")


_in_graphs: dict[int, Any] = {}  # pinned memory that replays may write to at any time, by address
_in_flight: dict[int, tuple[Any, Any]] = {}  # events of CuPy, and pinned memory that is written to until they are done


class PinnedCounts:
    """A copy of a device's counts in pinned host memory, which the host reads without waiting.

    A copy that is captured in a CUDA graph is made again by each replay. Memory that the device may still write to
    outlives this object: CuPy's pool would give it to others at once, where torch's waits by itself.

    Parameters
    ----------
    counts : int64 array of shape (ENTRIES,)
        On the device; written in place.
    """

    def __init__(self, counts: Any) -> None:
        self.counts = counts
        self.pinned: Any = None
        if is_cupy_array(counts):
            import cupy
            import cupyx

            # Here, since in a finalizer it might break the capture of a graph to ask for an event.
            for address, (event, _) in list(_in_flight.items()):
                if event.done:
                    _in_flight.pop(address, None)
            self.pinned, self._event = cupyx.zeros_pinned(ENTRIES, np.int64), cupy.cuda.Event(disable_timing=True)
            weakref.finalize(self, _in_flight.setdefault, self.pinned.ctypes.data, (self._event, self.pinned))
        elif is_torch_array(counts) and counts.device.type == "cuda":
            import torch

            self._host = torch.zeros(ENTRIES, dtype=torch.int64, pin_memory=True)
            self.pinned = self._host.numpy()

    def copy(self) -> None:
        """Queue a copy of the counts behind all work that the device has been given."""
        if is_cupy_array(self.counts):
            import cupy

            # Not by the array's own method, which fails while a graph is captured.
            runtime, stream = cupy.cuda.runtime, cupy.cuda.get_current_stream()
            here, there = self.pinned.ctypes.data, self.counts.data.ptr
            runtime.memcpyAsync(here, there, self.pinned.nbytes, runtime.memcpyDeviceToHost, stream.ptr)
            if stream.is_capturing():
                _in_graphs[here] = self.pinned
            else:
                self._event.record(stream)
        elif self.pinned is not None:
            self._host.copy_(self.counts, non_blocking=True)

    def read(self, *, wait: bool) -> StepCounts | None:
        """Return the counts that have arrived, or with `wait` the final ones; None if they are unknown without."""
        if wait:  # for all streams, and for steps of which no copy was queued
            synchronize(self.counts)
            return StepCounts(*(int(self.counts[i]) for i in range(ENTRIES)))
        if self.pinned is None:
            return None
        once = self.pinned.tolist()
        while once != (again := self.pinned.tolist()):  # it was being written
            once = again
        return StepCounts(*once)
