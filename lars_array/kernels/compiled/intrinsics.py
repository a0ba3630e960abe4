"""Operations that numba lacks: access by address, atomics, and half precision as bits."""

from __future__ import annotations

import logging
import time
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core.event import Listener, install_listener
from numba.extending import intrinsic, overload

__all__ = ["array_at", "at_first", "fetch_add", "kept_on_disk", "load", "prefetch", "read", "stored", "write"]

_log = logging.getLogger("lars_array")


def kept_on_disk(function: Any) -> Any:
    """Return `function` compiled for each new combination of types, cached on disk for other processes."""
    try:
        return numba.njit(nogil=True, error_model="numpy", cache=True)(function)
    except RuntimeError:  # no cache directory is writable
        return numba.njit(nogil=True, error_model="numpy")(function)


def at_first(function: Any, *arguments: Any, is_new: bool = False) -> Any:
    """Call a compiled function, `is_new` with types that it may not have been compiled for."""
    if function.overloads and not is_new:
        return function(*arguments)
    report = _Report(function)
    with install_listener("numba:compile", report):
        try:
            result = function(*arguments)
        except OSError:  # it was compiled, but writing the cache failed, for instance on a full disk
            result = function(*arguments)
    if report.start is not None:
        path = function.stats.cache_path
        kept = f"kept in {path}" if path else "not kept: no folder is writable, see NUMBA_CACHE_DIR"
        _log.info("compiled %s in %.1f s, %s", function.__name__, time.perf_counter() - report.start, kept)
    return result


class _Report(Listener):  # type: ignore[misc]
    """Logs that a function is being compiled, which a function that is kept on disk is not."""

    def __init__(self, function: Any) -> None:
        self.name = function.__name__
        self.start: float | None = None

    def on_start(self, event: Any) -> None:
        """Log the first of the functions that are compiled for this one."""
        if self.start is None:
            self.start = time.perf_counter()
            _log.info("compiling %s with numba, which takes up to a minute, once for these types", self.name)

    def on_end(self, event: Any) -> None:
        """Do nothing."""


@intrinsic
def _pointer(context: Any, address: Any, like: Any) -> Any:
    """Return the address as a pointer to elements of the type of `like`, an array."""
    pointer = types.CPointer(like.dtype)

    def generate(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], target.get_value_type(pointer))

    return pointer(address, like), generate


@numba.njit
def array_at(address: int, size: int, like: Any) -> Any:
    """Return the memory at `address` as an array of `size` elements of the type of `like`."""
    return numba.carray(_pointer(address, like), size)


def _element(target: Any, builder: Any, kind: Any, array: Any, index: Any) -> Any:
    return builder.gep(target.make_array(kind)(target, builder, array).data, [index])


@intrinsic
def prefetch(context: Any, address: Any) -> Any:
    """Prefetch the cache line at an address, which need not be valid."""

    def generate(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        function = builder.module.declare_intrinsic("llvm.prefetch", [byte], kind)
        to_read, into_all_caches, data = number(0), number(3), number(1)
        builder.call(function, [builder.inttoptr(arguments[0], byte), to_read, into_all_caches, data])
        return target.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic
def fetch_add(context: Any, array: Any, index: Any, amount: Any) -> Any:
    """Add to ``array[index]``, of int64, atomically (acquire and release), and return its previous value."""

    def generate(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        element = _element(target, builder, signature.args[0], *arguments[:2])
        return builder.atomic_rmw("add", element, arguments[2], "acq_rel")

    return types.int64(array, types.int64, types.int64), generate


@intrinsic
def read(context: Any, array: Any, index: Any) -> Any:
    """Return ``array[index]``, of int64, atomically (acquire): writes before the matching `write` are visible."""

    def generate(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load_atomic(_element(target, builder, signature.args[0], *arguments), "acquire", 8)

    return types.int64(array, types.int64), generate


@intrinsic
def write(context: Any, array: Any, index: Any, value: Any) -> Any:
    """Set ``array[index]``, of int64, atomically (release)."""

    def generate(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.store_atomic(arguments[2], _element(target, builder, signature.args[0], *arguments[:2]), "release", 8)
        return target.get_dummy_value()

    return types.void(array, types.int64, types.int64), generate


@intrinsic
def _bits_as(context: Any, value: Any, like: Any) -> Any:
    """Return the bits of `value` as a number of the type of `like`, of the same width."""

    def generate(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], target.get_value_type(signature.return_type))

    return like(value, like), generate


# numba compares these arguments with those of the overloads, and counts annotations as part of them.
def load(x):  # type: ignore[no-untyped-def]
    """Return a stored number in its compute type. uint16 holds the bits of a float16, int16 those of a bfloat16."""
    raise NotImplementedError


def stored(x, like):  # type: ignore[no-untyped-def]
    """Return a number in its stored form, the type of `like`: the inverse of `load`."""
    raise NotImplementedError


@overload(load)
def _load(x):  # type: ignore[no-untyped-def]
    if x == types.uint16:
        return _from_float16
    if x == types.int16:
        return lambda x: _bits_as(np.uint32(np.uint32(x) << 16), np.float32(0))
    return lambda x: x


@overload(stored)
def _stored(x, like):  # type: ignore[no-untyped-def]
    if like == types.uint16:
        return _to_float16
    if like == types.int16:
        return _to_bfloat16
    return lambda x, like: x


# In integer arithmetic: on processors without float16, LLVM calls a conversion function that numba does not link.
# A float32 has 23 bits of fraction and an exponent bias of 127, a float16 10 and 15; a bfloat16 is the upper half of a
# float32.


def _from_float16(x):  # type: ignore[no-untyped-def]
    magnitude = np.uint32((np.uint32(x) & 0x7FFF) << 13)
    bits = np.uint32(magnitude + ((127 - 15) << 23))
    if magnitude >= np.uint32(0x7C00 << 13):  # inf and nan
        bits = np.uint32(magnitude | (0xFF << 23))
    elif magnitude < np.uint32(0x0400 << 13):  # subnormal: not 1 + fraction, as for other exponents, but 0 + fraction
        one = np.uint32((127 - 14) << 23)
        number = _bits_as(np.uint32(one + magnitude), np.float32(0)) - _bits_as(one, np.float32(0))
        bits = _bits_as(number, np.uint32(0))
    return _bits_as(np.uint32(bits | ((np.uint32(x) & 0x8000) << 16)), np.float32(0))


def _to_float16(x, like):  # type: ignore[no-untyped-def]
    bits = _bits_as(x, np.uint32(0))
    magnitude = np.uint32(bits & 0x7FFFFFFF)
    if magnitude >= np.uint32((127 + 16) << 23):  # too large, inf or nan
        half = np.uint32(0x7E00) if magnitude > np.uint32(0xFF << 23) else np.uint32(0x7C00)
    elif magnitude < np.uint32((127 - 14) << 23):  # subnormal: adding 1/2 rounds to the last bit
        rounded = _bits_as(_bits_as(magnitude, np.float32(0)) + np.float32(0.5), np.uint32(0))
        half = np.uint32(rounded - (126 << 23))
    else:
        even = (magnitude >> 13) & 1
        half = np.uint32((magnitude - ((127 - 15) << 23) + 0xFFF + even) >> 13)
    return np.uint16(half | ((bits >> 16) & 0x8000))


def _to_bfloat16(x, like):  # type: ignore[no-untyped-def]
    bits = _bits_as(x, np.uint32(0))
    if x != x:
        return np.int16((bits >> 16) | 0x40)
    return np.int16((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)
