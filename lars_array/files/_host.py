"""Arrays of any library as NumPy arrays, and back."""

from __future__ import annotations

from typing import Any

import numpy as np
from array_api_compat import array_namespace, is_cupy_array, is_jax_array, is_torch_array

from lars_array._arrays import asarray, device_context, dtype_name, form_of
from lars_array._messages import shown

__all__ = ["TYPES", "dtype_of", "numpy_form", "to_host", "write_into"]

TYPES = (
    *("float64", "float32", "float16", "bfloat16", "complex64", "complex128", "bool"),
    *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)),
)


def dtype_of(name: Any) -> Any:
    """Return the NumPy dtype of a name in `TYPES`."""
    if not isinstance(name, str) or name not in TYPES:
        raise ValueError(f"types of arrays are {', '.join(TYPES)}; got {shown(name)}")
    if name == "bfloat16":
        try:
            import ml_dtypes
        except ImportError as error:
            raise ModuleNotFoundError("bfloat16 needs ml_dtypes: pip install ml-dtypes", name="ml_dtypes") from error
        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def numpy_form(x: Any) -> Any:
    """Return `form_of` an array of any library."""
    return form_of(dtype_of(dtype_name(x.dtype)), x.shape)


def to_host(x: Any) -> Any:
    """Return an array as a NumPy array that lies row by row in native byte order: itself, where it is one."""
    if is_cupy_array(x):
        with device_context(x):
            x = x.get()
    elif is_torch_array(x):
        x = x.detach().cpu().resolve_conj().resolve_neg()
        is_bfloat16 = str(x.dtype) == "torch.bfloat16"  # which torch gives to nobody
        x = _from_bits(x.contiguous().view(array_namespace(x).int16).numpy()) if is_bfloat16 else x.numpy()
    elif not isinstance(x, np.ndarray | np.generic) and not is_jax_array(x):
        x = np.from_dlpack(x)
    x = np.asarray(x)
    return np.asarray(x, x.dtype.newbyteorder("="), order="C")


def write_into(p: Any, x: Any) -> None:
    """Write a NumPy array into an array of any library, of the same shape and type."""
    if isinstance(p, np.ndarray):
        p[...] = x
        return
    with device_context(p):
        xp = array_namespace(p)
        if is_torch_array(p) and x.dtype.name == "bfloat16":
            x = xp.asarray(x.view(np.int16)).view(xp.bfloat16)
        p[...] = asarray(x, like=p, xp=xp)


def _from_bits(x: Any) -> Any:
    return x.view(dtype_of("bfloat16"))
