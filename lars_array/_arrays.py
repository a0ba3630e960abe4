"""Arrays of any library: element types, devices, layouts, and the checks that every array has to pass."""

from __future__ import annotations

import copy
import ctypes
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
from array_api_compat import array_namespace, device, is_array_api_obj, is_cupy_array, is_jax_array, is_torch_array

from lars_array._messages import shown

__all__ = [
    "COMPUTE",
    "ArraySpecs",
    "accumulation_dtype",
    "array_at",
    "asarray",
    "changed_in_place",
    "check_buffer",
    "check_gradient",
    "check_master",
    "check_parameter",
    "compute_dtype",
    "device_context",
    "dtype_name",
    "gradient_fits",
    "is_array",
    "is_half",
    "is_on_accelerator",
    "of_dtype",
    "real_dtype",
    "real_parts",
    "span",
    "synchronize",
    "to_floats",
]

# Accepted element type -> the type its arithmetic and its momentum buffer are in. A table of names, because `isdtype`
# and `finfo` of several namespaces fail on float16 and bfloat16.
COMPUTE = {
    "float64": "float64",
    "float32": "float32",
    "float16": "float32",
    "bfloat16": "float32",
    "complex128": "complex128",
    "complex64": "complex64",
}

# The type of the real and imaginary parts of a complex type.
_REAL = {"complex128": "float64", "complex64": "float32"}

# NumPy takes microseconds to name a dtype.
_names: dict[tuple[type, Any], str] = {}


# ----------------------------------------------------------------------------------------------------- element types


def dtype_name(dtype: Any) -> str:
    """Return the name that `dtype` has in every namespace, such as "float32"."""
    key = type(dtype), dtype  # dtypes of two libraries can't be compared
    if key not in _names:
        _names[key] = str(getattr(dtype, "name", dtype)).rsplit(".", 1)[-1]
    return _names[key]


def form_of(dtype: Any, shape: Sequence[int]) -> Any:
    """Return a NumPy array of a type and shape that takes no memory: for checks, in the place of another array."""
    return np.broadcast_to(np.zeros((), dtype), tuple(shape))


def compute_dtype(x: Any, xp: Any) -> Any:
    """Return the dtype of `xp` in which arithmetic on `x` is done: float32 for half precision, else its own."""
    return getattr(xp, COMPUTE[dtype_name(x.dtype)])


def real_dtype(x: Any, xp: Any) -> Any:
    """Return the dtype of `xp` of the coefficients for `x`: the real type of its arithmetic."""
    name = COMPUTE[dtype_name(x.dtype)]
    return getattr(xp, _REAL.get(name, name))


def is_half(x: Any) -> bool:
    """Return whether `x` is of half precision: computed in a wider type than it is stored in."""
    name = dtype_name(x.dtype)
    return COMPUTE[name] != name


def gradient_fits(p_dtype: Any, g_dtype: Any) -> bool:
    """Return whether a gradient may have `g_dtype` where its parameter has `p_dtype`: both real, or the same."""
    if p_dtype == g_dtype:
        return True
    names = dtype_name(p_dtype), dtype_name(g_dtype)
    return all(name in COMPUTE and not name.startswith("complex") for name in names)


def accumulation_dtype(xp: Any) -> Any:
    """Return float64, or float32 where the namespace has no wider type (JAX without x64)."""
    info = getattr(xp, "__array_namespace_info__", None)  # NumPy 2.0 has none
    return xp.float64 if info is None or "float64" in info().dtypes(kind="real floating") else xp.float32


def real_parts(x: Any, dtype: Any, xp: Any) -> list[Any]:
    """Return `x` as real arrays of type `dtype`: itself, or its real and imaginary part."""
    parts = [xp.real(x), xp.imag(x)] if dtype_name(x.dtype).startswith("complex") else [x]
    return [xp.astype(part, dtype, copy=False) for part in parts]


# ------------------------------------------------------------------------------------------------ libraries, devices


def is_array(x: Any) -> bool:
    """Return whether `x` is an array of a known library; NumPy's scalars, which can't be written to, are none."""
    return is_array_api_obj(x) and not isinstance(x, np.generic)


def is_on_accelerator(x: Any) -> bool:
    """Return whether `x` lies on a device whose values can only be read by waiting for it."""
    if is_cupy_array(x):
        return True
    if isinstance(x, np.ndarray) or is_jax_array(x):  # JAX arrays are immutable: no kernel updates them asynchronously
        return False
    return "cpu" not in str(device(x)).lower()


def device_context(x: Any) -> AbstractContextManager[Any]:
    """Return a context in which CuPy allocates and launches on the device of `x`."""
    context: AbstractContextManager[Any] = x.device if is_cupy_array(x) else nullcontext()
    return context


