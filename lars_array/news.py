"""What became of steps on a device, and how that gets to the host without anybody waiting."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from array_api_compat import is_cupy_array, is_torch_array

__all__ = ["ENTRIES", "Mailbox", "News", "mailbox"]

# What the device counts: steps taken, skipped and refused, and of the last one refused what was not finite.
ENTRIES = 4

# In the place of the last of them stands KINDS times the layer plus one of these.
GRADIENT, PARAMETER, UPDATE = range(3)
KINDS = 3


class News(NamedTuple):
    """The device's counts, as far as they are known here."""

    taken: int = 0
    skipped: int = 0
    refused: int = 0
    offender: int = 0

    @property
    def layer(self) -> int:
        """The layer for which the last refused step was refused."""
        return self.offender // KINDS

    @property
    def what(self) -> str:
        """What of it was not finite."""
        return ("gradient", "parameter", "update")[self.offender % KINDS]


class Mailbox:
    """Counts on a device, for libraries whose arrays can only be read by waiting for them.

    Parameters
    ----------
    counts : int64 array of shape (ENTRIES,)
        It stays the same array and is written to by the device.
    """

    def __init__(self, counts: Any) -> None:
        self.counts = counts

    def post(self) -> None:
        """Send the counts on their way, behind what the device has been given to do so far."""

    def read(self, *, wait: bool) -> News | None:
        """Return the counts, those that have arrived or, if `wait`, those after all that was done; None if unknown."""
        return News(*(int(self.counts[i]) for i in range(ENTRIES))) if wait else None


class _PinnedMailbox(Mailbox):
    """Counts that the device copies into pinned memory of the host.

    They are read from there at any time, so a copy captured in a CUDA graph brings news at each replay.
    """

    pinned: Any  # ndarray of shape (ENTRIES,)

    def read(self, *, wait: bool) -> News | None:
        if wait:
            self._wait()
        once = self.pinned.tolist()
        while once != (again := self.pinned.tolist()):  # they were just being written
            once = again
        return News(*once)

    def _wait(self) -> None:
        raise NotImplementedError


class _CupyMailbox(_PinnedMailbox):
    def __init__(self, counts: Any) -> None:
        import cupy
        import cupyx

        super().__init__(counts)
        self._cuda = cupy.cuda
        self.pinned = cupyx.zeros_pinned(ENTRIES, np.int64)
        self._place, self._here = counts.data.ptr, self.pinned.ctypes.data

    def post(self) -> None:
        # Not by the array's own method, which refuses while a graph is captured.
        stream, runtime = self._cuda.get_current_stream(), self._cuda.runtime
        size = self.pinned.nbytes
        runtime.memcpyAsync(self._here, self._place, size, runtime.memcpyDeviceToHost, stream.ptr)

    def _wait(self) -> None:
        self.counts.device.synchronize()


class _TorchMailbox(_PinnedMailbox):
    def __init__(self, counts: Any) -> None:
        import torch

        super().__init__(counts)
        self._host = torch.zeros(ENTRIES, dtype=torch.int64, pin_memory=True)
        self.pinned = self._host.numpy()

    def post(self) -> None:
        self._host.copy_(self.counts, non_blocking=True)

    def _wait(self) -> None:
        import torch

        torch.cuda.synchronize(self.counts.device)


def mailbox(counts: Any) -> Mailbox:
    """Return the mailbox for counts on a device, an int64 array of shape (ENTRIES,)."""
    if is_cupy_array(counts):
        return _CupyMailbox(counts)
    if is_torch_array(counts) and counts.device.type == "cuda":
        return _TorchMailbox(counts)
    return Mailbox(counts)
