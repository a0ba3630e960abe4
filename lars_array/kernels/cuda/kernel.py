"""The CUDA kernel: a whole model in three launches, and nothing that the host would wait for.

CuPy is imported when the first optimizer over its arrays is made, not with this module.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import call, is_
from typing import Any
from weakref import ref

import numpy as np
from array_api_compat import is_cupy_array

from lars_array.dtypes import dtype_name
from lars_array.kernels import cuda_device, portable
from lars_array.kernels.cuda_resident import Resident
from lars_array.kernels.cuda_source import pair_name
from lars_array.kernels.cuda_table import Segment
from lars_array.kernels.layout import common_order
from lars_array.kernels.request import Request

__all__ = ["Kernel"]

# A complex number is two real ones.
_REAL = {"complex64": "float32", "complex128": "float64"}


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
        self._find_dense()
        self._captured = False  # whether any step went into a graph
        self._joined: Sequence[Sequence[int]] = []
        self._found = self._device.zeros((), np.float32)
        self._seen: list[Any] = []  # the gradients of the last step, referred to weakly
        self._layout: Any = None  # how they lay, and of what types they were
        self._out_strides: Any = self._strides  # how what was written to last in the place of the parameters lay
        nothing = [None] * len(params)
        self._arrange(self._strides, [p.dtype for p in params], self._strides, nothing, nothing)

    @staticmethod
    def unusable(params: Sequence[Any]) -> str | None:
        """Return None for CuPy arrays where there is a CUDA device, else why not."""
        strange = next((type(p).__name__ for p in params if not is_cupy_array(p)), None)
        return cuda_device.problem() if strange is None else f"it takes CuPy arrays only, not {strange}"

    @staticmethod
    def addresses(arrays: Sequence[Any]) -> Any:
        """Return where the data of arrays begin."""
        return np.array([x.data.ptr for x in arrays], np.int64)

    def is_capturing(self) -> bool:
        """Return whether what is launched goes into a graph."""
        return bool(self._device.is_capturing())

    def move(self, params: Sequence[Any]) -> None:
        """Take `params` for the parameters from now on."""
        self.params = params
        self._resident.move()
        self._portable.move([params[i] for i in self._others])
        if self._out_strides != self._strides:
            self._find_dense()
            self._layout, self._seen = None, []

    def sums(self, grads: Sequence[Any], operand: Any = None) -> Any:
        """Return what `core.sums` does."""
        self._refresh(grads)
        resident, weights = self._resident, None
        if operand is not None:
            columns = [self.xp.zeros_like(operand[0]) if x is None else x for x in operand]
            weights = self.xp.stack([x[self._layers] if self._others else x for x in columns], axis=1)
        resident.set(decides=0, clips=0, third=int(weights is not None), third_is_clipped=0, weights=weights)
        if self._layers:
            self._launch_sums()
            self._launch_coefficients()
        if not self._others:
            return resident.S
        S = self._device.zeros((len(self.params), 3), np.float64)
        S[self._layers] = resident.S[: len(self._layers)]
        mine = None if operand is None else [None if x is None else x[self._others] for x in operand]
        S[self._others] = self._portable.sums([grads[i] for i in self._others], mine)
        return S

    def apply(self, grads: Sequence[Any], C: Any, written: Any = None, out: Sequence[Any] | None = None) -> None:
        """Do what `core.apply` does for each layer, in place or to `out`, if `written` is None or true."""
        self._refresh(grads, out)
        if self._layers:
            self._resident.C[...] = C[self._layers, :] if self._others else C
            self._resident.set(decides=0, written=written)
            self._launch_apply(tells=False)
            self._resident.set(written=None)
        if self._others:
            others = None if out is None else [out[i] for i in self._others]
            self._portable.apply([grads[i] for i in self._others], C[self._others], written, others)

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
            done, where layers don't lie densely, a rule can't be put on tape, or parts of a layer are of several types.
        """
        if request.joined != self._joined:
            self._joined, self._layout, self._seen = request.joined, None, []
        self._refresh(grads, request.out)
        resident = self._resident
        if self._others or not resident.understand(request):
            return None
        found_inf = request.found_inf
        if found_inf is not None and found_inf.dtype != np.float32:
            self._found[...] = found_inf  # into memory that stays, in case this goes into a graph
            found_inf = self._found
        third = int(any(rule.norm_of != "gradient" for rule in request.rules))
        resident.set_rows(joined=True)
        resident.set(
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
        self._launch_sums()
        if request.clips:
            self._device.launch("gradient_norm", 1, resident.model)
        if request.clips and third:
            # A second look at memory: the third sum is over clipped gradients.
            resident.set(third=1, third_is_clipped=1)
            self._launch_sums()
        self._launch_coefficients()
        self._launch_apply(tells=True)
        resident.set_rows(joined=False)
        return resident.S, resident.C, resident.gamma

    def _launch_sums(self) -> None:
        for types, first, count in self._segments():
            self._device.launch(pair_name("sums", *types), max(count, 1), self._resident.model, first)

    def _launch_coefficients(self) -> None:
        blocks = -(-len(self._layers) // self._device.rows)
        self._device.launch("coefficients", blocks, self._resident.model)

    def _launch_apply(self, *, tells: bool) -> None:
        segments = self._segments()
        for number, (types, first, count) in enumerate(reversed(segments), 1):
            last = int(tells and number == len(segments))
            self._device.launch(pair_name("apply", *types), max(count, 1), self._resident.model, first, count, last)

    def _segments(self) -> list[Segment]:
        """Return what to launch for: nothing for no pieces, but once in any case."""
        segments = self._resident.table.segments
        return [segment for segment in segments if segment.pieces] or segments[:1]

    def _find_dense(self) -> None:
        self._strides = [p.strides for p in self.params]
        self._dense = [self._is_dense(i) for i in range(len(self.params))]

    def _is_dense(self, i: int, *others: Any) -> bool:
        arrays = [x for x in (self.params[i], self.buffers[i], self.masters[i], *others) if x is not None]
        return common_order(arrays) is not None

    def _refresh(self, grads: Sequence[Any], out: Sequence[Any] | None = None) -> None:
        """Have the tables speak of these gradients, and of what is written to in the place of the parameters."""
        capturing = self.is_capturing()
        self._captured = self._captured or capturing
        if capturing and out is not None:
            raise ValueError("out must be None in a step that goes into a graph: replays move nothing; got arrays")
        same = len(grads) == len(self._seen) and all(map(is_, grads, map(call, self._seen)))
        out_strides = self._out_strides if out is None else [x.strides for x in out]
        if not same or self._captured or out_strides != self._out_strides:  # else arrays of CuPy stay where they are
            self._seen = list(map(ref, grads))
            self._out_strides = out_strides
            layout = [g.strides for g in grads], [g.dtype for g in grads], out_strides
            if layout != self._layout:
                self._arrange(*layout, grads, out or [None] * len(grads))
            # A graph must bring its own addresses, or it would find those of the last step before it is replayed; and
            # where there is one, nobody here knows whose stand there now.
            self._resident.set_gradients([grads[i] for i in self._layers], always=self._captured)
        self._resident.set_out(None if out is None else [out[i] for i in self._layers])

    def _arrange(
        self, strides: Sequence[Any], dtypes: Sequence[Any], out_strides: Any, grads: Sequence[Any], out: Sequence[Any]
    ) -> None:
        """Make the tables for gradients that lie so and are of these types, and for what is written to."""
        self._layout = strides, dtypes, out_strides
        dense = self._dense
        widths = [(np.dtype(x).itemsize, p.dtype.itemsize) for x, p in zip(dtypes, self.params, strict=True)]
        if strides != self._strides or out_strides != self._strides or any(g != p for g, p in widths):
            dense = [self._is_dense(i, *others) for i, others in enumerate(zip(grads, out))]
        self._layers, self._others = ([i for i, yes in enumerate(dense) if yes is which] for which in (True, False))

        def chosen(index: Sequence[int]) -> list[list[Any]]:
            return [[x[i] for i in index] for x in (self.params, self.buffers, self.masters)]

        params, buffers, masters = chosen(self._others)
        self._portable = portable.Kernel(params, buffers, self.xp, masters)
        params, buffers, masters = chosen(self._layers)
        self._resident = Resident(
            self._device,
            params,
            buffers,
            masters,
            [p.size * (2 if dtype_name(p.dtype) in _REAL else 1) for p in params],
            [(_element(self.params[i].dtype), _element(dtypes[i])) for i in self._layers],
            joined=[] if self._others else self._joined,
        )


def _element(dtype: Any) -> str:
    name = dtype_name(dtype)
    return _REAL.get(name, name)
