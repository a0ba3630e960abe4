"""What numba does not offer in Python: addresses, atomics, and half precision as bits."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

__all__ = ["array_at", "at_first", "fetch_add", "kept_on_disk", "load", "prefetch", "read", "stored", "write"]


def kept_on_disk(function: Any) -> Any:
    """Have `function` compiled when it is called with new types, and the result kept for other processes."""
    try:
        return numba.njit(nogil=True, error_model="numpy", cache=True)(function)
    except RuntimeError:  # there is no directory that could be written to
        return numba.njit(nogil=True, error_model="numpy")(function)


def at_first(function: Any, *arguments: Any) -> Any:
    """Call a compiled function with arguments of new types."""
    try:
        return function(*arguments)
    except OSError:  # it is compiled, but there was no room on the disk to keep it
        return function(*arguments)


@intrinsic
def _pointer(context: Any, address: Any, like: Any) -> Any:
    """Return the address as a pointer to what `like`, an array, holds."""
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
    """Ask for the line of cache at an address, where nothing need be."""

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
    """Add to ``array[index]``, of int64, at once, and return what was there; what was written before is seen after."""

    def generate(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        element = _element(target, builder, signature.args[0], *arguments[:2])
        return builder.atomic_rmw("add", element, arguments[2], "acq_rel")

    return types.int64(array, types.int64, types.int64), generate


@intrinsic
def read(context: Any, array: Any, index: Any) -> Any:
    """Return ``array[index]``, of int64, and with it all that was written before that was."""

    def generate(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load_atomic(_element(target, builder, signature.args[0], *arguments), "acquire", 8)

    return types.int64(array, types.int64), generate


@intrinsic
def write(context: Any, array: Any, index: Any, value: Any) -> Any:
    """Set ``array[index]``, of int64, for those who `read` it."""

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


# numba compares the names of these arguments, and takes annotations for a part of them.
def load(x):  # type: ignore[no-untyped-def]
    """Return a number as it is computed on. uint16 holds the bits of a float16, int16 those of a bfloat16."""
    raise NotImplementedError


def stored(x, like):  # type: ignore[no-untyped-def]
    """Return a number as an array holds it of which `like` is an element: the way back from `load`."""
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


# In whole numbers, since processors that don't know float16 call a function for it that numba hasn't. A float32 has 23
# bits of fraction and adds 127 to its exponent, a float16 10 and 15, a bfloat16 is the upper half of a float32.


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
    elif magnitude < np.uint32((127 - 14) << 23):  # subnormal: adding 1/2 rounds to the last bit that there is room for
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
