"""What is asked of an array of JAX before it is looked into: that it has values, and where they are."""

from __future__ import annotations

from functools import cache
from typing import Any

import jax

__all__ = ["check_has_values", "cuda_device", "devices_of", "first_cpu", "is_cuda"]


def check_has_values(what: str, array: Any) -> None:
    """Refuse an array that is traced or deleted.

    Parameters
    ----------
    what : str
        What it is called in messages.
    array : object
        Of JAX, or anything else, which is let pass.

    Raises
    ------
    TypeError
        If it is traced.
    ValueError
        If it is deleted.
    """
    if isinstance(array, jax.core.Tracer):
        raise TypeError(f"{what} must be an array with values, which a traced one has not; under jit use lars_jax.lars")
    if isinstance(array, jax.Array) and array.is_deleted():
        raise ValueError(f"{what} was deleted: it was donated to an earlier step, or to something else")


def devices_of(array: jax.Array) -> list[Any]:
    """Return the devices that an array lies on."""
    return sorted(array.devices(), key=lambda device: device.id)


@cache
def first_cpu() -> Any:
    """Return the device whose memory NumPy's arrays are seen in, None where JAX was told to have none."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None


def is_cuda(device: Any) -> bool:
    """Return whether a device is one of CUDA, or of ROCm, which JAX calls alike."""
    return device.platform in ("gpu", "cuda", "rocm")


def cuda_device(number: int) -> Any:
    """Return the CUDA device that CUDA calls `number`, or the first one where there is none of that number."""
    devices = jax.local_devices(backend="gpu")
    return next((x for x in devices if x.local_hardware_id == number), devices[0])
