"""A table of addresses on a device, which the host writes without waiting for it."""

from __future__ import annotations

from typing import Any

import numpy as np

from lars_array.kernels.cuda_source import WORDS

__all__ = ["Addresses"]


class Addresses:
    """Where some arrays begin, as the device is told.

    Parameters
    ----------
    device : Device
        See `lars_array.kernels.cuda_device`.
    places : uint64 array of shape (arrays,)
        What stands there at first.

    Attributes
    ----------
    table : uint64 array of shape (arrays,)
        On the device; of shape (1,) for no arrays, since there must be an address.
    """

    def __init__(self, device: Any, places: Any) -> None:
        self._device, self._known = device, places
        self.table = device.put(places if places.size else np.zeros(1, np.uint64))

    def put(self, places: Any, *, always: bool = False) -> None:
        """Bring addresses to the device, if they are others than stand there.

        They travel as arguments of launches: nothing is waited for, and no memory of the host is read later.
        """
        if not always and np.array_equal(places, self._known):
            return
        self._known = places
        words = np.zeros(1, WORDS)
        room = words["at"].shape[1]
        (address,) = self._device.addresses([self.table])
        for first in range(0, len(places), room):
            some = places[first : first + room]
            words["first"], words["count"] = first, len(some)
            words["at"][0, : len(some)] = some
            self._device.launch("poke", 1, address, words)
