"""The threads of torch, where it is in the process.

They wait for their next work by spinning, up to some milliseconds. A step right after a backward pass would have to
share the cores with them, so it runs on them.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

__all__ = ["run_on_torch_threads"]

_Function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def run_on_torch_threads(work: Callable[[], object], count: int) -> bool:
    """Call ``work()`` on up to `count` threads of torch's OpenMP, this one among them, and return whether it was done.

    Parameters
    ----------
    work : callable
        As for `lars_array.kernels.threads.run_on_threads`.
    count : int
        The number of threads to use.

    Raises
    ------
    BaseException
        The first that ``work`` has raised, when all calls have ended.
    """
    torch = sys.modules.get("torch")
    parallel = None if torch is None else _parallel(torch.__file__)
    if parallel is None:
        return False
    failures: list[BaseException] = []

    def body(_: Any) -> None:
        try:
            work()
        except BaseException as error:  # OpenMP has no exceptions
            failures.append(error)

    parallel(_Function(body), None, count, 0)
    if failures:
        try:
            raise failures[0]
        finally:
            failures.clear()  # a traceback refers to this frame
    return True


@cache
def _parallel(torch_file: str | None) -> Any:
    """Return the function `GOMP_parallel` of the runtime that torch has loaded; None without one."""
    try:
        library = ctypes.CDLL(str(Path(torch_file or "").with_name("lib") / "libtorch_cpu.so"))
        parallel = library.GOMP_parallel  # found in what torch is linked to
    except (OSError, AttributeError):
        return None
    parallel.argtypes = _Function, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint
    parallel.restype = None
    return parallel


def _forget() -> None:
    """Use no threads of OpenMP after a fork, which they do not survive."""
    global _parallel
    _parallel = lambda torch_file: None  # noqa: E731


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
