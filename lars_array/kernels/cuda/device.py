"""Memory and launches on a CUDA device, through CuPy on its current stream.

The caller makes the device the current one for launches and `is_capturing`, since a step has many; `zeros`, `put` and
`compile` do so themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Any

import numpy as np

from lars_array.kernels.cuda.one_launch import one_launch_source
from lars_array.kernels.cuda.source import COMMON, OPTIONS, ROWS, THREADS, pair_name, source

__all__ = ["Device", "problem"]


class Device:
    """One GPU.

    Parameters
    ----------
    number : int
        The number that CUDA gives it.
    """

    rows = ROWS

    def __init__(self, number: int) -> None:
        import cupy

        self._cupy, self._device = cupy, cupy.cuda.Device(number)
        self._functions: dict[str, Any] = {}

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

    def address(self, array: Any) -> int:
        """Return the address of an array on the device."""
        address: int = array.data.ptr
        return address

    def is_capturing(self) -> bool:
        """Return whether launches are captured in a graph."""
        return bool(self._cupy.cuda.get_current_stream().is_capturing())

    def attribute(self, name: str) -> int:
        """Return an attribute of the device, by CuPy's name for it."""
        return int(self._device.attributes[name])

    def compile(self, pairs: Iterable[tuple[str, str]], *, one_launch: bool = False) -> None:
        """Compile the kernels for these element types of parameters and gradients, each once."""
        from cupy.cuda.compiler import compile_using_nvrtc

        make, stages = (one_launch_source, ("sums", "apply", "step")) if one_launch else (source, ("sums", "apply"))
        for pair in set(pairs):
            wanted = [pair_name(stage, *pair) for stage in stages] + [*COMMON, "write_pointers"]
            names = [name for name in wanted if name not in self._functions]
            if not names:
                continue
            with self._device:
                # Not by cupy.RawModule, which flushes subnormal numbers to zero whatever the options say.
                binary, _ = compile_using_nvrtc(make([pair]), OPTIONS, filename="lars_array.cu")
                module = self._cupy.cuda.Module()
                module.load(binary)
                self._functions |= {name: module.get_function(name) for name in names}

    def launcher(self, name: str, blocks: int, *arguments: Any) -> Callable[[], None]:
        """Return a function that launches a kernel on the current stream.

        Parameters
        ----------
        name : str
            From `lars_array.kernels.cuda.source`; it has been compiled.
        blocks : int
            How many.
        *arguments : int, uint64 or structured arrays of one element
            For an int, a pointer or a structure in C++. A launch copies what arrays hold then.
        """
        values = tuple([np.int32(x) if isinstance(x, int) else x for x in arguments])
        return partial(self._functions[name], (blocks,), (THREADS,), values)


@cache
def _device(number: int) -> Device:
    return Device(number)


def problem() -> str | None:
    """Return why CUDA can't be used here, None if it can."""
    try:
        import cupy
    except ImportError as error:
        return f"it needs CuPy, pip install 'lars-array[cuda12]' or 'lars-array[cuda13]': {error}"
    if cupy.cuda.runtime.is_hip:
        return "it is CUDA, and this CuPy is for ROCm"
    return None if cupy.cuda.is_available() else "there is no CUDA device"
