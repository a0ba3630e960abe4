"""The compiled step: a list of tasks over a table of layers, processed by any number of threads.

A task depends only on tasks before it in the list. So there is no barrier, and a thread that starts late, or never,
delays no other. Partial sums are added in a fixed order: results do not depend on which thread computed them.
"""

from __future__ import annotations

import inspect
import sys
import zlib
from typing import Any

import numba
import numpy as np

from lars_array import core
from lars_array.kernels.compiled import intrinsics
from lars_array.kernels.compiled.intrinsics import (
    array_at,
    fetch_add,
    kept_on_disk,
    load,
    prefetch,
    read,
    stored,
    write,
)
from lars_array.kernels.tape import OPERATIONS

__all__ = ["DONE", "MEASURE", "OWN", "PIECE", "WHOLE", "WRITE", "coefficients_of", "work"]

PIECE = 1 << 16  # elements of one partial sum
MEASURE, WRITE = 1, 2  # stages of a task; both, where one thread processes whole layers
WHOLE = -1  # as a task's last piece: the task has all pieces of its layers
OWN = -2  # as a task's first piece: the thread chooses a part, preferably one that it has measured
DONE = -1  # as the number of pieces still to be measured: the layer's coefficients are ready

# Elements between two rounds of prefetching, the distance ahead in bytes, and the bytes of a cache line. Measured on
# ResNet-50's layers; 4 KiB, 16 KiB and prefetching p and g as well gain less or nothing.
BLOCK, AHEAD, LINE = 256, 8192, 64

_ADD, _SUBTRACT, _MULTIPLY, _DIVIDE, _LESS, _LESS_EQUAL, _EQUAL, _WHERE, _SQRT, _ABSOLUTE = range(len(OPERATIONS))

_difference = numba.njit(core.difference)
_difference_without_buffer = numba.njit(core.difference_without_buffer)

# Sums may be reordered, so that they are vectorised; nan and inf keep their meaning.
_SUMMING = {"reassoc", "contract"}


@numba.njit(fastmath=_SUMMING)
def _two_sums(p: Any, g: Any) -> tuple[float, float]:
    p_squares, g_squares = 0.0, 0.0
    for i in range(p.size):
        x, y = np.float64(load(p[i])), np.float64(load(g[i]))
        p_squares += x * x
        g_squares += y * y
    return p_squares, g_squares


@numba.njit(fastmath=_SUMMING)
def _sum_of_two(p: Any, g: Any, gamma: float, w: float) -> float:
    total = 0.0
    for i in range(p.size):
        d = gamma * np.float64(load(g[i])) + w * np.float64(load(p[i]))
        total += d * d
    return total


@numba.njit(fastmath=_SUMMING)
def _sum_of_three(p: Any, g: Any, v: Any, gamma: float, w: float, h: float) -> float:
    total = 0.0
    for i in range(p.size):
        d = gamma * np.float64(load(g[i])) + w * np.float64(load(p[i])) + h * np.float64(v[i])
        total += d * d
    return total


@numba.njit
def _elements(address: int, start: int, stop: int, like: Any) -> Any:
    """Return elements of the array at an address, none if it is 0, and None if `like` is None."""
    if like is None:
        return None
    return array_at(address + start * like.itemsize, stop - start if address != 0 else 0, like)


@numba.njit
def _measure(p: Any, g: Any, v: Any, weights: Any, sums: Any) -> None:
    """Add the three sums over a piece to `sums`."""
    p_squares, g_squares = _two_sums(p, g)
    gamma, w, h = weights
    sums[0] += p_squares
    sums[1] += g_squares
    if h != 0.0 and v.size != 0:
        sums[2] += _sum_of_three(p, g, v, gamma, w, h)
    elif w != 0.0 or gamma == 0.0:  # 0 times a sum that overflows is nan
        sums[2] += _sum_of_two(p, g, gamma, w)
    else:
        sums[2] += gamma * gamma * g_squares


@numba.njit
def _write(p: Any, g: Any, v: Any, copy: Any, c: Any) -> None:
    """Write the results of `core.apply` in place, and round the new p to `copy` unless that is None."""
    # numba compiles only one branch of a condition on None.
    kind = v.dtype.type
    m, alpha, beta, kappa, lam, mu = kind(c[0]), kind(c[1]), kind(c[2]), kind(c[3]), kind(c[4]), kind(c[5])
    if v.size == p.size:
        for i in range(p.size):
            d, v[i] = _difference(load(p[i]), kind(load(g[i])), v[i], m, alpha, beta, kappa, lam, mu)
            new_p = load(p[i]) - d
            p[i] = stored(new_p, p[i])
            if copy is not None:
                copy[i] = stored(new_p, copy[i])
    else:
        for i in range(p.size):
            d = _difference_without_buffer(load(p[i]), kind(load(g[i])), alpha, beta, kappa, lam, mu)
            new_p = load(p[i]) - d
            p[i] = stored(new_p, p[i])
            if copy is not None:
                copy[i] = stored(new_p, copy[i])


