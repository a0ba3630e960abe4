"""Tensors as arrays of NumPy or CuPy on the same memory, their layouts, and the checks that each has to pass."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.utils.dlpack
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lars_array import _arrays
from lars_array._arrays import COMPUTE, ArraySpecs, dtype_name, span
from lars_torch._dtensors import check_placements, is_dtensor, local

__all__ = [
    "TensorSpecs",
    "check_gradient",
    "check_is_memory",
    "check_tensor",
    "compute_dtype",
    "is_lazy",
    "library_of",
    "resolved",
    "tensor_of",
    "torch_stream",
    "view",
]


_COMPUTE: dict[torch.dtype, torch.dtype] = {getattr(torch, x): getattr(torch, y) for x, y in COMPUTE.items()}


def compute_dtype(p: torch.Tensor) -> torch.dtype:
    """Return the type that a parameter is computed in, which its momentum buffer has."""
    return _COMPUTE[p.dtype]


# --------------------------------------------------------------------------------------------------------- libraries


def library_of(device: torch.device, tensors: Sequence[torch.Tensor]) -> str:
    """Return whose arrays tensors on `device` become: "numpy", "cupy", or "torch" where they stay tensors."""
    if any(p.dtype == torch.bfloat16 for p in tensors) and not has_bfloat16():
        return "torch"
    return _library_for(device)


@cache
def _library_for(device: torch.device) -> str:
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
    """Return whether ml_dtypes is installed, which adds bfloat16 to NumPy."""
    try:
        import ml_dtypes  # noqa: F401
    except ImportError:
        return False
    return True


@contextmanager
def torch_stream(device: torch.device) -> Iterator[None]:
    """Make `device` the current one, and torch's current stream on it CuPy's as well."""
    import cupy

    index = device.index
    with torch.cuda.device(index), cupy.cuda.Device(index):
        stream = torch.cuda.current_stream(index)
        if hasattr(cupy.cuda.Stream, "from_external"):  # since CuPy 14, which warns of the other way
            current = cupy.cuda.Stream.from_external(stream)
        else:
            current = cupy.cuda.ExternalStream(stream.cuda_stream, index)
        with current:
            yield


# ------------------------------------------------------------------------------------------------------------- views


def view(tensor: torch.Tensor) -> Any:
    """Return an array on the memory of a tensor; both keep it alive.

    Parameters
    ----------
    tensor : Tensor
        On a CPU, or on a CUDA device that is the current one.

    Returns
    -------
    array
        Of NumPy or CuPy, of the tensor's shape, strides and dtype.
    """
    if is_lazy(tensor):
        raise BufferError("a lazily conjugated or negated tensor has other numbers than its memory")
    tensor, name = tensor.detach(), dtype_name(tensor.dtype)
    if name == "bfloat16":  # its bits are read as integers, since NumPy has no such type of its own
        import ml_dtypes

        return _exported(tensor.view(torch.int16), "int16").view(ml_dtypes.bfloat16)
    return _exported(tensor, name)


def _exported(tensor: torch.Tensor, dtype: str) -> Any:
    if tensor.device.type != "cpu":
        import cupy

        return cupy.from_dlpack(tensor)
    if not tensor.numel():
        return np.empty(tensor.shape, dtype)
    # Not numpy(), after which torch can't free the storage of a living tensor; nor DLPack, by which NumPy before
    # 2.3 and torch before 2.9 give memory that can't be written to.
    size = tensor.element_size()
    interface = {
        "version": 3,
        "typestr": np.dtype(dtype).str,
        "shape": tensor.shape,
        "strides": tuple([size * stride for stride in tensor.stride()]),
        "data": (tensor.data_ptr(), False),
    }
    return np.asarray(SimpleNamespace(tensor=tensor, __array_interface__=interface))  # keeps the tensor alive


def tensor_of(array: Any) -> torch.Tensor:
    """Return a tensor on the memory of an array."""
    if isinstance(array, torch.Tensor):
        return array
    return torch.from_numpy(array) if isinstance(array, np.ndarray) else torch.utils.dlpack.from_dlpack(array)


def is_lazy(tensor: torch.Tensor) -> bool:
    """Return whether a tensor is lazily conjugated or negated: its numbers are not those in its memory."""
    return tensor.is_conj() or tensor.is_neg()


def resolved(grads: Sequence[Any]) -> list[Any]:
    """Return gradients, those that are lazy as new tensors."""
    return [g.resolve_conj().resolve_neg() if g is not None and is_lazy(g) else g for g in grads]


class TensorSpecs(ArraySpecs):
    """Types and layouts of tensors; see `lars_array._arrays.ArraySpecs`.

    A step compares those of all parameters and gradients, and each attribute of a tensor takes some 50 ns: what follows
    from others is not compared. Of real tensors, only the imaginary part of others, never contiguous, can be lazy.
    Where torch can compare tensors in C++, attributes are compared only if that comparison fails.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._guards: Any = None  # made of tensors that were compared, and holds none
        self._are_contiguous = all(map(torch.Tensor.is_contiguous, tensors))
        self._can_be_lazy = [
            i for i, x in enumerate(tensors) if x.is_complex() or x.numel() < 2 or not x.is_contiguous()
        ]
        super().__init__(tensors)

    def at(self, index: Sequence[int]) -> TensorSpecs:
        """See `ArraySpecs.at`."""
        specs, lazy = copy.copy(self), dict(zip(self._can_be_lazy, self._columns[-1], strict=True))
        specs._guards = None
        specs._types, specs.spans = [self._types[i] for i in index], self.spans[index]
        specs._can_be_lazy = [k for k, i in enumerate(index) if i in lazy]
        specs._columns = [[column[i] for i in index] for column in self._columns[:-1]]
        specs._columns.append([lazy[i] for i in index if i in lazy])
        return specs

    def addresses(self, arrays: Sequence[Any]) -> Any:
        """See `ArraySpecs.addresses`."""
        if self._guards and self._guards.check(*arrays):
            return self._addresses(arrays)
        try:
            found = super().addresses(arrays)
        except RuntimeError:  # sparse tensors have no address
            return None
        if found is not None and self._guards is None:  # once: repeated tensors, for example, never pass
            self._guards = _guards_of(arrays)
        return found

    def read(self, arrays: Sequence[Any]) -> list[list[Any]]:
        """See `ArraySpecs.read`."""
        layout: Any = torch.Tensor.is_contiguous if self._are_contiguous else torch.Tensor.stride
        lazy = [is_lazy(arrays[i]) for i in self._can_be_lazy]
        return [[x.dtype for x in arrays], [x.shape for x in arrays], list(map(layout, arrays)), lazy]

    def _addresses(self, arrays: Sequence[Any]) -> Any:
        return np.fromiter(map(torch.Tensor.data_ptr, arrays), np.int64, len(arrays))

    def _spans(self, arrays: Sequence[Any]) -> Any:
        sizes = [x.element_size() for x in arrays]
        strides = [[size * stride for stride in x.stride()] for size, x in zip(sizes, arrays, strict=True)]
        return np.array([span(x.shape, *own) for x, *own in zip(arrays, strides, sizes, strict=True)], np.int64)


