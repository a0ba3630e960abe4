"""CuPy on torch's device and stream: work is done in the order in which it was asked for, whoever asked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["torchs_stream"]


@contextmanager
def torchs_stream(device: torch.device) -> Iterator[None]:
    """Make `device` the current one, and torch's current stream on it CuPy's as well."""
    import cupy

    with torch.cuda.device(device), cupy.cuda.Device(device.index):
        stream = torch.cuda.current_stream(device)
        if hasattr(cupy.cuda.Stream, "from_external"):  # since CuPy 14, which warns of the other way
            current = cupy.cuda.Stream.from_external(stream)
        else:
            current = cupy.cuda.ExternalStream(stream.cuda_stream, device.index)
        with current:
            yield
