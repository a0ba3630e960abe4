"""What lies on the device for the CUDA kernels: the tables of a model, and room for what they compute."""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_
from typing import Any

import numpy as np

from lars_array.dtypes import COMPUTE
from lars_array.kernels.cuda_addresses import Addresses
from lars_array.kernels.cuda_source import MODEL
from lars_array.kernels.cuda_table import Table, programs
from lars_array.kernels.request import Request
from lars_array.tape import record

__all__ = ["Resident"]

# The largest number of the type that each is computed in, as lars_array.nonfinite.largest has it.
_LIMITS = {"float32": float(np.finfo(np.float32).max), "float64": float(np.finfo(np.float64).max)}


class Resident:
    """Tables on a device, and the structure of their addresses that every launch is given.

    Parameters
    ----------
    device : Device
        See `lars_array.kernels.cuda_device`.
    params, buffers, masters : sequences of arrays
        One entry a layer; the last two may be None.
    sizes : sequence of int
        Real numbers in each.
    types : sequence of tuple (str, str)
        Element types of parameters and gradient of each.
    joined : sequence of sequences of int
        Those that are one layer, see `lars_array.rows`.

    Attributes
    ----------
    table : Table
        What the host knows of it.
    model : structured array of one element
        What is launched with.
    S, C, gamma : arrays of shape (layers, 3), (layers, 6) and (layers,)
        What the last launches have computed.
    """

    def __init__(
        self,
        device: Any,
        params: Sequence[Any],
        buffers: Sequence[Any],
        masters: Sequence[Any],
        sizes: Sequence[int],
        types: Sequence[tuple[str, str]],
        *,
        joined: Sequence[Sequence[int]],
    ) -> None:
        self._device = device
        places = np.zeros((len(params), 2), np.uint64)
        for column, arrays in enumerate((buffers, masters)):
            there = [i for i, x in enumerate(arrays) if x is not None]
            places[there, column] = device.addresses([arrays[i] for i in there])
        limits = [_LIMITS[COMPUTE[p_type]] for p_type, _ in types]
        narrowed = [g_type == "float64" and COMPUTE[p_type] == "float32" for p_type, g_type in types]
        most = [limit**2 if concerned else np.inf for limit, concerned in zip(limits, narrowed)]
        self.table = table = Table(np.array(sizes, np.int64), places, types, limits, most, joined)
        device.prepare({segment.types for segment in table.segments})

        rows = max(len(params), 1)
        self.S, self.C = device.zeros((rows, 3), np.float64), device.zeros((rows, 6), np.float64)
        self.gamma = device.zeros(rows, np.float64)
        self._params = Addresses(device, device.addresses([params[i] for i in table.order.tolist()]))
        self._grads, self._out = (Addresses(device, np.zeros(len(params), np.uint64)) for _ in range(2))
        verdict = device.zeros(2, np.int32)
        self._held = {
            "arrays": device.put(_filled(table.arrays)),
            "pieces": device.put(_filled(table.pieces)),
            "partial": device.zeros((max(len(table.pieces), 1), 3), np.float64),
            "norm": device.zeros(1, np.float64),
            "params": self._params.table,
            "grads": self._grads.table,
            "S": self.S,
            "C": self.C,
            "gamma": self.gamma,
            "bad": verdict[:1],
            "refusing": verdict[1:],
        }
        self.model = np.zeros(1, MODEL)
        self.set(**self._held, row_count=len(params), piece_count=len(table.pieces))
        self._asked: Any = None
        self._understood = False
        self._put_rows([0] * len(params), [0] * len(params), [False] * len(params))

    def set(self, **fields: Any) -> None:
        """Set fields of `model`: numbers, or arrays by their address; None is 0."""
        pointers = {name: x for name, x in fields.items() if not (x is None or isinstance(x, int))}
        addresses = dict(zip(pointers, self._device.addresses(list(pointers.values())), strict=True))
        for name, value in fields.items():
            self.model[name] = addresses.get(name, 0 if value is None else value)

    def set_rows(self, *, joined: bool) -> None:
        """Have layers of several arrays measured as one, or each array by itself."""
        self.set(rows=self._held["joined_rows" if joined else "rows"])

    def set_gradients(self, grads: Sequence[Any], *, always: bool) -> None:
        """Have gradients read where these are; `always` bring their addresses to the device, or if they are others."""
        self._grads.put(self._addresses(grads), always=always)

    def set_out(self, out: Sequence[Any] | None) -> None:
        """Have parameters written to these arrays, or in place."""
        if out is not None:
            self._out.put(self._addresses(out))
        self.set(out=None if out is None else self._out.table)

    def move(self) -> None:
        """Take for the parameters what they were written to last.

        So of steps that go back and forth between the same arrays no address has to be brought to the device.
        """
        self._params, self._out = self._out, self._params
        self.set(params=self._params.table, out=None)

    def _addresses(self, arrays: Sequence[Any]) -> Any:
        return self._device.addresses([arrays[i] for i in self.table.order.tolist()])

    def understand(self, request: Request) -> bool:
        """Put rules, policies and groups on the device, if they are not there, and return whether that can be done."""
        if self.table.joined_rows is None:
            return False
        of_layers = request.group_of, request.place, request.keeps
        of_groups = [(id(rule.function), rule.norm_of) for rule in request.rules], [*request.policies]
        if self._asked is not None and self._asked[1] == of_groups and all(map(is_, self._asked[0], of_layers)):
            return self._understood
        found = programs(request.rules, [record(rule) for rule in request.rules], request.policies)
        self._understood = found is not None
        self._asked = of_layers, of_groups, [*request.rules]
        if found is not None:
            self._put_rows(*of_layers)
            for name, table in zip(("groups", "operations", "constants"), found, strict=True):
                self._held[name] = self._device.put(_filled(table))
                self.set(**{name: self._held[name]})
        return self._understood

    def _put_rows(self, group_of: Sequence[int], place: Sequence[int], keeps: Sequence[bool]) -> None:
        for name in ("rows", "joined_rows"):
            rows = getattr(self.table, name)
            if rows is not None:
                rows["group"], rows["place"], rows["keeps"] = group_of, place, keeps
                self._held[name] = self._device.put(_filled(rows))
        self.set_rows(joined=False)


def _filled(table: Any) -> Any:
    """Return a table that is not empty: there must be an address."""
    return table if table.size else np.zeros((1, *table.shape[1:]), table.dtype)
