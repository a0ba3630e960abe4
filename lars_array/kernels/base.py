"""The arrays that kernels work on, their layouts, and the kernel that combines a fast one with its fallback."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Gradients", "KernelArrays", "MixedKernel", "Writing", "common_order", "make_kernel"]


class KernelArrays(NamedTuple):
    """The arrays of the rows of a step; momentum buffers and master copies may be None."""

    params: Sequence[Any]
    grads: Sequence[Any]  # for their types and layouts; those of each step are passed to the kernel's methods
    buffers: Sequence[Any]
    masters: Sequence[Any]

    def at(self, index: Sequence[int]) -> KernelArrays:
        """Return the arrays of some rows, in ascending order."""
        return self if len(index) == len(self.params) else KernelArrays(*([x[i] for i in index] for x in self))

    @property
    def trained(self) -> list[Any]:
        """The master copy of each row, else its parameter: the array that is stepped."""
        return [p if master is None else master for p, master in zip(self.params, self.masters, strict=True)]

    @property
    def copies(self) -> list[Any]:
        """The parameter of each row that has a master copy, to which that is rounded, else None."""
        return [None if master is None else p for p, master in zip(self.params, self.masters, strict=True)]


class Gradients:
    """The gradients of one step, by row.

    Parameters
    ----------
    addresses : int64 array of shape (rows,), or None
        The address of each, where it is known.
    arrays : callable
        Returns the gradients as arrays; it is called by kernels that need more than the addresses.
    """

    def __init__(self, addresses: Any, arrays: Callable[[], Sequence[Any]]) -> None:
        self.addresses, self._arrays = addresses, arrays

    @cached_property
    def arrays(self) -> Sequence[Any]:
        """The gradients as arrays."""
        return self._arrays()

    def at(self, index: Sequence[int]) -> Gradients:
        """Return the gradients of some rows."""
        addresses = None if self.addresses is None else self.addresses[index]
        return Gradients(addresses, lambda: [self.arrays[i] for i in index])


class Writing:
    """The third stage of a kernel in one call."""

    def apply(self, grads: Gradients, C: Any, taken: Any = None) -> None:
        """Write the results of `core.apply` in place, where `taken`, a bool array of shape (), is None or true."""
        self.writer(grads, C, taken)()

    def writer(self, grads: Gradients, C: Any, taken: Any = None) -> Callable[[], None]:
        """Return a call that does what `apply` does: it allocates no arrays, for which memory could run out halfway."""
        raise NotImplementedError


def make_kernel(kernel_type: Any, arrays: KernelArrays, xp: Any) -> Any:
    """Return a kernel for these arrays: of the type given where they are dense, of its fallback where they aren't."""
    fallback = kernel_type.fallback()
    if fallback is None:
        return kernel_type(arrays, xp)
    dense = [_is_dense(*row) for row in zip(*arrays, strict=True)]
    if all(dense):
        return kernel_type(arrays, xp)
    if not any(dense):
        return fallback(arrays, xp)
    return MixedKernel(kernel_type, fallback, arrays, dense, xp)


class MixedKernel(Writing):
    """A fast kernel for rows that are dense in memory, and its fallback for the others."""

    def __init__(self, fast: Any, fallback: Any, arrays: KernelArrays, dense: Sequence[bool], xp: Any) -> None:
        self._xp, self._like, self._count = xp, arrays.params[0], len(dense)
        parts = [[i for i, yes in enumerate(dense) if yes is kind] for kind in (True, False)]
        self._parts = [(i, kind(arrays.at(i), xp)) for i, kind in zip(parts, (fast, fallback), strict=True)]
        self.is_capturing = getattr(self._parts[0][1], "is_capturing", bool)

    def sums(self, grads: Gradients, operand: Any = None) -> Any:
        """Return `core.sums`."""
        S = None
        for index, kernel in self._parts:
            mine = None if operand is None else [None if x is None else x[index] for x in operand]
            part = kernel.sums(grads.at(index), mine)
            S = self._xp.zeros((self._count, 3), dtype=part.dtype) if S is None else S
            S[index] = part
        return S

    def writer(self, grads: Gradients, C: Any, taken: Any = None) -> Callable[[], None]:
        """See `Writing`."""
        writers = [kernel.writer(grads.at(index), C[index, :], taken) for index, kernel in self._parts]

        def write() -> None:
            for writer in writers:
                writer()

        return write


def _is_dense(*arrays: Any) -> bool:
    arrays = tuple(x for x in arrays if x is not None)
    if isinstance(arrays[0], np.ndarray) and not all(x.flags.aligned and x.dtype.isnative for x in arrays):
        return False
    return common_order(arrays) is not None


def common_order(arrays: Sequence[Any]) -> Sequence[int] | None:
    """Return the order of the axes in which all arrays, of one shape, are contiguous; None if there is none."""
    if all(a.flags.c_contiguous for a in arrays):
        return range(arrays[0].ndim)
    axes = sorted(range(arrays[0].ndim), key=arrays[0].strides.__getitem__, reverse=True)
    return axes if all(a.transpose(axes).flags.c_contiguous for a in arrays) else None
