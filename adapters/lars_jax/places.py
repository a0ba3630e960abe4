"""Which place parameters have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from lars_jax.cuda import CudaPlace
from lars_jax.host import HostPlace
from lars_jax.place import Place
from lars_jax.values import check_has_values, devices_of, first_cpu, is_cuda

__all__ = ["place_of"]


def place_of(names: Sequence[str], leaves: Sequence[Any], donate: bool) -> Place:
    """Return the place of parameters, which are copied.

    Parameters
    ----------
    names : sequence of str
        For messages.
    leaves : sequence of arrays
        Of JAX, on one device; or of NumPy, which go where the others are.
    donate : bool
        As for `LARS`.

    Raises
    ------
    TypeError
        If they lie on several devices, or on one of another kind.
    ImportError
        If they lie on a CUDA device and CuPy is not installed.
    """
    home = None
    for name, leaf in zip(names, leaves):
        check_has_values(f"parameter {name!r}", leaf)
        if not isinstance(leaf, jax.Array):
            continue
        found = devices_of(leaf)
        if len(found) > 1 or not (found[0] == first_cpu() or is_cuda(found[0])):
            raise TypeError(
                f"parameter {name!r} must lie on the first CPU device or on one CUDA device, else use lars_jax.lars; "
                f"got {', '.join(map(str, found))}"
            )
        if home is not None and found[0] != home[1]:
            raise TypeError(
                f"parameters must lie on one device, else use lars_jax.lars; {home[0]!r} lies on {home[1]} and "
                f"{name!r} on {found[0]}"
            )
        home = name, found[0]
    if home is None or not is_cuda(home[1]):
        return HostPlace(first_cpu(), names, leaves, donate)
    return CudaPlace(home[1], names, leaves, donate)