@numba.njit
def _write_stretch(
    place: Any, start: int, stop: int, c: Any, p_like: Any, g_like: Any, v_like: Any, copy_like: Any
) -> None:
    """Write the elements from `start` to `stop` of a layer."""
    # p and g were read recently and are mostly in a cache; v is in memory, where hardware prefetching, which treats all
    # three the same, is too late. So v is prefetched here. With rounded copies that costs more than it saves.
    step = max(stop - start, 1) if copy_like is not None else BLOCK
    for first in range(start, stop, step):
        last = min(first + step, stop)
        if copy_like is None and place[2] != 0:
            for byte in range(first * v_like.itemsize, last * v_like.itemsize, LINE):
                prefetch(place[2] + byte + AHEAD)
        p, g = _elements(place[0], first, last, p_like), _elements(place[1], first, last, g_like)
        v, copy = _elements(place[2], first, last, v_like), _elements(place[-1], first, last, copy_like)
        _write(p, g, v, copy, c)


@numba.njit
def _part_to_write(claimed: Any, parts: int, step: int, own: Any, count: int) -> tuple[int, int]:
    """Return the first piece of a part that no other thread writes, and how many of `own` are left."""
    # The part that a thread measured last is in its core's cache, which other cores read slowly. A thread without parts
    # of its own takes from the front, where the parts are that their own threads write last.
    while count > 0:
        count -= 1
        if fetch_add(claimed, own[count], 1) == 0:
            return own[count], count
    part = 0
    while part < parts - 1 and fetch_add(claimed, part * step, 1) != 0:
        part += 1
    return part * step, 0


@numba.njit(error_model="numpy")
def _play(operations: Any, registers: Any, place: int) -> None:
    """Execute the operations of a tape, with results in the registers from `place` on."""
    for k in range(len(operations)):
        code = operations[k, 0]
        a, b = registers[operations[k, 1]], registers[operations[k, 2]]
        if code == _MULTIPLY:
            result = a * b
        elif code == _ADD:
            result = a + b
        elif code == _WHERE:
            result = b if a != 0.0 else registers[operations[k, 3]]
        elif code == _LESS:
            result = 1.0 if a < b else 0.0
        elif code == _DIVIDE:
            result = a / b
        elif code == _SUBTRACT:
            result = a - b
        elif code == _EQUAL:
            result = 1.0 if a == b else 0.0
        elif code == _LESS_EQUAL:
            result = 1.0 if a <= b else 0.0
        elif code == _SQRT:
            result = np.sqrt(a)
        else:
            result = abs(a)
        registers[place + k] = result


@numba.njit
def _coefficients(
    sums: Any, given: Any, previous_lr: float, operations: Any, constants: Any, outputs: Any, registers: Any, c: Any
) -> None:
    """Compute `core.coefficients` for one layer, from its tape."""
    registers[:3] = sums
    place = 3 + len(given)
    registers[3:place] = given
    registers[place - 2] = previous_lr  # the last input but one, which each layer has of its own
    registers[place : place + len(constants)] = constants
    _play(operations, registers, place + len(constants))
    for i in range(len(outputs)):
        c[i] = registers[outputs[i]]


@kept_on_disk
def coefficients_of(S: Any, inputs: Any, tapes: Any, C: Any) -> None:
    """Write the coefficients of all layers; the arguments are those of `work`."""
    hyper_row, _, previous_lr, hyper = inputs
    extents, operations, constants, outputs = tapes
    registers = np.empty(3 + hyper.shape[1] + len(constants) + len(operations))
    for layer in range(len(S)):
        row = hyper_row[layer]
        begin, end, begin_constants, end_constants = extents[row]
        tape = operations[begin:end], constants[begin_constants:end_constants], outputs[row]
        _coefficients(S[layer], hyper[row], previous_lr[layer], *tape, registers, C[layer])


def _checksum() -> int:
    """Return a number that changes with the source code that `work` is compiled from."""
    # numba reuses a cached function if this file has the same age and size and the function's closure the same values:
    # the number is in the closure.
    sources: tuple[Any, ...] = (sys.modules[__name__], intrinsics, core.difference, core.difference_without_buffer)
    try:
        return zlib.crc32("".join(map(inspect.getsource, sources)).encode())
    except OSError:  # without source files numba caches nothing
        return 0


