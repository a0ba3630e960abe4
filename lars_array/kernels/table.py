"""Layers of one element type as a table of addresses and sizes, which compiled code walks over."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from lars_array.core import Prepared
from lars_array.kernels.machine import DONE, MEASURE, PIECE, WRITE, data_of, work
from lars_array.kernels.tasks import ROOM_FROM, tasks
from lars_array.kernels.threads import thread_count, together
from lars_array.tape import Tape

__all__ = ["Table", "addresses", "can_hold", "programs"]

# Elements that make up for waking another thread.
SHARE = 1 << 17

# The third sum is the second again, and no coefficients are asked for.
_NO_WEIGHTS = np.array([[1.0, 0.0, 0.0]])
_NO_PROGRAMS = np.empty((0, 4), np.int64), np.empty((0, 4), np.int64), np.empty(0), np.empty((0, 6), np.int64)

# How p and v are seen by compiled code, and how many of its elements one of p is.
_STORAGE = {
    "float64": (np.float64, np.float64, 1),
    "float32": (np.float32, np.float32, 1),
    "float16": (np.uint16, np.float32, 1),
    "bfloat16": (np.int16, np.float32, 1),
    "complex128": (np.float64, np.float64, 2),
    "complex64": (np.float32, np.float32, 2),
}


def addresses(arrays: Sequence[Any]) -> Any:
    """Return where the data of arrays begin."""
    return data_of(_ids(arrays)[:, None], object.__basicsize__)[:, 0]


def _ids(arrays: Sequence[Any]) -> Any:
    return np.fromiter(map(id, arrays), np.int64, len(arrays))


def can_hold(p: Any) -> bool:
    """Return whether the elements of `p` can be in a table: not if their bytes are in foreign order."""
    return p.dtype.isnative and p.dtype.name in _STORAGE


class Table:
    """Layers of one element type, the largest first.

    Parameters
    ----------
    params, buffers : sequences of ndarray
        Those of all layers of the step; a buffer may be None.
    layers : sequence of int
        Which of them are in the table: they lie densely, each in an order of its own.
    """

    def __init__(self, params: Sequence[Any], buffers: Sequence[Any], layers: Sequence[int]) -> None:
        p_type, v_type, width = _STORAGE[params[layers[0]].dtype.name]
        self.likes = np.empty(0, p_type), np.empty(0, v_type)
        self.layers = sorted(layers, key=lambda i: -params[i].size)
        self.sizes = np.array([width * params[i].size for i in self.layers], np.int64)
        self.ids = np.array([[id(params[i]), 0, id(buffers[i])] for i in self.layers], np.int64)
        self.ids[[buffers[i] is None for i in self.layers], 2] = 0
        self.left = -(-self.sizes // PIECE)
        shared = np.where(self.left >= ROOM_FROM, self.left, 0)
        self.offsets = np.cumsum(shared) - shared
        self.partial_shape = int(shared.sum()), 3
        self.threads_worth = -(-int(self.sizes.sum()) // SHARE)
        self._tasks: dict[tuple[int, int], Any] = {}

    def sums(self, grads: Sequence[Any], operand: Any) -> Any:
        """Return `core.sums` of this table's layers; the arguments are those of all layers."""
        weights, kind_of = _NO_WEIGHTS, np.zeros(len(self.layers), np.int64)
        if operand is not None:
            weights, kind_of = _weights(*operand)[self.layers], np.arange(len(self.layers))
        S, C = np.zeros((len(self.layers), 3)), np.empty((0, 6))
        self._run(MEASURE, grads, S, C, kind_of, weights, np.empty((1, 0)), *_NO_PROGRAMS)
        return S

    def apply(self, grads: Sequence[Any], C: Any) -> None:
        """Do `core.apply` for this table's layers; the arguments are those of all layers."""
        kind_of = np.zeros(len(self.layers), np.int64)
        S, C = np.empty((0, 3)), C[self.layers]
        self._run(WRITE, grads, S, C, kind_of, _NO_WEIGHTS, np.empty((1, 0)), *_NO_PROGRAMS)

    def take(
        self, grads: Sequence[Any], prepared: Prepared, kind_of: Any, programs: Any, *, write: bool
    ) -> tuple[Any, Any]:
        """Return S and C of this table's layers, see `lars_array.kernels.compiled`."""
        S, C = np.zeros((len(self.layers), 3)), np.empty((len(self.layers), 6))
        gamma, hyper = prepared.gamma, prepared.hyper
        weights = _weights(gamma, 0 * gamma, None) if prepared.operand is None else _weights(*prepared.operand)
        given = np.stack([gamma, *hyper], axis=1)
        what = MEASURE | WRITE if write else MEASURE
        self._run(what, grads, S, C, kind_of[self.layers], weights, given, *programs)
        return S, C

    def _run(self, what: int, grads: Sequence[Any], S: Any, C: Any, kind_of: Any, *known: Any) -> None:
        threads = max(1, min(thread_count(), self.threads_worth))
        if (what, threads) not in self._tasks:
            self._tasks[what, threads] = tasks(self.sizes.tolist(), what, threads)
        self.ids[:, 1] = _ids([grads[i] for i in self.layers])
        arguments = (
            self._tasks[what, threads],
            np.zeros(1, np.int64),
            np.full_like(self.left, DONE) if what == WRITE else self.left.copy(),
            data_of(self.ids, object.__basicsize__),
            self.sizes,
            self.offsets,
            np.zeros(self.partial_shape),
            kind_of,
            *known,
            S,
            C,
            *self.likes,
        )
        together(lambda: work(*arguments), threads)


def _weights(gamma: Any, w: Any, h: Any) -> Any:
    return np.stack([gamma, w, np.zeros_like(w) if h is None else h], axis=1)


@lru_cache(maxsize=64)
def programs(tapes: tuple[Tape, ...]) -> tuple[Any, Any, Any, Any]:
    """Return several tapes as compiled code takes them, one after the other.

    Parameters
    ----------
    tapes : tuple of Tape
        One a kind of layers.

    Returns
    -------
    tuple of arrays
        Where the operations of each begin and end, and its constants, of shape (tapes, 4); then all operations, all
        constants, and all outputs.
    """
    operations = np.cumsum([0, *(len(tape.operations) for tape in tapes)])
    constants = np.cumsum([0, *(len(tape.constants) for tape in tapes)])
    extents = np.stack([operations[:-1], operations[1:], constants[:-1], constants[1:]], axis=1)
    return (
        extents,
        np.concatenate([tape.operations for tape in tapes]),
        np.concatenate([tape.constants for tape in tapes]),
        np.stack([tape.outputs for tape in tapes]),
    )
