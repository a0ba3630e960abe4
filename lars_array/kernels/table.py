"""Layers of one element type as a table of addresses and sizes, which compiled code walks over."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple

import numpy as np

from lars_array.buffers import Rows
from lars_array.core import Prepared
from lars_array.dtypes import dtype_name, real_dtype
from lars_array.kernels.headers import addresses
from lars_array.kernels.helpers import together
from lars_array.kernels.intrinsics import at_first
from lars_array.kernels.machine import DONE, MEASURE, PIECE, WRITE, coefficients_of, work
from lars_array.kernels.tasks import ROOM_FROM, tasks
from lars_array.kernels.threads import thread_count
from lars_array.tape import Tape

__all__ = ["Seen", "Table", "Walk", "coefficients", "hyper_of", "programs"]

# Elements that make up for waking another thread.
SHARE = 1 << 17

# No coefficients are asked for.
_NO_HYPER = np.empty((1, 0))
_NO_PROGRAMS = np.empty((0, 4), np.int64), np.empty((0, 4), np.int64), np.empty(0), np.empty((0, 6), np.int64)

# What holds the bits of numbers that are computed on as others.
_BITS = {"float16": np.uint16, "bfloat16": np.int16}


class Walk(NamedTuple):
    """A walk over a table, ready to go: nothing that could fail is left to be done.

    Parameters
    ----------
    arguments : tuple
        Those of `lars_array.kernels.machine.work`.
    threads : int
        How many threads it is worth.
    held : object
        The arrays, whose addresses are in the arguments.
    """

    arguments: tuple[Any, ...]
    threads: int
    held: Any

    def go(self) -> None:
        """Do it, on several threads."""
        together(self._work, self.threads)

    def _work(self) -> None:
        work(*self.arguments)


class Types(NamedTuple):
    """What compiled code is specialised for.

    Parameters
    ----------
    p, g, v, copy : types
        Of what is trained, gradients, buffers, and of what the result is written to as well; the last may be None.
    moves : bool or None
        True where the result is written to the last alone. None rather than False, which has no type of its own.
    """

    p: Any
    g: Any
    v: Any
    copy: Any
    moves: bool | None = None


class Table:
    """Layers whose arrays are of the same types, the largest first.

    Parameters
    ----------
    params, buffers, copies : sequences of ndarray
        Those of all layers of the step: what is trained, momentum, and what the rounding of the first is written to.
        The latter two may be None. They must stay where they are, but for a `move`.
    g_dtype : dtype
        That of their gradients.
    layers : sequence of int
        Which of them are in the table: they lie densely, each in an order of its own. All have a copy or none has.
    """

    def __init__(
        self, params: Sequence[Any], buffers: Sequence[Any], copies: Sequence[Any], g_dtype: Any, layers: Sequence[int]
    ) -> None:
        one, copy = params[layers[0]], copies[layers[0]]
        width = 2 if one.dtype.kind == "c" else 1  # a complex number is two real ones
        copy_type = None if copy is None else _stored_as(copy.dtype)
        self.types = Types(_stored_as(one.dtype), _stored_as(g_dtype), real_dtype(one, np), copy_type)
        _compile_for(self.types)  # now, before anything is written
        sizes = np.fromiter((width * params[i].size for i in layers), np.int64, len(layers))
        order = np.argsort(-sizes, kind="stable")
        self.layers, self.sizes = np.array(layers, np.int32)[order], sizes[order]
        self.held = params, buffers, copies
        self.places = np.zeros((len(layers), 3 if copy is None else 4), np.int64)
        for column, arrays in ((0, params), (2, buffers), (3, copies))[: self.places.shape[1] - 1]:
            self.places[:, column] = _places(arrays)[self.layers]
        pieces = -(-self.sizes // PIECE)
        self.left = pieces[pieces >= ROOM_FROM]
        self.offsets = np.cumsum(self.left) - self.left
        self.shared_pieces = int(self.left.sum())
        self.threads_worth = -(-int(self.sizes.sum()) // SHARE)
        self._out: Any = None  # where lies what the last walk has written to instead of in place
        self._tasks: dict[tuple[int, int], Any] = {}

    def move(self, params: Sequence[Any], copies: Sequence[Any]) -> None:
        """Take these for the parameters, or for what masters are rounded to, from now on: `out` of a walk before."""
        self.held = params, self.held[1], copies
        self.places[:, 0 if self.types.copy is None else 3] = self._out

    def sums(self, grads: Any, operand: Any, S: Any) -> Walk:
        """Return the way to `core.sums` of this table's layers.

        Parameters
        ----------
        grads : Seen
            The gradients of all layers, as all arguments here are of all layers.
        operand : tuple or None
            As for `core.sums`.
        S : array of shape (layers, 3)
            Where the sums are added.
        """
        weights, kind_of = _no_weights(1), np.zeros(len(S), np.int32)
        if operand is not None:
            weights, kind_of = _weights(*operand), np.arange(len(S), dtype=np.int32)
        return self._walk(MEASURE, grads, kind_of, weights, _NO_HYPER, *_NO_PROGRAMS, S, np.empty((len(S), 0)))

    def apply(self, grads: Any, C: Any) -> Walk:
        """Return the way to `core.apply` of this table's layers, in place or to where `grads` says; see `sums`."""
        kind_of, no_sums = np.zeros(len(C), np.int32), np.empty((len(C), 0))
        C = np.ascontiguousarray(C)
        return self._walk(WRITE, grads, kind_of, _no_weights(1), _NO_HYPER, *_NO_PROGRAMS, no_sums, C)

    def take(
        self, grads: Any, prepared: Prepared, kind_of: Any, hyper: Any, programs: Any, S: Any, C: Any, *, write: bool
    ) -> Walk:
        """Return the way to S and C of this table's layers, and to the step; see `lars_array.kernels.compiled`."""
        weights = _no_weights(len(prepared.gamma)) if prepared.operand is None else _weights(*prepared.operand)
        what = MEASURE | WRITE if write else MEASURE
        return self._walk(what, grads, kind_of, weights, hyper, *programs, S, C)

    def _walk(self, what: int, grads: Any, *by_layer: Any) -> Walk:
        threads = max(1, min(thread_count(), self.threads_worth))
        if (what, threads) not in self._tasks:
            self._tasks[what, threads] = tasks(self.sizes, what, threads)
        self.places[:, 1] = grads.places.take(self.layers)
        places, types = self.places, self.types
        if what & WRITE and grads.out is not None:
            self._out = grads.out[self.layers]
            places = np.column_stack([places[:, :3], self._out])
            if types.copy is None:  # masters stay where they are
                types = types._replace(copy=types.p, moves=True)
                _compile_for(types)
        arguments = (
            self._tasks[what, threads],
            np.zeros(1, np.int64),
            np.full_like(self.left, DONE) if what == WRITE else self.left.copy(),
            np.zeros(self.shared_pieces, np.int64),
            places,
            self.sizes,
            self.offsets,
            self.layers,
            np.zeros((self.shared_pieces, 3)),
            *by_layer,
            *_likes(types),
        )
        return Walk(arguments, threads, (self.held, grads.held))


