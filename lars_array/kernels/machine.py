"""The compiled step: a list of tasks over a table of layers, which any number of threads work off together.

No task waits for one that comes after it in the list, so there is no barrier, and a thread that comes late, or not at
all, holds up no other. Sums are added piece by piece in a fixed order: who did which piece does not show.
"""

from __future__ import annotations

import inspect
import sys
import zlib
from typing import Any

import numba
import numpy as np

from lars_array import core
from lars_array.kernels import intrinsics
from lars_array.kernels.intrinsics import array_at, fetch_add, kept_on_disk, load, prefetch, read, stored, write
from lars_array.tape import OPERATIONS

__all__ = ["DONE", "MEASURE", "OWN", "PIECE", "WHOLE", "WRITE", "coefficients_of", "work"]

PIECE = 1 << 16  # elements of one partial sum
MEASURE, WRITE = 1, 2  # what a task does; both, where one thread has layers to itself
WHOLE = -1  # in the place of a task's last piece: all pieces of its layers are its own
OWN = -2  # in the place of a task's first piece: those that the thread has measured and not yet written
DONE = -1  # in the place of the number of pieces still to be measured, when a layer's coefficients are there

# Elements between two requests for memory that is needed soon, and how many bytes that is away. Measured on ResNet-50's
# layers; 4 KiB, 16 KiB and requests for p and g as well gain less or nothing.
BLOCK, AHEAD, LINE = 256, 8192, 64

_ADD, _SUBTRACT, _MULTIPLY, _DIVIDE, _LESS, _LESS_EQUAL, _EQUAL, _WHERE, _SQRT, _ABSOLUTE = range(len(OPERATIONS))

_difference = numba.njit(core.difference)
_difference_without_buffer = numba.njit(core.difference_without_buffer)

# A sum may be taken in as many parts as the processor adds at once; nan and inf remain what they are.
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
    """Return elements of what begins at an address, none where that is 0, and None where `like` is."""
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
    elif w != 0.0:
        sums[2] += _sum_of_two(p, g, gamma, w)
    else:
        sums[2] += gamma * gamma * g_squares


@numba.njit
def _write(p: Any, g: Any, v: Any, copy: Any, c: Any, moves: Any) -> None:
    """Do what `core.apply` does: in place if `moves` is None, and rounded to `copy` unless that is.

    Of branches on what is None numba keeps one.
    """
    kind = v.dtype.type
    m, alpha, beta, kappa, lam, mu = kind(c[0]), kind(c[1]), kind(c[2]), kind(c[3]), kind(c[4]), kind(c[5])
    if v.size == p.size:
        for i in range(p.size):
            d, v[i] = _difference(load(p[i]), kind(load(g[i])), v[i], m, alpha, beta, kappa, lam, mu)
            new_p = load(p[i]) - d
            if moves is None:
                p[i] = stored(new_p, p[i])
            if copy is not None:
                copy[i] = stored(new_p, copy[i])
    else:
        for i in range(p.size):
            d = _difference_without_buffer(load(p[i]), kind(load(g[i])), alpha, beta, kappa, lam, mu)
            new_p = load(p[i]) - d
            if moves is None:
                p[i] = stored(new_p, p[i])
            if copy is not None:
                copy[i] = stored(new_p, copy[i])


@numba.njit
def _write_stretch(
    place: Any, start: int, stop: int, c: Any, p_like: Any, g_like: Any, v_like: Any, copy_like: Any, moves: Any
) -> None:
    """Write the elements from `start` to `stop` of a layer.

    Of p and g, which were read not long ago, most is in a cache, and v is far away: a processor that looks ahead in all
    three alike is late for v, and is told. Where results go elsewhere, it has enough to wait for, and that costs more
    than it saves.
    """
    step = max(stop - start, 1) if copy_like is not None else BLOCK
    for first in range(start, stop, step):
        last = min(first + step, stop)
        if copy_like is None and place[2] != 0:
            for byte in range(first * v_like.itemsize, last * v_like.itemsize, LINE):
                prefetch(place[2] + byte + AHEAD)
        p, g = _elements(place[0], first, last, p_like), _elements(place[1], first, last, g_like)
        v, copy = _elements(place[2], first, last, v_like), _elements(place[-1], first, last, copy_like)
        _write(p, g, v, copy, c, moves)


@numba.njit
def _part_to_write(claimed: Any, parts: int, step: int, own: Any, count: int) -> tuple[int, int]:
    """Return the first piece of a part that nobody else writes, and how many of `own` are left.

    What a thread has measured last is in the cache of its core, from where another core gets it slowly. With nothing
    left of its own, it takes what another has measured first, and will come to last.
    """
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
    """Carry out the operations of a tape. Their results go into the registers from `place` on."""
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
def _coefficients(sums: Any, given: Any, operations: Any, constants: Any, outputs: Any, registers: Any, c: Any) -> None:
    """Do what `core.coefficients` does for one layer, by its tape."""
    registers[:3] = sums
    registers[3 : 3 + len(given)] = given
    place = 3 + len(given) + len(constants)
    registers[3 + len(given) : place] = constants
    _play(operations, registers, place)
    for i in range(len(outputs)):
        c[i] = registers[outputs[i]]


