"""CuPy and torch as on a CUDA device, where there is none: to measure what a step costs the host.

Arrays are CuPy's own, at addresses that nothing reads or writes. Replaced is only what would call the driver: launches,
copies, allocations, and the current device and stream. docs/performance.md lists what this can't show.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache
from typing import Any

import numpy as np

from benchmarks.contestant import UnavailableError

__all__ = ["array", "install", "tensor_state"]

_ALIGNMENT = 512  # bytes, of CuPy's pool
_CONTEXT = nullcontext()
_end = 0x7F00_0000_0000  # of the memory that arrays have


def array(
    shape: int | Sequence[int],
    dtype: Any = np.float32,
    address: int | None = None,
    strides: Any = None,
    device: int = 0,
) -> Any:
    """Return an array of CuPy on memory that does not exist, by default behind that of all others."""
    import cupy

    global _end
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if address is None:
        address, _end = _end, _end + -(-max(size, 1) // _ALIGNMENT) * _ALIGNMENT
    memory = cupy.cuda.MemoryPointer(cupy.cuda.UnownedMemory(address, size, None, device), 0)
    return _array_type()(shape, dtype, memory, strides)


@cache
def _array_type() -> Any:
    import cupy

    return type("Array", (cupy.ndarray,), {"__setitem__": _nothing})


class _Stream:
    """In the place of a stream of CuPy or torch, and of a device that is a context."""

    ptr = cuda_stream = id = 0

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    @classmethod
    def from_external(cls, stream: Any) -> _Stream:
        """Return a stream of CuPy for one of torch."""
        return cls()

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def is_capturing(self) -> bool:
        """Return whether a graph is being captured."""
        return False


class _Module:
    """In the place of compiled code, whose launches do nothing."""

    def load(self, binary: Any) -> None:
        """Load nothing."""

    def get_function(self, name: str) -> Any:
        """Return a kernel."""
        return _nothing


def _nothing(*_: Any, **__: Any) -> None:
    pass


_CURRENT = _Stream()


def _current(*_: Any) -> _Stream:
    return _CURRENT


def _zero(*_: Any) -> int:
    return 0


class _Event:
    done = True

    def __init__(self, **_: Any) -> None:
        pass

    record = _nothing


@cache
def install() -> None:
    """Replace the calls of CuPy, and of `lars_array` on its arrays, that need a driver, to the end of the process.

    Raises
    ------
    UnavailableError
        Without CuPy.
    """
    try:
        import array_api_compat.cupy as xp
        import cupy
        import cupy.cuda.compiler
        import cupyx
    except ImportError as error:
        raise UnavailableError(f"no CuPy: {error}") from error
    from array_api_compat import is_cupy_array

    from lars_array import _stepper, telemetry
    from lars_array.state import store

    def asarray(values: Any, dtype: Any = None, **_: Any) -> Any:
        values = np.asarray(values, dtype)
        return array(values.shape, values.dtype)

    def zeros_like(x: Any, dtype: Any = None, **_: Any) -> Any:
        return array(x.shape, x.dtype if dtype is None else dtype)

    def device_context(x: Any) -> Any:
        return (x.device and _CONTEXT) if is_cupy_array(x) else nullcontext()

    os.environ.pop("LARS_ARRAY_CUDA", None)  # three launches
    cuda = cupy.cuda
    cuda.is_available, cuda.Device, cuda.Stream, cuda.Event = (lambda: True), _Stream, _Stream, _Event
    cuda.get_current_stream, cuda.runtime.memcpyAsync, cuda.Module = _current, _nothing, _Module
    cuda.compiler.compile_using_nvrtc = lambda *_, **__: (b"", None)
    cupyx.zeros_pinned = np.zeros
    cupy.zeros = array
    for namespace in (cupy, xp):
        namespace.asarray, namespace.zeros_like = asarray, zeros_like
    stepper = getattr(_stepper, "stepper", _stepper)  # one module in older checkouts, which `compare` runs as well
    for module in (stepper, store, telemetry):
        module.device_context = device_context


def tensor_state() -> Any:
    """Return the class in the place of `lars_torch._state.TensorState` that takes tensors of a CPU for a device's.

    Torch's functions for the current device and stream are replaced to the end of the process.
    """
    import torch

    from lars_torch import _state

    install()
    torch.cuda._exchange_device = torch.cuda._maybe_exchange_device = _zero
    torch.cuda.current_stream = _current

    class PretendedState(_state.TensorState):
        """The state of tensors on a device that is none."""

        def __init__(self, device: Any, *others: Any) -> None:
            super().__init__(device, *others)
            self._device, self._library = torch.device("cuda", 0), "cupy"

        def view(self, tensor: Any) -> Any:
            """Return an array of CuPy on the memory of a tensor, which is not read or written."""
            strides = [x * tensor.element_size() for x in tensor.stride()]
            return array(tensor.shape, str(tensor.dtype).removeprefix("torch."), tensor.data_ptr(), strides)

        def owned(self, buffers: list[Any], masters: list[Any]) -> tuple[list[Any], list[Any]]:
            """Return tensors for momentum buffers."""
            pairs = zip(self.buffers, buffers, strict=True)
            return [torch.zeros(x.shape) if tensor is None else tensor for tensor, x in pairs], masters

    return PretendedState
