"""Arrays of JAX as NumPy's and the other way round, on the same memory."""

from __future__ import annotations

import ctypes
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lars_array.buffers import aligned_zeros
from lars_array.dtypes import dtype_name

__all__ = ["Lent", "own_copy", "room_for", "view"]

_BFLOAT16 = 4  # DLPack's code, kDLBfloat
_CODE_AT = 20  # bytes into a DLTensor: after the address, the device of two and the number of axes


def view(array: Any) -> Any:
    """Return a read-only NumPy view of a JAX array on a CPU, once it is computed."""
    found = np.asarray(array)
    if isinstance(array, jax.Array) and found.size and _address(found) != array.unsafe_buffer_pointer():
        raise TypeError("the array can't be seen from NumPy without copying it")
    return found


def own_copy(array: Any) -> Any:
    """Return a copy of an array in memory that JAX takes over as it is: aligned, dense and writable."""
    given = np.asarray(array)
    mine = room_for(given)
    mine[...] = given
    return mine


def room_for(array: Any) -> Any:
    """Return memory such as `own_copy` returns, without the numbers."""
    return aligned_zeros(max(array.size, 1), array.dtype)[: array.size].reshape(array.shape)


def _address(array: Any) -> int:
    place: int = array.__array_interface__["data"][0]
    return place


class Lent:
    """Memory of ours as a JAX array, and whether anybody may still look at it there.

    Parameters
    ----------
    memory : ndarray
        From `own_copy`. It must not be written to while it `is_seen`.

    Attributes
    ----------
    array : jax.Array
        On the same memory, until `forget`.

    Raises
    ------
    TypeError
        If JAX does not take it as it is, which of float64 it does only with ``jax_enable_x64``.
    """

    def __init__(self, memory: Any) -> None:
        self.memory = memory
        is_bfloat16 = dtype_name(memory.dtype) == "bfloat16"
        # An object of its own: JAX holds it as long as anything is seen of the memory.
        lent = memory.view(np.uint16) if is_bfloat16 else memory[...]
        self._lent = weakref.ref(lent)
        self.array: Any = jnp.from_dlpack(_BFloat16(lent) if is_bfloat16 else lent, copy=False)
        if self.array.dtype != memory.dtype:
            raise TypeError(f"JAX makes {self.array.dtype!r} of {memory.dtype!r}; see jax_enable_x64")
        if memory.size and self.array.unsafe_buffer_pointer() != _address(memory):
            raise TypeError("JAX has copied memory that it was to take over")

    def forget(self) -> None:
        """Leave the array to others."""
        self.array = None

    def is_seen(self) -> bool:
        """Return whether a JAX array, a view of one, or a computation that is going on still reads the memory."""
        return self._lent() is not None


class _BFloat16:
    """The bits of bfloat16 numbers for DLPack, which knows the type: NumPy exports them, and the type is put right."""

    def __init__(self, bits: Any) -> None:
        self._bits = bits

    def __dlpack_device__(self) -> Any:
        return self._bits.__dlpack_device__()

    def __dlpack__(self, **_: Any) -> Any:
        capsule = self._bits.__dlpack__()
        start = ctypes.pythonapi.PyCapsule_GetPointer
        start.restype, start.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
        ctypes.c_uint8.from_address(start(capsule, b"dltensor") + _CODE_AT).value = _BFLOAT16
        return capsule