@kept_on_disk
def coefficients_of(
    S: Any, kind_of: Any, hyper: Any, extents: Any, operations: Any, constants: Any, outputs: Any, C: Any
) -> None:
    """Write the coefficients of all layers; the arguments are those of `work`."""
    registers = np.empty(3 + hyper.shape[1] + len(constants) + len(operations))
    for layer in range(len(S)):
        kind = kind_of[layer]
        begin, end, begin_constants, end_constants = extents[kind]
        tape = operations[begin:end], constants[begin_constants:end_constants], outputs[kind]
        _coefficients(S[layer], hyper[kind], *tape, registers, C[layer])


def _checksum() -> int:
    """Return a number that changes with any of the code that `work` is made of.

    numba takes what is on disk for current if this file is as old and as long as it was, and the closure of the
    function holds what it did.
    """
    sources: tuple[Any, ...] = (sys.modules[__name__], intrinsics, core.difference, core.difference_without_buffer)
    try:
        return zlib.crc32("".join(map(inspect.getsource, sources)).encode())
    except OSError:  # without its sources a program is not changed, and nothing kept on disk
        return 0


def _make_work(checksum: int) -> Any:
    def work(
        tasks: Any,
        cursor: Any,
        left: Any,
        claimed: Any,
        places: Any,
        sizes: Any,
        offsets: Any,
        layers: Any,
        partial: Any,
        kind_of: Any,
        weights: Any,
        hyper: Any,
        extents: Any,
        operations: Any,
        constants: Any,
        outputs: Any,
        S: Any,
        C: Any,
        p_like: Any,
        g_like: Any,
        v_like: Any,
        copy_like: Any,
        moves: Any,
    ) -> int:
        """Work off tasks until none is left. Everything is written by all threads unless said otherwise.

        tasks (tasks, 5)        read: see `lars_array.kernels.tasks`
        cursor (1,)             how many tasks are taken
        left (shared,)          of a shared layer, the pieces not yet measured; `DONE` when C may be read
        places (rows, 3 or 4)   read: addresses of p, g, v or 0, and of what the new p goes to as well, or instead
        sizes (rows,)           read: elements; the largest first, so that shared layers are the first of all
        offsets (shared,)       read: where in `partial` a shared layer begins
        layers (rows,)          read: of each row the layer, index into the next, S and C
        claimed (pieces,)       of shared layers, at first zero: not if somebody writes the part that begins there
        partial (pieces, 3)     sums of pieces of shared layers, at first zero
        kind_of (layers,)       read: index into the next three, and `outputs`
        weights (kinds, 3)      read: gamma, w and h of the third sum
        hyper (kinds, fields)   read: gamma and hyper-parameters, what tapes start from
        extents (kinds, 4)      read: where operations and constants of a tape begin and end; none: C is given
        operations, constants   read: those of all tapes
        outputs (kinds, 6)      read: the registers of the coefficients
        S (layers, 3)           sums, at first zero
        C (layers, 6)           coefficients
        p_like, …, copy_like    of shape (0,), tell the types; the last one is None where p is written in place alone
        moves                   None where p is written in place at all

        Who brings `left` of a layer to zero adds its partial sums, writes S and C, and then `DONE`: others see it, and
        with it all that was written before.
        """
        registers = np.empty(3 + hyper.shape[1] + len(constants) + len(operations))
        own, own_row, own_parts = np.empty(len(claimed), np.int64), -1, 0
        while True:
            number = fetch_add(cursor, 0, 1)
            if number >= len(tasks):
                return checksum
            what, first_row, last_row, first_piece, last_piece = tasks[number]
            for row in range(first_row, last_row):
                layer, pieces = layers[row], -(-sizes[row] // PIECE)
                kind = kind_of[layer]
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
                        _measure(p, g, v, weights[kind], partial[offsets[row] + k] if shared else S[layer])
                    if not shared or fetch_add(left, row, first - last) == last - first:
                        for k in range(pieces if shared else 0):
                            S[layer] += partial[offsets[row] + k]
                        if len(extents) > 0:
                            begin, end, begin_constants, end_constants = extents[kind]
                            _coefficients(
                                S[layer],
                                hyper[kind],
                                operations[begin:end],
                                constants[begin_constants:end_constants],
                                outputs[kind],
                                registers,
                                C[layer],
                            )
                        if shared:
                            write(left, row, DONE)
                if what & WRITE:
                    while shared and read(left, row) != DONE:
                        pass
                    # In one go, and not from the end, which was measured last: processors look ahead along addresses.
                    start, stop = first * PIECE, min(last * PIECE, sizes[row])
                    _write_stretch(places[row], start, stop, C[layer], p_like, g_like, v_like, copy_like, moves)

    return work


work = kept_on_disk(_make_work(_checksum()))
