"""Threads of another library, on which steps run where a front end lends them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

__all__ = ["Lent", "lent_threads", "on_threads_of"]

Lent = Callable[[Callable[[], object], int], bool]

lent_threads: ContextVar[Lent | None] = ContextVar("lent_threads", default=None)


@contextmanager
def on_threads_of(lent: Lent) -> Iterator[None]:
    """Have steps run on the threads of another library.

    Parameters
    ----------
    lent : callable
        ``lent(work, count) -> bool`` does what `lars_array.kernels.threads.run_on_threads` does, or returns False.
    """
    token = lent_threads.set(lent)
    try:
        yield
    finally:
        lent_threads.reset(token)
