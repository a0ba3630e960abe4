"""Checks that JAX arrays have values, and the devices that they lie on."""

from __future__ import annotations

from functools import cache
from typing import Any

import jax

__all__ = ["check_has_values", "cuda_device", "devices_of", "first_cpu", "is_cuda"]


def check_has_values(what: str, array: Any) -> None:
    """Raise TypeError for an array without values, ValueError for a deleted one; `what` is its name in messages."""
    if isinstance(array, jax.core.Tracer | jax.ShapeDtypeStruct):
        kind = "an abstract" if isinstance(array, jax.ShapeDtypeStruct) else "a traced"
        raise TypeError(f"{what} must have a value, which {kind} array has not; under jit use lars_jax.lars")
    if isinstance(array, jax.Array) and array.is_deleted():
        raise ValueError(f"{what} was deleted: it was donated to an earlier step, or to something else")


def devices_of(array: jax.Array) -> list[Any]:
    """Return the devices that an array lies on."""
    return sorted(array.devices(), key=lambda device: device.id)


@cache
def first_cpu() -> Any:
    """Return the device whose memory NumPy can view, None if JAX was configured without it."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None


def is_cuda(device: Any) -> bool:
    """Return whether a device is a GPU of CUDA or of ROCm, which JAX does not distinguish by platform."""
    return device.platform in ("gpu", "cuda", "rocm")


def cuda_device(number: int) -> Any:
    """Return the GPU with a number of CUDA's, or the first one if there is none."""
    devices = jax.local_devices(backend="gpu")
    return next((x for x in devices if x.local_hardware_id == number), devices[0])
