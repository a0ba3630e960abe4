"""Layers of one element type as a table of addresses and sizes, over which compiled code runs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import cache, lru_cache, partial
from typing import Any

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

__all__ = ["Table", "coefficients", "compile_coefficients", "hyper_of", "inputs_for_sums", "programs", "weights_of"]

SHARE = 1 << 17  # elements that make up for waking another thread
LAYERS = 1 << 11  # layers whose coefficients do so

_WHAT = {"measure": MEASURE, "write": WRITE, "both": MEASURE | WRITE}

# Inputs and tapes of a call that computes no coefficients.
_NO_HYPER = np.empty(0), np.empty((1, 0))
_NO_TAPES = np.empty((0, 4), np.int64), np.empty((0, 4), np.int64), np.empty(0), np.empty((0, 6), np.int64)

# The integers that hold the bits of half precision.
_BITS = {"float16": np.uint16, "bfloat16": np.int16}


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
        self._held: Any = trained, own.buffers, copies
        one, copy = trained[0], copies[0]
        width = 2 if one.dtype.kind == "c" else 1  # a complex number is two real ones
        copy_type = None if copy is None else _stored_as(copy.dtype)
        types = _stored_as(one.dtype), _stored_as(own.grads[0].dtype), real_dtype(one, np), copy_type
        self._likes = _likes(*types)  # compiled now, before anything is written
        sizes = np.fromiter((width * p.size for p in trained), np.int64, len(layers))
        order = np.argsort(-sizes, kind="stable")
        self.layers, self.sizes = np.array(layers, np.int32)[order], sizes[order]
        self.places = np.zeros((len(layers), 3 if copy is None else 4), np.int64)
        for column, found in ((0, trained), (2, own.buffers), (3, copies))[: self.places.shape[1] - 1]:
            self.places[:, column] = _addresses(found)[order]
        self._plan()

    def _plan(self) -> None:
        """Share out the layers."""
        pieces = -(-self.sizes // PIECE)
        self.left = pieces[pieces >= ROOM_FROM]
        self.offsets = np.cumsum(self.left) - self.left
        self.shared_pieces = int(self.left.sum())
        self.threads_worth = -(-int(self.sizes.sum()) // SHARE)
        self._tasks: dict[tuple[str, int], Any] = {}

    def moved(self, held: Any, places: Any) -> Table:
        """Return this table for arrays that lie elsewhere; see `Kernel.moved`."""
        table = copy.copy(self)
        params, buffers, masters = places[:, self.layers]
        found = (masters, params) if self.places.shape[1] > 3 else (params,)
        unused = self.places[:, 2] == 0
        table._held, table.places = held, np.zeros_like(self.places)
        table.places[:, 0], table.places[:, 2] = found[0], np.where(unused, 0, buffers)
        table.places[:, 3:] = found[-1][:, None]
        return table

    def part(self, number: Any) -> Table:
        """Return this table for the layers that have a new number, which is not -1."""
        table, layers = copy.copy(self), number[self.layers]
        index = np.flatnonzero(layers >= 0)
        table.layers, table.sizes, table.places = layers[index], self.sizes[index], self.places[index]
        table._plan()
        return table

    def call(
        self, what: str, grads: Gradients, inputs: Any, S: Any, C: Any, tapes: Any = _NO_TAPES
    ) -> Callable[[], None]:
        """Return a call of `work` for this table's layers on several threads: nothing that could fail is left to do.

        Parameters
        ----------
        what : {"measure", "write", "both"}
            The first stage and, if there are tapes, the second; the third; or all of them.
        grads : Gradients
            Of all layers of the step, as all arguments are.
        inputs, S, C, tapes : arrays and tuples of arrays
            See `lars_array.kernels.compiled.loops`.
        """
        threads = max(1, min(thread_count(), self.threads_worth))
        task = _WHAT[what]
        if (what, threads) not in self._tasks:
            self._tasks[what, threads] = tasks(self.sizes, task, threads)
        self.places[:, 1] = grads.addresses.take(self.layers)
        left = np.full_like(self.left, DONE) if task == WRITE else self.left.copy()
        claimed, partial_sums = np.zeros(self.shared_pieces, np.int64), np.zeros((self.shared_pieces, 3))
        progress = np.zeros(1, np.int64), left, claimed, partial_sums
        table = self.places, self.sizes, self.offsets, self.layers
        arguments = self._tasks[what, threads], progress, table, inputs, tapes, S, C, self._likes
        return partial(run_on_threads, partial(_work, arguments, (self._held, grads)), threads)


def _work(arguments: tuple[Any, ...], held: Any) -> None:
    """Call `work`; `held` keeps the arrays alive whose addresses are in the arguments."""
    work(*arguments)


def coefficients(S: Any, inputs: Any, tapes: Any, C: Any) -> None:
    """Write `core.coefficients` to C."""
    hyper_row, weights, previous_lr, hyper = inputs
    threads = max(1, min(thread_count(), len(S) // LAYERS))
    size = -(-len(S) // threads)
    parts = iter([slice(i * size, (i + 1) * size) for i in range(threads)])

    def work_off() -> None:
        for part in parts:
            own = hyper_row[part], weights, previous_lr[part], hyper
            at_first(coefficients_of, S[part], own, tapes, C[part])

    run_on_threads(work_off, threads)


def compile_coefficients(hyper: Any, tapes: Any) -> None:
    """Compile what `coefficients` calls, which takes seconds the first time."""
    inputs = np.empty(0, np.int32), _no_weights(1), np.empty(0), hyper
    coefficients(np.empty((0, 3)), inputs, tapes, np.empty((0, 6)))


def hyper_of(inputs: RuleInputs) -> Any:
    """Return the inputs of tapes, of shape (rows, fields)."""
    return np.array(np.array([inputs.gamma, *inputs.hyper]).T, order="C")


def inputs_for_sums(operand: Any, layers: int) -> Any:
    """Return the inputs of a call that only takes sums or writes; without an operand the third sum is the second."""
    if operand is None:
        return np.zeros(layers, np.int32), weights_of(None, 1), *_NO_HYPER
    return np.arange(layers, dtype=np.int32), weights_of(operand, layers), *_NO_HYPER


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
def _likes(*types: Any) -> tuple[Any, ...]:
    """Return empty arrays of these types, None for None, once `work` is compiled for them."""
    likes = tuple(None if kind is None else np.empty(0, kind) for kind in types)
    none, nowhere = np.empty(0, np.int64), np.empty(0, np.int32)
    progress = np.zeros(1, np.int64), none, none, np.empty((0, 3))
    table = np.empty((0, 3), np.int64), none, none, nowhere
    inputs = nowhere, _no_weights(1), *_NO_HYPER
    tasks_, S, C = np.empty((0, 5), np.int64), np.empty((0, 3)), np.empty((0, 6))
    at_first(work, tasks_, progress, table, inputs, _NO_TAPES, S, C, likes, is_new=True)
    return likes


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
