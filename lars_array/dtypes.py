"""Which element types are accepted, and in which type each is computed on.

A table of names, because `isdtype` and `finfo` of several namespaces fail on float16 and bfloat16.
"""

from __future__ import annotations

from typing import Any

__all__ = [
    "COMPUTE",
    "accumulation_dtype",
    "compute_dtype",
    "dtype_name",
    "gradient_fits",
    "is_half",
    "real_dtype",
    "real_parts",
]

# Accepted element type -> the type its arithmetic and its momentum buffer are in.
COMPUTE = {
    "float64": "float64",
    "float32": "float32",
    "float16": "float32",
    "bfloat16": "float32",
    "complex128": "complex128",
    "complex64": "complex64",
}

# The type of the real numbers in an array that is computed on in a given type.
_REAL = {"complex128": "float64", "complex64": "float32"}

# NumPy takes microseconds to name a dtype.
_names: dict[tuple[type, Any], str] = {}


def dtype_name(dtype: Any) -> str:
    """Return the name that `dtype` has in every namespace, "float32" say."""
    key = type(dtype), dtype  # dtypes of two libraries are not to be compared
    if key not in _names:
        _names[key] = str(getattr(dtype, "name", dtype)).rsplit(".", 1)[-1]
    return _names[key]


def compute_dtype(x: Any, xp: Any) -> Any:
    """Return the dtype of `xp` in which arithmetic on `x` is done: float32 for half precision, else its own."""
    return getattr(xp, COMPUTE[dtype_name(x.dtype)])


def real_dtype(x: Any, xp: Any) -> Any:
    """Return the dtype of `xp` in which the coefficients for `x` are: that of its real numbers as computed on."""
    name = COMPUTE[dtype_name(x.dtype)]
    return getattr(xp, _REAL.get(name, name))


def is_half(x: Any) -> bool:
    """Return whether `x` is of half precision: computed on in a wider type than it is stored in."""
    name = dtype_name(x.dtype)
    return COMPUTE[name] != name


def gradient_fits(p_dtype: Any, g_dtype: Any) -> bool:
    """Return whether a gradient may have `g_dtype` where its parameter has `p_dtype`: both are real, or the same."""
    if p_dtype == g_dtype:
        return True
    names = dtype_name(p_dtype), dtype_name(g_dtype)
    return all(name in COMPUTE and not name.startswith("complex") for name in names)


def accumulation_dtype(xp: Any) -> Any:
    """Return float64, or float32 where the namespace has no wider type (JAX without x64)."""
    return xp.float64 if "float64" in xp.__array_namespace_info__().dtypes(kind="real floating") else xp.float32


def real_parts(x: Any, dtype: Any, xp: Any) -> list[Any]:
    """Return `x` as real arrays of type `dtype`: itself, or its real and imaginary part."""
    parts = [xp.real(x), xp.imag(x)] if dtype_name(x.dtype).startswith("complex") else [x]
    return [xp.astype(part, dtype, copy=False) for part in parts]
