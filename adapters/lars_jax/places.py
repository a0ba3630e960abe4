"""Where parameters lie, and all that depends on it: whose memory it is, and how arrays come in and go out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import jax

from lars_jax.cuda import CudaPlace
from lars_jax.host import HostPlace
from lars_jax.values import check_has_values, devices_of, first_cpu, is_cuda

__all__ = ["Place", "place_of"]


class Place(Protocol):
    """The parameters of one optimizer, as arrays of JAX outside and as arrays that can be written to inside.

    Attributes
    ----------
    memory : list of arrays
        The parameters, for `lars_array.LARS`: of NumPy, or of CuPy.
    knows : bool
        Whether it is known here, when a step returns, if it was taken.
    """

    memory: list[Any]
    knows: bool

    def here(self) -> AbstractContextManager[Any]:
        """Return a context in which all that follows is done."""

    def check(self, what: str, array: Any) -> None:
        """Refuse an array of JAX or NumPy that does not lie here; `what` it is called in messages."""

    def begin(self, given: Sequence[Any]) -> tuple[list[Any], bool]:
        """Let nobody see the memory, so that it may be written to.

        Parameters
        ----------
        given : sequence of arrays or None
            Gradients, or new parameters; checked.

        Returns
        -------
        tuple (views, moved)
            Arrays of the library of `memory` that are seen without a copy until `end`, None for None; and whether
            `memory` holds other arrays now.
        """

    def refill(self, arrays: Sequence[Any]) -> bool:
        """Write other numbers to the memory, and return whether it is elsewhere now; `end` is to follow."""

    def numbers(self, groups: Sequence[dict[str, Any]], found_inf: Any) -> AbstractContextManager[Any]:
        """Return a context in which numbers on the device are arrays of the library; it yields `found_inf`."""

    def end(self) -> list[Any]:
        """Return the parameters as they are now, arrays of JAX."""

    def outside(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Return a state dict with arrays of NumPy."""

    def inside(self, state: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
        """Return the state of each parameter with arrays of the library of `memory`."""


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
        return HostPlace(leaves, donate)
    return CudaPlace(home[1], names, leaves, donate)
