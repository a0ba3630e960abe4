"""Steps on the threads of torch.

Torch's OpenMP threads keep spinning for some milliseconds after their work. In a step right after a backward pass,
threads of another pool would have to share the cores with them.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

__all__ = ["run_on_torch_threads"]

_is_forked = False  # these threads do not survive a fork
_Function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def run_on_torch_threads(work: Callable[[], object], count: int) -> bool:
    """Call `work` on up to `count` threads of torch's OpenMP, this one among them, and return whether there are any."""
    parallel, threads = None if _is_forked else _parallel(), torch.get_num_threads()
    if parallel is None or threads == 1:
        return False
    failures: list[BaseException] = []
    turns = iter(range(count))

    def body(_: Any) -> None:
        if next(turns, None) is None:
            return
        try:
            work()
        except BaseException as error:  # OpenMP has no exceptions
            failures.append(error)

    parallel(_Function(body), None, threads, 0)  # all of them: OpenMP ends threads that are not asked for
    if failures:
        try:
            raise failures[0]
        finally:
            failures.clear()  # a traceback refers to this frame
    return True


@cache
def _parallel() -> Any:
    """Return the function `GOMP_parallel` of the library that torch is linked to; None where it has another."""
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).with_name("lib") / "libtorch_cpu.so"))
        parallel = library.GOMP_parallel
    except (OSError, AttributeError):
        return None
    parallel.argtypes = _Function, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint
    parallel.restype = None
    return parallel


def _note_fork() -> None:
    global _is_forked
    _is_forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)
