"""Ctrl+C between any two instructions of the library, and memory that runs out at any of its allocations."""

from __future__ import annotations

import ctypes
import dis
import gc
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

__all__ = ["InterruptError", "moments_of", "run_out_of_memory", "strike_at"]

PACKAGES = ("lars_array", "lars_torch", "lars_jax", "contextlib")

# Python runs a handler at calls and at the ends of loops. A signal that comes before one of these is handled where one
# before the next instruction would be.
WITHOUT = ("LOAD_FAST", "LOAD_CONST", "LOAD_DEREF", "LOAD_CLOSURE", "STORE_FAST", "STORE_DEREF", "POP_TOP", "PUSH_NULL")
WITHOUT += ("PRECALL", "KW_NAMES", "COPY", "SWAP", "NOP", "CACHE", "BUILD_TUPLE", "BUILD_LIST", "MAKE_CELL", "IS_OP")
WITHOUT += ("RETURN_VALUE", "LOAD_GLOBAL", "COPY_FREE_VARS", "MAKE_FUNCTION", "JUMP_FORWARD", "POP_EXCEPT", "RERAISE")
WITHOUT += tuple(name for name in dis.opname if name.startswith("POP_JUMP"))
SKIPPED = frozenset(dis.opmap[name] for name in WITHOUT if name in dis.opmap)


class InterruptError(BaseException):
    """What the handler raises: no other code catches it."""


# In C, as a trace function, which Python gives three arguments and which takes none: the signal is noted, and handled
# where Python would by itself, not inside of the trace function.
_trip = ctypes.PYFUNCTYPE(None, ctypes.py_object, ctypes.py_object, ctypes.py_object)(
    ("PyErr_SetInterrupt", ctypes.pythonapi)
)


def moments_of(action: Callable[[], Any]) -> list[int]:
    """Return the numbers of instructions of an action to be interrupted at: of each the first time and the last."""
    first: dict[Any, int] = {}
    last: dict[Any, int] = {}

    def seen(number: int, frame: Any) -> None:
        place = frame.f_code, frame.f_lasti
        if frame.f_code.co_code[frame.f_lasti] not in SKIPPED:
            first.setdefault(place, number)
            last[place] = number

    _traced(action, _tracer(seen))
    return sorted({*first.values(), *last.values()})


def strike_at(moment: int, action: Callable[[], Any]) -> bool:
    """Do an action that a signal interrupts before the instruction of that number; return whether that was raised.

    The signal comes again before each of the following instructions of the same function, until a handler has raised.
    """

    def handler(number: int, frame: Any) -> None:
        sys.settrace(None)
        raise InterruptError

    before = signal.signal(signal.SIGINT, handler)
    gc.disable()  # others have callbacks there, which swallow what is raised in them
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None  # where it comes again while a generator is closed
    tracer, is_raised = _tracer(lambda number, frame: _trip if number == moment - 1 else None), False
    try:
        _traced(action, tracer)
    except InterruptError:
        is_raised = True
    while True:
        try:
            sys.settrace(None)
            time.sleep(0)  # the signal may have come once more
            break
        except InterruptError:
            is_raised = True
    gc.enable()
    sys.unraisablehook = hook
    assert signal.getsignal(signal.SIGINT) is handler, "the handler is not in place again"
    signal.signal(signal.SIGINT, before)
    return is_raised


def _traced(action: Callable[[], Any], tracer: Any) -> None:
    sys.settrace(tracer)
    action()
    sys.settrace(None)


def _tracer(at: Callable[[int, Any], Any]) -> Any:
    """Return a trace function that calls ``at(number, frame)`` for each instruction of the library."""
    count = 0

    def local(frame: Any, event: str, argument: Any) -> Any:
        nonlocal count
        if event == "opcode":
            count += 1
            return at(count, frame) or local
        return local

    def trace(frame: Any, event: str, argument: Any) -> Any:
        name = frame.f_globals.get("__name__", "")
        if name.partition(".")[0] not in PACKAGES:
            return None
        frame.f_trace_lines, frame.f_trace_opcodes = False, True
        return local

    return trace


# ------------------------------------------------------------------------------------------------------ out of memory

# Functions in C that allocate arrays, and those of the pretended device, `Device` of cuda_on_cpu.
ALLOCATES = {
    "empty",
    "zeros",
    "array",
    "asarray",
    "copy",
    "astype",
    "take",
    "arange",
    "fromiter",
    "concatenate",
    "clone",
}
ALLOCATES |= {"empty_like", "zeros_like", "full", "ones", "new_tensor", "tensor", "nonzero", "repeat", "tolist", "to"}
OF_DEVICE = ("zeros", "put", "compile")


def _assigns(frame: Any) -> bool:
    """Return whether array_api_strict assigns to elements, for which it makes an array of what is one."""
    callers = frame, frame.f_back, frame.f_back and frame.f_back.f_back
    return any(caller is not None and caller.f_code.co_name == "__setitem__" for caller in callers)


def run_out_of_memory(number: int, action: Callable[[], Any]) -> bool:
    """Do an action whose allocation of that number fails; return whether there was one."""
    count = 0

    def profile(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        if event == "c_call" and argument.__name__ in ALLOCATES:
            own = frame.f_globals.get("__name__", "").partition(".")[0]
            is_one = own in (*PACKAGES, "numpy", "array_api_strict", "array_api_compat", "jax")
            is_one = is_one and not _assigns(frame)
        else:
            code = frame.f_code
            is_one = event == "call" and code.co_name in OF_DEVICE and code.co_filename.endswith("cuda_on_cpu.py")
        count += is_one
        if is_one and count == number:
            sys.setprofile(None)
            raise MemoryError

    gc.disable()
    sys.setprofile(profile)
    try:
        action()
        return False
    except MemoryError:
        return True
    finally:
        sys.setprofile(None)
        gc.enable()