def synchronize(x: Any) -> None:
    """Wait for all streams of the device of `x`."""
    if is_cupy_array(x):
        x.device.synchronize()
    elif is_torch_array(x) and x.device.type == "cuda":
        import torch

        torch.cuda.synchronize(x.device)


def asarray(values: Any, dtype: Any = None, *, like: Any, xp: Any) -> Any:
    """Return `values` as an array of `xp` on the device of the array `like`."""
    if getattr(values, "requires_grad", False):  # torch warns of a copy that would leave the graph
        return xp.astype(values, values.dtype if dtype is None else dtype, copy=False)
    # A traced JAX array has no device of its own, and jit puts constants where they belong.
    return xp.asarray(values, dtype=dtype, device=None if is_jax_array(like) else device(like))


def of_dtype(x: Any, dtype: Any, xp: Any) -> Any:
    """Return `x`, an array or a NumPy scalar (an array of shape () after arithmetic), as an array of `dtype`."""
    return xp.asarray(x, dtype=dtype) if isinstance(x, np.generic) else xp.astype(x, dtype, copy=False)


def to_floats(x: Any) -> list[float]:
    """Return the numbers in an array of shape (size,); waits for its device."""
    return [float(y) for y in (x.tolist() if hasattr(x, "tolist") else map(x.__getitem__, range(x.shape[0])))]


# ------------------------------------------------------------------------------------------------ memory and layouts

# All memory as one buffer: an array on it has no owner, and takes a quarter of a microsecond to make.
_FIRST = 1  # since no address is 0
_MEMORY = memoryview((ctypes.c_byte * (sys.maxsize - _FIRST)).from_address(_FIRST))
_READ_ONLY = _MEMORY.toreadonly()


def array_at(address: int, shape: Any, dtype: Any, strides: Any = None, *, write: bool = False) -> Any:
    """Return a NumPy array on memory that it does not keep alive; the caller does."""
    if 0 in shape:
        return np.empty(shape, dtype)
    return np.ndarray(shape, dtype, _MEMORY if write else _READ_ONLY, address - _FIRST, strides)


class ArraySpecs:
    """Types and layouts of many arrays, compared with those of other arrays at each step.

    Parameters
    ----------
    arrays : sequence of arrays
        Of one library.

    Attributes
    ----------
    spans : int64 array of shape (arrays, 2), or None
        First byte of each array and the one after its last, relative to its address. None where addresses are unknown.
    """

    def __init__(self, arrays: Sequence[Any]) -> None:
        self._types = list(map(type, arrays))
        self._columns = self.read(arrays)
        self.spans = self._spans(arrays)

    def addresses(self, arrays: Sequence[Any]) -> Any:
        """Return the addresses of `arrays`, 0 where unknown; None if one of them has another type or layout."""
        if list(map(type, arrays)) != self._types or self.read(arrays) != self._columns:
            return None
        return self._addresses(arrays)

    def are_unchanged(self, arrays: Sequence[Any]) -> bool:
        """Return whether these arrays, the objects given to `__init__`, still have their memory and layout."""
        # All else of CuPy's arrays is read-only, and strides follow from the shape that is set.
        return is_cupy_array(arrays[0]) and [x.shape for x in arrays] == self._columns[1]

    def at(self, index: Sequence[int]) -> ArraySpecs:
        """Return the types and layouts of some of the arrays."""
        specs = copy.copy(self)
        specs._types = [self._types[i] for i in index]
        specs._columns = [[column[i] for i in index] for column in self._columns]
        specs.spans = None if self.spans is None else self.spans[index]
        return specs

    def form(self, i: int) -> tuple[Any, Any]:
        """Return dtype and shape of an array."""
        return self._columns[0][i], self._columns[1][i]

    def same(self, i: int, array: Any) -> bool:
        """Return whether an array has the type and layout of the one at `i`."""
        return type(array) is self._types[i] and self.read([array]) == [[column[i]] for column in self._columns]

    def read(self, arrays: Sequence[Any]) -> list[list[Any]]:
        """Return dtypes, shapes, and all else that layouts are compared by."""
        columns: list[list[Any]] = [[x.dtype for x in arrays], [x.shape for x in arrays]]
        if isinstance(arrays[0], np.ndarray):
            return [*columns, [x.strides for x in arrays], [x.flags.num for x in arrays]]
        if is_cupy_array(arrays[0]):
            return [*columns, [x.strides for x in arrays], [x.data.device_id for x in arrays]]
        return [*columns, list(map(device, arrays))]

    def _addresses(self, arrays: Sequence[Any]) -> Any:
        if isinstance(arrays[0], np.ndarray):
            return np.array([x.__array_interface__["data"][0] for x in arrays], np.int64)
        if is_cupy_array(arrays[0]):
            return np.array([x.data.ptr for x in arrays], np.int64)
        return np.zeros(len(arrays), np.int64)

    def _spans(self, arrays: Sequence[Any]) -> Any:
        if not (isinstance(arrays[0], np.ndarray) or is_cupy_array(arrays[0])):
            return None
        return np.array([span(x.shape, x.strides, x.itemsize) for x in arrays], np.int64)