def coefficients(S: Any, kind_of: Any, hyper: Any, programs: Any, C: Any) -> None:
    """Do what `core.coefficients` does, into C."""
    at_first(coefficients_of, S, kind_of, hyper, *programs, C)


def hyper_of(prepared: Prepared) -> Any:
    """Return what tapes start from, of shape (kinds, fields)."""
    return np.array(np.array([prepared.gamma, *prepared.hyper]).T, order="C")


class Seen(NamedTuple):
    """Where the data of gradients begin, and of what is written to if not in place, else None; and these arrays."""

    places: Any
    out: Any
    held: Any


def _places(arrays: Sequence[Any]) -> Any:
    """Return where the data of arrays begin, 0 for None."""
    if isinstance(arrays, Rows):
        return arrays.places(addresses)
    there = [i for i, x in enumerate(arrays) if x is not None]
    places = np.zeros(len(arrays), np.int64)
    places[there] = addresses([arrays[i] for i in there])
    return places


@cache
def _compile_for(types: Types) -> None:
    """Have `work` compiled for these types, by a walk over nothing."""
    none, nowhere, nothing = np.empty(0, np.int64), np.empty(0, np.int32), np.empty((0, 3))
    by_kind = (_no_weights(1), _NO_HYPER, *_NO_PROGRAMS)
    places = np.empty((0, 3), np.int64)
    counters = np.zeros(1, np.int64), none, none
    arguments = (np.empty((0, 5), np.int64), *counters, places, none, none, nowhere, nothing, nowhere, *by_kind)
    at_first(work, *arguments, nothing, np.empty((0, 6)), *_likes(types))


@cache
def _likes(types: Types) -> tuple[Any, ...]:
    """Return arguments of `lars_array.kernels.machine.work` of these types."""
    return *(None if kind is None else np.empty(0, kind) for kind in types[:4]), types.moves


def _stored_as(dtype: Any) -> Any:
    """Return the type that compiled code reads and writes: bits of half precision, the parts of complex numbers."""
    return _BITS.get(dtype_name(dtype)) or np.empty(0, dtype).real.dtype.type


@cache
def _no_weights(kinds: int) -> Any:
    """Return weights with which the third sum is the second again."""
    return np.tile([1.0, 0.0, 0.0], (kinds, 1))


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
