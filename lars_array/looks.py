"""What arrays look like: to be asked, at every step, whether those of this one look as others did."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Look", "Looks"]


class Look(NamedTuple):
    """What is asked of an array, of NumPy or CuPy, beside where it begins. Many arrays look the same."""

    kind: type
    dtype: Any
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    nbytes: int
    dense: bool
    writeable: bool
    aligned: bool
    device: Any

    @classmethod
    def of(cls, x: Any) -> Look:
        """Return how an array looks."""
        flags, near = x.flags, isinstance(x, np.ndarray)
        own = (flags.writeable, flags.aligned, None) if near else (True, True, x.device)
        return cls(type(x), x.dtype, x.shape, x.strides, x.nbytes, flags.forc, *own)


class Looks:
    """How many arrays look, as a number for each.

    Parameters
    ----------
    arrays : sequence of arrays
        Of NumPy or of CuPy.
    addresses : callable
        ``addresses(arrays) -> int64 array`` of where their data begin.

    Attributes
    ----------
    known : list of Look
        Each once, but that dtypes which are equal can be several objects.
    which : int32 array of shape (arrays,)
        The index of each array's there.
    nbytes : int64 array of shape (looks,)
        How long an array of each look is.
    """

    def __init__(self, arrays: Sequence[Any], addresses: Callable[[Sequence[Any]], Any]) -> None:
        self._addresses = addresses
        known: dict[tuple[int, Look], int] = {}
        looks = ((id(look.dtype), look) for look in map(Look.of, arrays))
        self.which = np.fromiter((known.setdefault(look, len(known)) for look in looks), np.int32, len(arrays))
        self.known = [look for _, look in known]
        self.nbytes = np.array([look.nbytes for look in self.known], np.int64)

    def places(self, arrays: Sequence[Any]) -> Any:
        """Return where the data of arrays begin, or None if there is one that does not look as was noted."""
        if not {look.kind for look in self.known}.issuperset(map(type, arrays)):
            return None
        now = Looks(arrays, self._addresses)
        same = now.known == self.known and np.array_equal(now.which, self.which)
        return self._addresses(arrays) if same else None

    def dtypes(self) -> list[Any]:
        """Return the dtype of each array."""
        kinds = [look.dtype for look in self.known]
        return [kinds[k] for k in self.which.tolist()]
