"""One launch for a whole step in the place of three: when it can be, and which tasks its blocks take in which order.

It has not been measured on a GPU yet, so it is used only where ``LARS_ARRAY_CUDA=one-launch`` asks for it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from importlib.resources import files
from typing import Any

import numpy as np

from lars_array._messages import shown
from lars_array.kernels.cuda.source import (
    BYTES,
    assertions,
    definition,
    pair_kernel,
    pair_name,
    source,
    structure,
)

__all__ = ["OneLaunch", "is_wanted", "one_launch_source", "order_tasks", "split_into_units"]

# Of the L2 cache, for parameters and gradients between their sums and their update. A simulated cache of 50 MB holds
# them up to 0.8, one of 35 MB up to 0.6; with less than 0.7 the larger layers of ViT-L do not fit. Not measured yet.
SHARE = 0.7
BLOCKS = 2  # of each multiprocessor: with more, the pieces that are worked on at once would fill that share
UNIT_ROWS = 8  # whose coefficients one block computes at once
UNIT_PIECES = 16  # at most, of a unit of several layers

# As one_launch.cu describes them.
TASK = structure("int piece", "int unit")
UNIT = structure("int first", "int end", "int pieces")
PLAN = structure(
    "const Task* tasks",
    "const Unit* units",
    "int* measured",
    "int* next",
    "int* ended",
    "int task_count",
    "int unit_count",
)
STRUCTURES = {"Task": TASK, "Unit": UNIT, "Plan": PLAN}


def is_wanted() -> bool:
    """Return whether LARS_ARRAY_CUDA asks for one launch."""
    given = os.environ.get("LARS_ARRAY_CUDA") or "three-launches"
    if given not in ("one-launch", "three-launches"):
        raise ValueError(f"LARS_ARRAY_CUDA must be one-launch or three-launches; got {shown(given)}")
    return given == "one-launch"


def one_launch_source(pairs: Iterable[tuple[str, str]], **numbers: int) -> str:
    """Return `source`, and behind it one_launch.cu with its kernel for each pair of types."""
    pairs = list(pairs)
    code = files("lars_array.kernels.cuda").joinpath("one_launch.cu").read_text(encoding="utf-8")
    before = [source(pairs, **numbers), *(definition(name, dtype) for name, dtype in STRUCTURES.items())]
    kernels = [pair_kernel("step", *pair, ("Plan plan",)) for pair in pairs]
    after = [line for name, dtype in STRUCTURES.items() for line in assertions(name, dtype)]
    return "\n".join([*before, '#line 1 "one_launch.cu"', code, *kernels, *after]) + "\n"


def split_into_units(first_piece: Sequence[int], pieces: Sequence[int]) -> list[int]:
    """Return the unit of each array: one layer, or a few small ones whose coefficients are computed together.

    Parameters
    ----------
    first_piece, pieces : sequences of int
        Those of the layer of each array; arrays of one layer are neighbours. Arrays without pieces join any unit.
    """
    units: list[int] = []
    unit, rows, total, last = 0, 0, 0, -1
    for first, count in zip(first_piece, pieces, strict=True):
        if count and first != last:
            if total and (total + count > UNIT_PIECES or rows >= UNIT_ROWS):
                unit, rows, total = unit + 1, 0, 0
            total, last = total + count, first
        rows += 1
        units.append(unit)
    return units


def order_tasks(lengths: Any, units: Any, share: int) -> Any:
    """Return the order of tasks: the number of each piece whose sums are taken, its complement where it is updated.

    The sums of pieces run ahead of updates as far as the cache holds what is read twice. Units that it does not hold
    are read from memory twice in any order, and are not counted.

    Parameters
    ----------
    lengths : int64 array of shape (pieces,)
        The bytes of each piece that are read twice.
    units : integer array of shape (pieces,)
        The unit of each piece, in ascending order.
    share : int
        How many bytes the cache has for them.
    """
    whole = np.bincount(units, lengths)[units]
    before = np.concatenate([[0], np.cumsum(np.where(whole <= share, lengths, 0))])
    # How many pieces are updated before the sums of each: as few as must be. None of them is of a unit that still has
    # sums to come, since that would exceed the share by itself.
    updated = np.searchsorted(before, before[1:] - share)
    count = len(lengths)
    is_update = np.ones(2 * count, bool)
    is_update[np.arange(count) + updated] = False
    tasks = np.empty(2 * count, np.int32)
    tasks[~is_update], tasks[is_update] = np.arange(count), ~np.arange(count)
    return tasks


class OneLaunch:
    """The tasks of a model on a device, and their launch.

    Parameters
    ----------
    device : Device
        See `lars_array.kernels.cuda.device`.
    host : HostTables
        See `lars_array.kernels.cuda.tables`: at least one piece, and all parameters and gradients have the same types.
    model : structured array of one element
        See `lars_array.kernels.cuda.tables.DeviceTables`.

    Attributes
    ----------
    launch : callable
        Queues a step in which neither sums nor coefficients decide whether anything is written.
    """

    def __init__(self, device: Any, host: Any, model: Any) -> None:
        p, g = host.segments[0].types
        rows, (arrays, index) = host.rows[host.order], (host.arrays[host.pieces["array"]], host.pieces["index"])
        of_arrays = np.array(split_into_units(rows["first_piece"].tolist(), rows["pieces"].tolist()))
        of_pieces = of_arrays[host.pieces["array"]]
        read = np.where(arrays["master"] != 0, BYTES["float32"], BYTES[p]) + BYTES[g]
        lengths = np.minimum(arrays["piece"], arrays["size"] - index * arrays["piece"]) * read
        blocks = min(len(of_pieces), BLOCKS * device.attribute("MultiProcessorCount"))
        share = int(SHARE * device.attribute("L2CacheSize"))
        if share < blocks * lengths.mean() / 2:  # blocks would wait for what others are still at work on
            share = 0
        tasks, units = np.zeros(2 * len(of_pieces), TASK), np.zeros(of_arrays[-1] + 1, UNIT)
        tasks["piece"] = order = order_tasks(lengths, of_pieces, share)
        tasks["unit"] = of_pieces[np.maximum(order, ~order)]
        units["end"] = np.cumsum(np.bincount(of_arrays))
        units["first"] = units["end"] - np.bincount(of_arrays)
        units["pieces"] = np.bincount(of_pieces, minlength=len(units))
        counters = device.zeros(len(units) + 2, np.int32)
        self._own = device.put(tasks), device.put(units), counters
        starts = counters[2:], counters[:1], counters[1:2]
        addresses = [device.address(x) for x in (*self._own[:2], *starts)]
        plan = np.array([(*addresses, len(tasks), len(units))], PLAN)
        self.launch: Callable[[], None] = device.launcher(pair_name("step", p, g), blocks, model, plan)
