"""The CUDA kernel: a whole model in three launches, and nothing that the host would wait for.

CuPy is imported when the first optimizer over its arrays is made, not with this module.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import numpy as np
from array_api_compat import is_cupy_array

from lars_array.dtypes import COMPUTE, dtype_name
from lars_array.kernels import cuda_device, portable
from lars_array.kernels.cuda_source import MODEL, WORDS, pair_name
from lars_array.kernels.cuda_table import Part, Programs, Segment, Table, programs
from lars_array.kernels.layout import common_order
from lars_array.kernels.request import Request
from lars_array.tape import record

__all__ = ["Kernel"]

_DTYPE, _STRIDES = attrgetter("dtype"), attrgetter("strides")

# A complex number is two real ones.
_REAL = {"complex64": "float32", "complex128": "float64"}

# The largest number of the type that each is computed in, as lars_array.nonfinite.largest has it.
_LIMITS = {"float32": float(np.finfo(np.float32).max), "float64": float(np.finfo(np.float64).max)}


class Kernel:
    """See `lars_array.kernels`. Layers that don't lie densely in memory are left to the portable kernel."""

    TAKES = "CuPy arrays, in place, a whole model in three launches"
    Device: Any = cuda_device.Device

    def __init__(
        self, params: Sequence[Any], buffers: Sequence[Any], xp: Any, masters: Sequence[Any] | None = None
    ) -> None:
        self.params, self.buffers, self.xp = params, buffers, xp
        self.masters: Sequence[Any] = [None] * len(params) if masters is None else masters
        self._device = self.Device.on(params[0])
        self._strides = [(p.strides, p.dtype) for p in params]
        self._own_types = [_element(p) for p in params]
        self._dense = [self._is_dense(i) for i in range(len(params))]
        self._all_alike: Any = None  # strides and types of gradients that were looked at last
        self._seen: list[Any] = []  # those gradients
        self._places: Any = None  # and their addresses
        self._cached = int(os.environ.get("LARS_ARRAY_CUDA_CACHE") or 0)
        self._model = np.zeros(1, MODEL)
        self._joined: Sequence[Sequence[int]] = []
        self._sized: Any = None
        self._asked: Any = None
        self._layers: list[int] = []
        self._others: list[int] = []
        self._arrange([p.dtype for p in params], self._dense)

    @staticmethod
    def unusable(params: Sequence[Any]) -> str | None:
        """Return None for CuPy arrays where there is a CUDA device, else why not."""
        strange = next((type(p).__name__ for p in params if not is_cupy_array(p)), None)
        return cuda_device.problem() if strange is None else f"it takes CuPy arrays only, not {strange}"

    @staticmethod
    def addresses(arrays: Sequence[Any]) -> Any:
        """Return where the data of arrays begin."""
        return np.array([x.data.ptr for x in arrays], np.int64)

    def sums(self, grads: Sequence[Any], operand: Any = None) -> Any:
        """Return what `core.sums` does."""
        self._refresh(grads)
        weights = None
        if operand is not None:
            columns = [self.xp.zeros_like(operand[0]) if x is None else x for x in operand]
            weights = self.xp.stack([x[self._layers] if self._others else x for x in columns], axis=1)
        self._set(decides=0, clips=0, third=int(weights is not None), third_is_clipped=0, weights=weights)
        if self._layers:
            self._launch_sums(self._whole)
            self._launch_coefficients(self._whole)
        if not self._others:
            return self._S
        S = self._device.zeros((len(self.params), 3), np.float64)
        S[self._layers] = self._S[: len(self._layers)]
        mine = None if operand is None else [None if x is None else x[self._others] for x in operand]
        S[self._others] = self._portable.sums([grads[i] for i in self._others], mine)
        return S

    def apply(self, grads: Sequence[Any], C: Any, written: Any = None) -> None:
        """Do what `core.apply` does for each layer, in place, if `written` is None or true."""
        self._refresh(grads)
        if self._layers:
            self._C[...] = C[self._layers, :] if self._others else C
            self._set(decides=0, written=written)
            self._launch_apply(self._whole, last=False)
            self._set(written=None)
        if self._others:
            self._portable.apply([grads[i] for i in self._others], C[self._others], written)

    def enqueue(self, grads: Sequence[Any], request: Request) -> tuple[Any, Any, Any] | None:
        """Have the device take a step, if it finds that it may.

        Parameters
        ----------
        grads : sequence of arrays
            One a layer.
        request : Request
            All else.

        Returns
        -------
        tuple (S, C, gamma) or None
            Sums, coefficients and gradient factors, arrays that the next step writes to again. None, and nothing was
            done, where layers don't lie densely, or a rule can't be put on tape.
        """
        if request.joined != self._joined:
            self._joined, self._sized, self._all_alike, self._seen = request.joined, None, None, []
        self._refresh(grads)
        if self._others or self._table.joined_rows is None or not self._understand(request):
            return None
        found_inf = request.found_inf
        if found_inf is not None and found_inf.dtype != np.float32:
            self._found[...] = found_inf  # into memory that stays, in case this goes into a graph
            found_inf = self._found
        third = int(any(rule.norm_of != "gradient" for rule in request.rules))
        self._set(
            rows=self._held["joined_rows"],
            hyper=request.hyper,
            first=request.first,
            previous_lr=request.previous_lr,
            counts=request.counts,
            found_inf=found_inf,
            weights=None,
            decides=1,
            clips=int(request.clips),
            third=0 if request.clips else third,
            third_is_clipped=0,
        )
        in_parts = set(request.policies) == {"propagate"} and not request.clips
        parts = self._parts if in_parts else [self._whole]
        for number, part in enumerate(parts, 1):
            self._launch_sums(part)
            if request.clips:
                self._device.launch("gradient_norm", 1, self._model)
            if request.clips and third:
                # A second look at memory: the third sum is over clipped gradients.
                self._set(third=1, third_is_clipped=1)
                self._launch_sums(part)
            self._launch_coefficients(part)
            self._launch_apply(part, last=number == len(parts))
        self._set(rows=self._held["rows"])
        return self._S, self._C, self._gamma

    # ------------------------------------------------------------------------------------------------------- launches

    def _launch_sums(self, part: Part) -> None:
        for types, first, count in self._segments_of(part):
            self._device.launch(pair_name("sums", *types), max(count, 1), self._model, first)

    def _launch_coefficients(self, part: Part) -> None:
        blocks = -(-(part.last_row - part.first_row) // self._device.rows)
        self._device.launch("coefficients", blocks, self._model, part.first_row, part.last_row)

    def _launch_apply(self, part: Part, *, last: bool) -> None:
        segments = self._segments_of(part)
        for number, (types, first, count) in enumerate(reversed(segments), 1):
            final = int(last and number == len(segments))
            self._device.launch(pair_name("apply", *types), max(count, 1), self._model, first, count, final)

    def _segments_of(self, part: Part) -> list[Segment]:
        """Return what to launch for: nothing for no pieces, but once in any case."""
        segments = self._table.segments
        if part is not self._whole:
            return [Segment(segments[0].types, part.first, part.pieces)]
        return [segment for segment in segments if segment.pieces] or segments[:1]

    # --------------------------------------------------------------------------------------------------------- tables

    def _is_dense(self, i: int, g: Any = None) -> bool:
        arrays = [x for x in (self.params[i], g, self.buffers[i], self.masters[i]) if x is not None]
        return common_order(arrays) is not None

    def _refresh(self, grads: Sequence[Any]) -> None:
        """Have the tables speak of these gradients."""
        same = len(grads) == len(self._seen) and all(map(_is, grads, self._seen))
        if same and not self._device.is_capturing():
            return  # arrays of CuPy stay where they are
        self._seen = [*grads]
        looks = [(g.strides, g.dtype) for g in grads]
        if looks != self._all_alike:
            dense = self._dense
            if [strides for strides, _ in looks] != [strides for strides, _ in self._strides]:
                dense = [self._is_dense(i, g) for i, g in enumerate(grads)]
            self._arrange([g.dtype for g in grads], dense)
            self._all_alike = looks
        mine = [grads[i] for i in self._order]
        places = self._device.addresses(mine)
        # A graph must bring its own addresses, or it would find those of the last step before it is replayed.
        if self._device.is_capturing() or not np.array_equal(places, self._places):
            self._poke(places)

    def _poke(self, places: Any) -> None:
        self._places = places
        words = np.zeros(1, WORDS)
        room = words["at"].shape[1]
        address = self._device.addresses([self._grads])[0]
        for first in range(0, len(places), room):
            some = places[first : first + room]
            words["first"], words["count"] = first, len(some)
            words["at"][0, : len(some)] = some
            self._device.launch("poke", 1, address, words)

    def _arrange(self, gradient_types: Sequence[Any], dense: Sequence[bool]) -> None:
        """Make the tables anew: other types of gradients, or others that lie densely."""
        elements = [(own, _element_of(dtype)) for own, dtype in zip(self._own_types, gradient_types, strict=True)]
        if (elements, dense) == self._sized:
            return
        self._sized = elements, dense
        self._layers = [i for i, yes in enumerate(dense) if yes]
        self._others = [i for i, yes in enumerate(dense) if not yes]
        given = self.params, self.buffers, self.masters
        params, buffers, masters = ([x[i] for i in self._others] for x in given)
        self._portable = portable.Kernel(params, buffers, self.xp, masters)
        rows = max(len(self._layers), 1)
        device = self._device
        places = np.zeros((len(self._layers), 3), np.uint64)
        for column, arrays in enumerate((self.params, self.buffers, self.masters)):
            there = [row for row, i in enumerate(self._layers) if arrays[i] is not None]
            places[there, column] = device.addresses([arrays[self._layers[row]] for row in there])
        sizes = np.array(
            [self.params[i].size * (2 if _is_complex(self.params[i]) else 1) for i in self._layers], np.int64
        )
        types = [elements[i] for i in self._layers]
        limits = [_LIMITS[COMPUTE[p_type]] for p_type, _ in types]
        narrowed = [g_type == "float64" and COMPUTE[p_type] == "float32" for p_type, g_type in types]
        most = [limit**2 if concerned else np.inf for limit, concerned in zip(limits, narrowed)]
        joined = [] if self._others else self._joined
        self._table = table = Table(sizes, places, types, limits, most, joined)
        self._order = [self._layers[k] for k in table.order.tolist()]
        self._whole = Part(0, len(self._layers), 0, len(table.pieces))
        width = sum(np.dtype(_WIDTHS[kind]).itemsize for kind in types[0]) if types else 0
        self._parts = table.parts(self._cached, width)
        if len(self._parts) == 1:
            self._parts = [self._whole]
        device.prepare({segment.types for segment in table.segments})

        self._S, self._C = device.zeros((rows, 3), np.float64), device.zeros((rows, 6), np.float64)
        self._gamma = device.zeros(rows, np.float64)
        self._grads = device.zeros(rows, np.uint64)
        self._places = None
        self._verdict = device.zeros(2, np.int32)
        self._found = device.zeros((), np.float32)
        self._held = {
            "arrays": device.put(_filled(table.arrays)),
            "pieces": device.put(_filled(table.pieces)),
            "partial": device.zeros((max(len(table.pieces), 1), 3), np.float64),
            "norm": device.zeros(1, np.float64),
            "grads": self._grads,
            "S": self._S,
            "C": self._C,
            "gamma": self._gamma,
            "bad": self._verdict[:1],
            "refusing": self._verdict[1:],
        }
        self._model[...] = np.zeros(1, MODEL)
        self._set(**self._held, row_count=len(self._layers), piece_count=len(table.pieces))
        self._asked = None
        self._put_rows([0] * rows, [0] * rows, [False] * rows)

    def _put_rows(self, group_of: Sequence[int], place: Sequence[int], keeps: Sequence[bool]) -> None:
        for name in ("rows", "joined_rows"):
            rows = getattr(self._table, name)
            if rows is None:
                continue
            if len(rows):
                rows["group"], rows["place"], rows["keeps"] = group_of, place, keeps
            self._held[name] = self._device.put(_filled(rows))
        self._set(rows=self._held["rows"])

    def _understand(self, request: Request) -> bool:
        """Put rules and policies on the device, if they are not there, and return whether that could be done."""
        of_layers = request.group_of, request.place, request.keeps
        of_groups = [(id(rule.function), rule.norm_of) for rule in request.rules], [*request.policies]
        if self._asked is not None and self._asked[1] == of_groups and all(map(_is, self._asked[0], of_layers)):
            return self._programs is not None
        tapes = [record(rule) for rule in request.rules]
        self._programs: Programs | None = programs(request.rules, tapes, request.policies)
        self._asked = of_layers, of_groups, [*request.rules]
        if self._programs is None:
            return False
        self._put_rows(*of_layers)
        for name, table in zip(("groups", "operations", "constants"), self._programs, strict=True):
            self._held[name] = self._device.put(_filled(table))
        self._set(**{name: self._held[name] for name in ("groups", "operations", "constants")})
        return True

    def _set(self, **fields: Any) -> None:
        """Set fields of the model: numbers, or arrays by their address; None is 0."""
        pointers = {name: x for name, x in fields.items() if not (x is None or isinstance(x, int))}
        addresses = dict(zip(pointers, self._device.addresses(list(pointers.values())), strict=True))
        for name, value in fields.items():
            self._model[name] = addresses.get(name, 0 if value is None else value)


_WIDTHS = {"float64": "f8", "float32": "f4", "float16": "f2", "bfloat16": "u2"}


def _element_of(dtype: Any) -> str:
    name = dtype_name(dtype)
    return _REAL.get(name, name)


def _element(x: Any) -> str:
    return _element_of(x.dtype)


def _is_complex(x: Any) -> bool:
    return dtype_name(x.dtype) in _REAL


def _is(a: Any, b: Any) -> bool:
    return a is b


def _filled(table: Any) -> Any:
    """Return a table that is not empty: there must be an address."""
    return table if table.size else np.zeros((1, *table.shape[1:]), table.dtype)
