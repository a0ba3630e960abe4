"""Layers of one element type as a table of addresses and sizes, over which compiled code runs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple

import numpy as np

from lars_array._arrays import dtype_name, real_dtype
from lars_array.core import RuleInputs
from lars_array.kernels.base import Gradients, KernelArrays
from lars_array.kernels.compiled.headers import addresses
from lars_array.kernels.compiled.intrinsics import at_first
from lars_array.kernels.compiled.loops import DONE, MEASURE, PIECE, WRITE, coefficients_of, work
from lars_array.kernels.compiled.tasks import ROOM_FROM, tasks
from lars_array.kernels.tape import Tape
from lars_array.kernels.threads import run_on_threads, thread_count

__all__ = ["Table", "TableCall", "coefficients", "hyper_of", "programs", "weights_of"]

SHARE = 1 << 17  # elements that make up for waking another thread

_WHAT = {"measure": MEASURE, "write": WRITE, "both": MEASURE | WRITE}

# Without coefficients to be computed.
_NO_RATES, _NO_HYPER = np.empty(0), np.empty((1, 0))
_NO_PROGRAMS = np.empty((0, 4), np.int64), np.empty((0, 4), np.int64), np.empty(0), np.empty((0, 6), np.int64)

# The integers that hold the bits of half precision.
_BITS = {"float16": np.uint16, "bfloat16": np.int16}


class TableCall(NamedTuple):
    """A call of `work` on a table with all its arguments: nothing that could fail is left to be done."""

    arguments: tuple[Any, ...]
    threads: int
    held: Any  # the arrays whose addresses are in the arguments

    def run(self) -> None:
        """Make the call on each of several threads."""
        run_on_threads(self._work, self.threads)

    def _work(self) -> None:
        work(*self.arguments)


class DtypeSignature(NamedTuple):
    """The types that `work` is compiled for: trained array, gradient, buffer, and rounded copy or None."""

    p: Any
    g: Any
    v: Any
    copy: Any


class Table:
    """Layers whose arrays are of the same types, the largest first; each is dense, in an order of its own.

    Parameters
    ----------
    arrays : KernelArrays
        The arrays of all layers of the step, which must stay where they are and alive.
    layers : sequence of int
        The layers of this table. All have a master copy or none has.
    """

    def __init__(self, arrays: KernelArrays, layers: Sequence[int]) -> None:
        own = arrays.at(layers)
        trained, copies = own.trained, own.copies
        self._held = trained, own.buffers, copies
        one, copy = trained[0], copies[0]
        width = 2 if one.dtype.kind == "c" else 1  # a complex number is two real ones
        copy_type = None if copy is None else _stored_as(copy.dtype)
        types = DtypeSignature(_stored_as(one.dtype), _stored_as(own.grads[0].dtype), real_dtype(one, np), copy_type)
        self._likes = _likes(types)
        _compile_for(types)  # now, before anything is written
        sizes = np.fromiter((width * p.size for p in trained), np.int64, len(layers))
        order = np.argsort(-sizes, kind="stable")
        self.layers, self.sizes = np.array(layers, np.int32)[order], sizes[order]
        self.places = np.zeros((len(layers), 3 if copy is None else 4), np.int64)
        for column, found in ((0, trained), (2, own.buffers), (3, copies))[: self.places.shape[1] - 1]:
            self.places[:, column] = _addresses(found)[order]
        pieces = -(-self.sizes // PIECE)
        self.left = pieces[pieces >= ROOM_FROM]
        self.offsets = np.cumsum(self.left) - self.left
        self.shared_pieces = int(self.left.sum())
        self.threads_worth = -(-int(self.sizes.sum()) // SHARE)
        self._tasks: dict[tuple[str, int], Any] = {}

    def call(
        self,
        what: str,
        grads: Gradients,
        hyper_row: Any,
        weights: Any,
        S: Any,
        C: Any,
        previous_lr: Any = _NO_RATES,
        hyper: Any = _NO_HYPER,
        programs: Any = _NO_PROGRAMS,
    ) -> TableCall:
        """Return a call of `work` for this table's layers.

        Parameters
        ----------
        what : {"measure", "write", "both"}
            The first stage and, if there are programs, the second; the third; or all of them.
        grads : Gradients
            Of all layers of the step, as all arguments are.
        hyper_row, weights, previous_lr, hyper, programs, S, C : arrays
            See `lars_array.kernels.compiled.loops`.
        """
        threads = max(1, min(thread_count(), self.threads_worth))
        task = _WHAT[what]
        if (what, threads) not in self._tasks:
            self._tasks[what, threads] = tasks(self.sizes, task, threads)
        self.places[:, 1] = grads.addresses.take(self.layers)
        arguments = (
            self._tasks[what, threads],
            np.zeros(1, np.int64),
            np.full_like(self.left, DONE) if task == WRITE else self.left.copy(),
            np.zeros(self.shared_pieces, np.int64),
            self.places,
            self.sizes,
            self.offsets,
            self.layers,
            np.zeros((self.shared_pieces, 3)),
            hyper_row,
            weights,
            previous_lr,
            hyper,
            *programs,
            S,
            C,
            *self._likes,
        )
        return TableCall(arguments, threads, (self._held, grads))


def coefficients(S: Any, hyper_row: Any, previous_lr: Any, hyper: Any, programs: Any, C: Any) -> None:
    """Write `core.coefficients` to C."""
    at_first(coefficients_of, S, hyper_row, previous_lr, hyper, *programs, C)


def hyper_of(inputs: RuleInputs) -> Any:
    """Return the inputs of tapes, of shape (rows, fields)."""
    return np.array(np.array([inputs.gamma, *inputs.hyper]).T, order="C")


def weights_of(operand: Any, rows: int) -> Any:
    """Return the weights of the third sum, of shape (rows, 3); without an operand it is the second again."""
    if operand is None:
        return _no_weights(rows)
    gamma, w, h = operand
    return np.stack([gamma, w, np.zeros_like(w) if h is None else h], axis=1)


@cache
def _no_weights(rows: int) -> Any:
    return np.tile([1.0, 0.0, 0.0], (rows, 1))


def _addresses(arrays: Sequence[Any]) -> Any:
    """Return the addresses of arrays, 0 for None."""
    present = np.fromiter((x is not None for x in arrays), bool, len(arrays))
    if present.all():
        return addresses(arrays)
    found = np.zeros(len(arrays), np.int64)
    found[present] = addresses([x for x in arrays if x is not None])
    return found


@cache
def _compile_for(types: DtypeSignature) -> None:
    """Have `work` compiled for these types, by a call on an empty table."""
    none, nowhere, nothing = np.empty(0, np.int64), np.empty(0, np.int32), np.empty((0, 3))
    arguments = (np.empty((0, 5), np.int64), np.zeros(1, np.int64), none, none, np.empty((0, 3), np.int64))
    by_row = (_no_weights(1), _NO_RATES, _NO_HYPER, *_NO_PROGRAMS)
    by_table = none, none, nowhere, nothing, nowhere
    at_first(work, *arguments, *by_table, *by_row, nothing, np.empty((0, 6)), *_likes(types))


@cache
def _likes(types: DtypeSignature) -> tuple[Any, ...]:
    """Return the last arguments of `work` for these types."""
    return tuple(None if kind is None else np.empty(0, kind) for kind in types)


def _stored_as(dtype: Any) -> Any:
    """Return the type that compiled code reads and writes: bits of half precision, the parts of complex numbers."""
    return _BITS.get(dtype_name(dtype)) or np.empty(0, dtype).real.dtype.type


@lru_cache(maxsize=64)
def programs(tapes: tuple[Tape, ...]) -> tuple[Any, Any, Any, Any]:
    """Return several tapes as compiled code takes them, one after the other.

    Parameters
    ----------
    tapes : tuple of Tape
        One a row of hyper-parameters.

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
