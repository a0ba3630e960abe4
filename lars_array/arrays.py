"""What is asked of arrays, whichever library they come from."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
from array_api_compat import array_namespace, device, is_array_api_obj, is_cupy_array, is_jax_array

from lars_array.dtypes import COMPUTE, compute_dtype, dtype_name, gradient_fits, is_half

__all__ = [
    "asarray",
    "at_home",
    "changed_in_place",
    "check_buffer",
    "check_gradient",
    "check_master",
    "check_parameter",
    "is_array",
    "is_distant",
    "listed",
    "of_dtype",
]


def is_array(x: Any) -> bool:
    """Return whether `x` is an array of a known library. NumPy's scalars are none: nothing can be written to them."""
    return is_array_api_obj(x) and not isinstance(x, np.generic)


def is_distant(x: Any) -> bool:
    """Return whether `x` lies on a device: to read a value of it is to wait for all that the device has to do."""
    if is_cupy_array(x):
        return True
    if isinstance(x, np.ndarray) or is_jax_array(x):  # JAX's arrays are not written to, nor read by anything in place
        return False
    return "cpu" not in str(device(x)).lower()


def at_home(x: Any) -> AbstractContextManager[Any]:
    """Return a context in which new arrays and launches of CuPy go where `x` lies."""
    home: AbstractContextManager[Any] = x.device if is_cupy_array(x) else nullcontext()
    return home


def asarray(values: Any, dtype: Any = None, *, like: Any, xp: Any) -> Any:
    """Return `values` as an array of `xp` that lies where the array `like` does."""
    if getattr(values, "requires_grad", False):  # torch would ask what is to become of its graph
        return xp.astype(values, values.dtype if dtype is None else dtype, copy=False)
    # A traced JAX array has no device of its own, and jit puts constants where they belong.
    return xp.asarray(values, dtype=dtype, device=None if is_jax_array(like) else device(like))


def of_dtype(x: Any, dtype: Any, xp: Any) -> Any:
    """Return `x`, an array or what NumPy has made of one of shape (), as an array of `dtype`."""
    return xp.asarray(x, dtype=dtype) if isinstance(x, np.generic) else xp.astype(x, dtype, copy=False)


def listed(x: Any) -> list[float]:
    """Return the numbers in an array of shape (size,), waiting for them if need be."""
    return [float(y) for y in (x.tolist() if hasattr(x, "tolist") else map(x.__getitem__, range(x.shape[0])))]


def changed_in_place(name: str, dtype: Any, shape: Any, p: Any) -> ValueError:
    """Return the error that tells of a parameter that is no longer what it was, or not where."""
    return ValueError(
        f"parameter {name!r} must keep its memory, shape and dtype; it had shape {shape!r} and dtype {dtype!r}, and "
        f"now, or elsewhere, has {p.shape!r} and {p.dtype!r}"
    )


def check_parameter(name: str, p: Any) -> None:
    """Refuse what can't be a parameter.

    Parameters
    ----------
    name : str
        The parameter's name, for messages.
    p : object
        What was given.

    Raises
    ------
    TypeError
        If it is no array, or of an element type that isn't computed on.
    """
    if not is_array(p):
        raise TypeError(f"parameter {name!r} must be an array; got {p!r}")
    if dtype_name(p.dtype) not in COMPUTE:
        raise TypeError(f"parameter {name!r} must be of one of the types {', '.join(COMPUTE)}; got {p.dtype!r}")


def check_gradient(name: str, g: Any, p: Any) -> None:
    """Refuse a gradient that does not fit its parameter.

    Parameters
    ----------
    name : str
        The parameter's name, for messages.
    g : object
        What was given.
    p : array
        The parameter.

    Raises
    ------
    TypeError
        If it is no array, one of another library, or of a dtype that doesn't fit: that of a real parameter may be any
        of the real ones that are computed on, that of a complex one is the parameter's.
    ValueError
        If it has another shape or lies on another device.
    """
    if not is_array(g):
        raise TypeError(f"the gradient of {name!r} must be an array; got {g!r}")
    if isinstance(g, np.ma.MaskedArray):
        raise TypeError(f"the gradient of {name!r} must be a plain array; got a masked one")
    if type(g) is not type(p) and array_namespace(g) is not array_namespace(p):
        raise TypeError(
            f"the gradient of {name!r} must be an array of {_library(p)}, as the parameter; got {_library(g)}"
        )
    if not gradient_fits(p.dtype, g.dtype):
        if dtype_name(p.dtype).startswith("complex"):
            raise TypeError(f"the gradient of {name!r} must have the parameter's dtype {p.dtype!r}; got {g.dtype!r}")
        real = ", ".join(x for x in COMPUTE if not x.startswith("complex"))
        raise TypeError(f"the gradient of {name!r} must be of one of the real types {real}; got {g.dtype!r}")
    if g.shape != p.shape:
        raise ValueError(
            f"the gradient of {name!r} must have the parameter's shape {tuple(p.shape)!r}; got {tuple(g.shape)!r}"
        )
    if not isinstance(p, np.ndarray) and not is_jax_array(p) and device(g) != device(p):
        raise ValueError(f"the gradient of {name!r} must be on the parameter's device {device(p)!r}; got {device(g)!r}")


def check_buffer(name: str, v: Any, p: Any, what: str = "momentum buffer") -> None:
    """Refuse a momentum buffer, or a master copy, that does not fit its parameter.

    Parameters
    ----------
    name : str
        The parameter's name, for messages.
    v : object
        What was given.
    p : array
        The parameter.
    what : str
        What it is, for messages.

    Raises
    ------
    TypeError
        If it is no array of the parameter's library, or not of the type that is computed in.
    ValueError
        If it has another shape.
    """
    xp = array_namespace(p)
    if not is_array(v) or array_namespace(v) is not xp:
        raise TypeError(f"the {what} of {name!r} must be an array of {_library(p)}; got {type(v).__name__}")
    if v.dtype != compute_dtype(p, xp):
        raise TypeError(f"the {what} of {name!r} must have dtype {compute_dtype(p, xp)!r}; got {v.dtype!r}")
    if v.shape != p.shape:
        shapes = f"{tuple(p.shape)!r}; got {tuple(v.shape)!r}"
        raise ValueError(f"the {what} of {name!r} must have the parameter's shape {shapes}")


def check_master(name: str, master: Any, p: Any) -> None:
    """Refuse a master copy that does not fit its parameter.

    Parameters
    ----------
    name : str
        The parameter's name, for messages.
    master : object
        What was given.
    p : array
        The parameter.

    Raises
    ------
    TypeError, ValueError
        As for `check_buffer`, or if the parameter is not of half precision.
    """
    if not is_half(p):
        raise ValueError(f"parameter {name!r} must be of half precision to have a master copy; got {p.dtype!r}")
    check_buffer(name, master, p, "master copy")


def _library(x: Any) -> str:
    return type(x).__module__.split(".")[0]
