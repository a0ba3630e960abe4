"""Steps in a CUDA graph: CuPy's work on a stream of its own, and what is captured there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["capture", "own_stream"]


@contextmanager
def own_stream(cp: Any) -> Iterator[Any]:
    """Have CuPy work on a new stream, behind what it was asked for before, and wait for that stream in the end."""
    stream = cp.cuda.Stream(non_blocking=True)
    cp.cuda.get_current_stream().synchronize()
    with stream:
        yield stream
    stream.synchronize()


def capture(stream: Any, step: Callable[[Any], object], grads: Any) -> Any:
    """Return a graph of what a step launches on a stream, which is the current one; the step is not taken."""
    stream.begin_capture()
    step(grads)
    return stream.end_capture()
