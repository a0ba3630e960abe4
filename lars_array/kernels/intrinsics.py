"""What numba does not offer in Python: addresses, atomics, and half precision as bits."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

__all__ = ["array_at", "fetch_add", "load", "read", "stored", "write"]


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


@intrinsic
def _widened(context: Any, bits: Any) -> Any:
    """Return the float16 in 16 bits as float32."""

    def generate(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())

    return types.float32(bits), generate


@intrinsic
def _narrowed(context: Any, value: Any) -> Any:
    """Return the bits of the float16 that is nearest to a float32."""

    def generate(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(builder.fptrunc(arguments[0], ir.HalfType()), ir.IntType(16))

    return types.uint16(value), generate


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
        return lambda x: _widened(x)
    if x == types.int16:
        return lambda x: _bits_as(np.uint32(np.uint32(x) << 16), np.float32(0))
    return lambda x: x


@overload(stored)
def _stored(x, like):  # type: ignore[no-untyped-def]
    if like == types.uint16:
        return lambda x, like: _narrowed(x)
    if like == types.int16:
        return _stored_bfloat16
    return lambda x, like: x


def _stored_bfloat16(x, like):  # type: ignore[no-untyped-def]
    """Round to the nearest, of two to the even one; a nan stays one."""
    bits = _bits_as(x, np.uint32(0))
    if x != x:
        return np.int16((bits >> 16) | 0x40)
    return np.int16((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)