def _guards_of(tensors: Sequence[torch.Tensor]) -> Any:
    """Return what compares tensors in C++: by class, type, device, shape, strides, laziness and more; or False.

    It is what torch.compile asks whether a graph fits. Torch does not document it, so it may be missing or differ.
    """
    try:
        from torch._C._dynamo.guards import TensorGuards

        return TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
    except Exception:
        return False


# ------------------------------------------------------------------------------------------------------------ checks


def check_tensor(name: str, p: torch.Tensor) -> None:
    """Refuse a parameter without memory of its own to be written to, or whose norm is not known to this process.

    Raises
    ------
    TypeError
        For a sparse tensor, one of a subclass that is not plain memory, such as a DTensor, or another element type.
    ValueError
        If its storage was freed.
    """
    check_is_memory(f"parameter {name!r}", p)
    if is_lazy(p):
        raise TypeError(f"parameter {name!r} must not be a lazily conjugated or negated view")
    if p.numel() and not p.data_ptr() and p.device.type != "meta":
        raise ValueError(f"parameter {name!r} must have memory; its storage was freed")
    _arrays.check_parameter(name, p)


def check_gradient(name: str, g: torch.Tensor, p: torch.Tensor) -> None:
    """Refuse a gradient that does not fit its parameter."""
    check_is_memory(f"the gradient of {name!r}", g)
    _arrays.check_gradient(name, g, p)


def check_is_memory(name: str, tensor: torch.Tensor) -> None:
    """Raise TypeError for a tensor whose norm can't be taken from memory: sparse, or wrapping others."""
    if is_dtensor(tensor):
        check_placements(name, tensor)
        tensor = local(tensor)
    kind = type(tensor)
    if is_traceable_wrapper_subclass(tensor) or kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        raise TypeError(f"{name} must be a plain tensor, LARS needs its whole norm; got a {kind.__name__}")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} must be dense, LARS needs its norm; got one of {tensor.layout}")