def _make_work(checksum: int) -> Any:
    def work(tasks: Any, progress: Any, table: Any, inputs: Any, tapes: Any, S: Any, C: Any, likes: Any) -> int:
        """Process tasks until none is left. Everything is written by all threads unless said otherwise.

        tasks (tasks, 5)        read: see `lars_array.kernels.compiled.tasks`

        progress, of this call:
        cursor (1,)             how many tasks are taken
        left (shared,)          of a shared layer, the pieces not yet measured; `DONE` when C may be read
        claimed (pieces,)       of shared layers, at first zero: not if a thread writes the part that begins there
        partial (pieces, 3)     sums of pieces of shared layers, at first zero

        table, read:
        places (rows, 3 or 4)   addresses of p, g, v or 0, and of the copy that the new p is rounded to
        sizes (rows,)           elements; the largest first, so that shared layers are the first of all
        offsets (shared,)       where in `partial` a shared layer begins
        layers (rows,)          the layer of each row, the index into hyper_row, previous_lr, S and C

        inputs, read:
        hyper_row (layers,)     index into weights, hyper, extents and outputs
        weights (inputs, 3)     gamma, w and h of the third sum
        previous_lr (layers,)   the last input of tapes but one
        hyper (inputs, fields)  gamma and hyper-parameters, the inputs of tapes

        tapes, read:
        extents (inputs, 4)     where operations and constants of a tape begin and end; none: C is given
        operations, constants   those of all tapes
        outputs (inputs, 6)     the registers of the coefficients

        S (layers, 3)           sums, at first zero
        C (layers, 6)           coefficients
        likes                   arrays of shape (0,) of the types of p, g, v and copies, None without copies

        The thread that brings `left` of a layer to zero adds its partial sums, writes S and C, and then `DONE`: others
        see it, and with it all that was written before.
        """
        cursor, left, claimed, partial = progress
        places, sizes, offsets, layers = table
        hyper_row, weights, previous_lr, hyper = inputs
        extents, operations, constants, outputs = tapes
        p_like, g_like, v_like, copy_like = likes
        registers = np.empty(3 + hyper.shape[1] + len(constants) + len(operations))
        own, own_row, own_parts = np.empty(len(claimed), np.int64), -1, 0
        while True:
            number = fetch_add(cursor, 0, 1)
            if number >= len(tasks):
                return checksum
            what, first_row, last_row, first_piece, last_piece = tasks[number]
            for row in range(first_row, last_row):
                layer, pieces = layers[row], -(-sizes[row] // PIECE)
                given = hyper_row[layer]
                shared = last_piece != WHOLE
                first, last = (first_piece, last_piece) if shared else (0, pieces)
                if first_piece == OWN:
                    parts, mine = -(-pieces // last_piece), own_parts if own_row == row else 0
                    first, own_parts = _part_to_write(claimed[offsets[row] :], parts, last_piece, own, mine)
                    last = min(first + last_piece, pieces)
                elif shared and what == MEASURE:
                    if own_row != row:
                        own_row, own_parts = row, 0
                    own[own_parts] = first
                    own_parts += 1
                if what & MEASURE:
                    for k in range(first, last):
                        start, stop = k * PIECE, min((k + 1) * PIECE, sizes[row])
                        p = _elements(places[row, 0], start, stop, p_like)
                        g = _elements(places[row, 1], start, stop, g_like)
                        v = _elements(places[row, 2], start, stop, v_like)
                        _measure(p, g, v, weights[given], partial[offsets[row] + k] if shared else S[layer])
                    if not shared or fetch_add(left, row, first - last) == last - first:
                        for k in range(pieces if shared else 0):
                            S[layer] += partial[offsets[row] + k]
                        if len(extents) > 0:
                            begin, end, begin_constants, end_constants = extents[given]
                            _coefficients(
                                S[layer],
                                hyper[given],
                                previous_lr[layer],
                                operations[begin:end],
                                constants[begin_constants:end_constants],
                                outputs[given],
                                registers,
                                C[layer],
                            )
                        if shared:
                            write(left, row, DONE)
                if what & WRITE:
                    while shared and read(left, row) != DONE:
                        pass
                    # Forwards, although the end was measured last: hardware prefetching follows rising addresses.
                    start, stop = first * PIECE, min(last * PIECE, sizes[row])
                    _write_stretch(places[row], start, stop, C[layer], p_like, g_like, v_like, copy_like)

    return work


work = kept_on_disk(_make_work(_checksum()))
