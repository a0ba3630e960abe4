"""Memory for what a step computes while it is captured in a CUDA graph, whose replays write to it again."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from array_api_compat import is_cupy_array

__all__ = ["GraphMemory"]


class GraphMemory:
    """A memory pool of CuPy of which no other array gets anything, made when the first step is captured."""

    def __init__(self) -> None:
        self._pool: Any = None

    def while_capturing(self, kernel: Any, like: Any) -> AbstractContextManager[Any]:
        """Return a context in which CuPy allocates from the pool, if the kernel's launches are being captured."""
        is_capturing = is_cupy_array(like) and getattr(kernel, "is_capturing", bool)()
        if not is_capturing:
            return nullcontext()
        import cupy

        if self._pool is None:
            self._pool = cupy.cuda.MemoryPool()
        context: AbstractContextManager[Any] = cupy.cuda.using_allocator(self._pool.malloc)
        return context
