"""What the CUDA kernels need of a device: memory, addresses and launches, through CuPy on its current stream."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import numpy as np

from lars_array.kernels.cuda_source import COMMON, OPTIONS, ROWS, THREADS, pair_name, source

__all__ = ["Device", "problem"]


class Device:
    """One GPU.

    Parameters
    ----------
    number : int
        Which.
    """

    threads, rows = THREADS, ROWS

    def __init__(self, number: int) -> None:
        import cupy

        self._cupy, self._device = cupy, cupy.cuda.Device(number)
        self._functions: dict[str, Any] = {}
        self._modules: dict[tuple[str, str], Any] = {}

    @classmethod
    def on(cls, like: Any) -> Device:
        """Return the device that an array lies on."""
        return _device(like.device.id)

    def zeros(self, shape: Any, dtype: Any) -> Any:
        """Return a new array."""
        with self._device:
            return self._cupy.zeros(shape, dtype)

    def put(self, array: Any) -> Any:
        """Return a copy of a NumPy array, of a structured one its bytes."""
        with self._device:
            return self._cupy.asarray(array if array.dtype.fields is None else array.view(np.uint8))

    def addresses(self, arrays: Sequence[Any]) -> Any:
        """Return where arrays begin, uint64."""
        return np.fromiter((x.data.ptr for x in arrays), np.uint64, len(arrays))

    def is_capturing(self) -> bool:
        """Return whether launches go into a graph."""
        with self._device:
            return bool(self._cupy.cuda.get_current_stream().is_capturing())

    def prepare(self, pairs: Iterable[tuple[str, str]]) -> None:
        """Have the kernels for these element types of parameters and gradients compiled."""
        from cupy.cuda.compiler import compile_using_nvrtc

        with self._device:
            for pair in pairs:
                if pair in self._modules:
                    continue
                # Not by cupy.RawModule, which has subnormal numbers flushed to zero, whatever is asked of it.
                binary, _ = compile_using_nvrtc(source([pair]), OPTIONS, filename="lars_array.cu")
                module = self._modules[pair] = self._cupy.cuda.Module()
                module.load(binary)
                names = [pair_name(stage, *pair) for stage in ("sums", "apply")]
                if len(self._modules) == 1:
                    names += [*COMMON, "poke"]
                self._functions |= {name: module.get_function(name) for name in names}

    def launch(self, name: str, blocks: int, *arguments: Any) -> None:
        """Launch a kernel on the current stream.

        Parameters
        ----------
        name : str
            From `lars_array.kernels.cuda_source`.
        blocks : int
            How many.
        *arguments : int, uint64 or structured arrays of one element
            As C++ takes them: int, an address, a structure.
        """
        values = tuple(np.int32(x) if isinstance(x, int) else x for x in arguments)
        with self._device:
            self._functions[name]((blocks,), (THREADS,), values)


@cache
def _device(number: int) -> Device:
    return Device(number)


def problem() -> str | None:
    """Return why CUDA can't be used here, None if it can."""
    try:
        import cupy
    except ImportError as error:
        return f"it needs CuPy, pip install lars-array[cuda12] or [cuda13]: {error}"
    if cupy.cuda.runtime.is_hip:
        return "it is CUDA, and this CuPy is for ROCm"
    return None if cupy.cuda.is_available() else "there is no CUDA device"