def span(shape: Sequence[int], strides: Sequence[int], itemsize: int) -> tuple[int, int]:
    """Return the first byte of an array and the one after its last, relative to its address."""
    if 0 in shape:
        return 0, 0
    reach = [stride * (length - 1) for stride, length in zip(strides, shape, strict=True)]
    return sum(x for x in reach if x < 0), sum(x for x in reach if x > 0) + itemsize


# ------------------------------------------------------------------------------------------------------------ checks


def changed_in_place(name: str, dtype: Any, shape: Any, p: Any) -> ValueError:
    """Return the error for a parameter whose owner has changed its memory, shape or dtype in place."""
    return ValueError(
        f"parameter {shown(name)} was modified in place: expected shape {shown(shape)} and dtype {shown(dtype)} "
        f"at its original address; found {shown(p.shape)} and {shown(p.dtype)}"
    )


def check_parameter(name: str, p: Any) -> None:
    """Raise TypeError unless `p` is an array of a type that can be computed in."""
    if not is_array(p):
        is_tree = isinstance(p, Mapping) and any(is_array(x) or isinstance(x, Mapping) for x in p.values())
        way = "; trees of arrays are for lars_jax" if is_tree else ""
        raise TypeError(f"parameter {shown(name)} must be an array; got {shown(p)}{way}")
    if dtype_name(p.dtype) not in COMPUTE:
        raise TypeError(
            f"parameter {shown(name)} must be of one of the types {', '.join(COMPUTE)}; got {shown(p.dtype)}"
        )


def check_gradient(name: str, g: Any, p: Any) -> None:
    """Raise TypeError or ValueError unless `g` has the library, shape and device of `p` and a type that fits."""
    if not is_array(g):
        raise TypeError(f"the gradient of {shown(name)} must be an array; got {shown(g)}")
    if isinstance(g, np.ma.MaskedArray):
        raise TypeError(f"the gradient of {shown(name)} must be a plain array; got a masked one")
    if type(g) is not type(p) and array_namespace(g) is not array_namespace(p):
        raise TypeError(
            f"the gradient of {shown(name)} must be an array of {_library(p)}, as the parameter; got {_library(g)}"
        )
    if not gradient_fits(p.dtype, g.dtype):
        if dtype_name(p.dtype).startswith("complex"):
            raise TypeError(
                f"the gradient of {shown(name)} must have the parameter's dtype {shown(p.dtype)}; got {shown(g.dtype)}"
            )
        real = ", ".join(x for x in COMPUTE if not x.startswith("complex"))
        raise TypeError(f"the gradient of {shown(name)} must be of one of the real types {real}; got {shown(g.dtype)}")
    if g.shape != p.shape:
        shapes = f"{shown(tuple(p.shape))}; got {shown(tuple(g.shape))}"
        raise ValueError(f"the gradient of {shown(name)} must have the parameter's shape {shapes}")
    if not isinstance(p, np.ndarray) and not is_jax_array(p) and device(g) != device(p):
        devices = f"{shown(device(p))}; got {shown(device(g))}"
        raise ValueError(f"the gradient of {shown(name)} must be on the parameter's device {devices}")


def check_buffer(name: str, v: Any, p: Any, kind: str = "momentum buffer") -> None:
    """Raise TypeError or ValueError unless `v` has the library and shape of `p` and the type it is computed in."""
    xp = np if type(p) is np.ndarray else array_namespace(p)  # which takes microseconds
    if type(v) is not type(p) and (not is_array(v) or array_namespace(v) is not array_namespace(p)):
        raise TypeError(f"the {kind} of {shown(name)} must be an array of {_library(p)}; got {type(v).__name__}")
    if v.dtype != compute_dtype(p, xp):
        wanted = xp.zeros(0, dtype=compute_dtype(p, xp)).dtype  # NumPy's is a class, printed otherwise
        raise TypeError(f"the {kind} of {shown(name)} must have dtype {shown(wanted)}; got {shown(v.dtype)}")
    if v.shape != p.shape:
        shapes = f"{shown(tuple(p.shape))}; got {shown(tuple(v.shape))}"
        raise ValueError(f"the {kind} of {shown(name)} must have the parameter's shape {shapes}")


def check_master(name: str, master: Any, p: Any) -> None:
    """Raise as `check_buffer` does, and ValueError for a parameter that is not of half precision."""
    if not is_half(p):
        raise ValueError(
            f"parameter {shown(name)} must be of half precision to have a master copy; got {shown(p.dtype)}"
        )
    check_buffer(name, master, p, "master copy")


def _library(x: Any) -> str:
    return type(x).__module__.split(".")[0]
