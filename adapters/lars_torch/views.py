"""Tensors as arrays of NumPy or CuPy, without copying."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch

from lars_array.addresses import array_at
from lars_array.dtypes import COMPUTE, dtype_name

__all__ = ["borrowed", "computed_in", "layout", "library_for", "view"]


def computed_in(dtype: torch.dtype) -> torch.dtype:
    """Return the type that parameters of `dtype` are computed in, and that their momentum buffers have."""
    kind: torch.dtype = getattr(torch, COMPUTE[dtype_name(dtype)])
    return kind


def layout(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Return all that a view depends on: where the tensor lies, of what type and how."""
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


@cache
def library_for(device: torch.device) -> str:
    """Return whose arrays tensors on `device` become: "numpy", "cupy", or "torch" where they stay what they are."""
    if device.type == "cpu":
        return "numpy"
    if device.type == "cuda" and torch.version.cuda is not None:
        try:
            import cupy

            return "cupy" if cupy.cuda.is_available() else "torch"
        except ImportError:
            pass
    return "torch"


@cache
def has_bfloat16() -> bool:
    """Return whether NumPy can be taught bfloat16 here."""
    try:
        import ml_dtypes  # noqa: F401  # it teaches by being imported
    except ImportError:
        return False
    return True


def view(tensor: torch.Tensor) -> Any:
    """Return an array on the memory of `tensor`, over DLPack; both are alive while one is.

    Parameters
    ----------
    tensor : Tensor
        On a CPU, or on a CUDA device that is the current one.

    Returns
    -------
    array
        Of NumPy or CuPy, of the tensor's shape, strides and dtype.
    """
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:  # DLPack knows it, NumPy does not: its bits travel
        import ml_dtypes

        return _exported(tensor.view(torch.int16)).view(ml_dtypes.bfloat16)
    return _exported(tensor)


def borrowed(array: Any, address: int | None = None) -> Any:
    """Return an array on the memory of `array`, or laid out like it at another address, that does not keep it alive.

    A gradient is given back by torch after a step, and may be found in the same place in the next one. Such an array
    may be kept, but it must not be looked at unless what it was made from is still there.

    Parameters
    ----------
    array : array
        Of NumPy or CuPy.
    address : int, optional
        Where its first element is instead, on the same device.

    Returns
    -------
    array
        Of the same library, shape, strides and dtype; those of NumPy are read-only.
    """
    if not isinstance(array, np.ndarray):
        return _borrowed_on_device(array, address)
    if address is None:
        address = array.__array_interface__["data"][0]
    return array_at(address, array.shape, array.dtype, array.strides)


def _borrowed_on_device(array: Any, address: int | None) -> Any:
    import cupy

    pointer = array.data.ptr if address is None else address
    memory = cupy.cuda.UnownedMemory(pointer, array.nbytes, None, array.device.id)
    return cupy.ndarray(array.shape, array.dtype, cupy.cuda.MemoryPointer(memory, 0), array.strides)


def _exported(tensor: torch.Tensor) -> Any:
    if tensor.device.type == "cpu":
        return np.from_dlpack(tensor)
    import cupy

    return cupy.from_dlpack(tensor)
