"""Steps in one launch whose blocks run at the same time, beside the same steps in three launches, block after block."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cuda_on_cpu
import numpy as np
import pytest
from cuda_on_cpu import far

from lars_array import LARS
from lars_array.kernels.cuda import one_launch, tables

__all__ = ["SIZES", "Twins", "random_turns", "survives", "twins"]

SIZES = [5, 0, 150, 1, 90, 0, 70, 3]  # of "0" and so on; pieces have 64 elements, and "3" and "6" are one layer
HYPER: dict[str, Any] = {"lr": 0.3, "momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1, "nonfinite": "propagate"}


class Twins:
    """Two optimizers over equal models.

    Parameters
    ----------
    optimizers, params : pairs
        Of the one that takes steps in one launch, and of the other.
    devices : pair of cuda_on_cpu.Device
        Of each.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self._rng = np.random.default_rng(0)
        first = [self._rng.standard_normal(size).astype(np.float32) for size in sizes]
        self.params = [[far(p) for p in first] for _ in range(2)]
        self.optimizers = [self._optimizer(params) for params in self.params]

    @staticmethod
    def _optimizer(params: list[Any]) -> LARS:
        named = {str(i): p for i, p in enumerate(params)}
        groups = [{"params": named}] if len(named) < 3 else []
        if not groups:  # a rule whose norm is of the update, which reads buffers and `first`, and one that does not
            last = {name: named.pop(name) for name in list(named)[2:]}
            groups = [{"params": named, "rule": "mxnet"}, {"params": last, "rule": "optax", "lr": 0.2}]
        return LARS(groups, **HYPER, layer_of={"3": "both", "6": "both"}.get)

    def place(self, path: Path, grid: int) -> None:
        """Take the first step, and have the later ones of one launch done by so many blocks."""
        self.devices = [cuda_on_cpu.Device(path), cuda_on_cpu.Device(cuda_on_cpu.library())]
        launch = self.devices[0].launch
        self.devices[0].launch = lambda name, blocks, *more: launch(  # type: ignore[method-assign]
            name, grid if name.startswith("step") else blocks, *more
        )
        for device in self.devices:
            device.cache_bytes = int(1500 / one_launch.SHARE)  # a share of two or three pieces
        assert self.step([0])

    def step(self, turns: Any, *, found_inf: bool = False) -> bool:
        """Take a step of both, with new gradients; return whether parameters, buffers and states are the same."""
        turns = np.ascontiguousarray(turns, np.int32)
        self.devices[0].library.set_turns(len(turns), turns.ctypes.data_as(ctypes.c_void_p))
        values = [self._rng.standard_normal(p.size).astype(np.float32) for p in self.params[0]]
        for number, device in enumerate(self.devices):
            device.launches.clear()
            with pytest.MonkeyPatch.context() as patch:  # tables are made anew at the second step
                patch.setattr(cuda_on_cpu.Kernel, "Device", device)
                patch.setattr(tables, "PIECE_LENGTH", 64)
                patch.setattr(one_launch, "UNIT_PIECES", 3)
                patch.setenv("LARS_ARRAY_CUDA", ("one-launch", "three-launches")[number])
                self.optimizers[number].step([far(g) for g in values], found_inf=far(np.float32(found_inf)))
        assert [name for name, _ in self.devices[0].launches if name != "write_pointers"] == ["step_float32_float32"]
        return self._bits(0) == self._bits(1)

    @property
    def points(self) -> int:
        """At how many points of the last step another block might have gone on."""
        return int(self.devices[0].library.points_passed())

    def _bits(self, number: int) -> list[bytes]:
        optimizer: Any = self.optimizers[number]
        state, found = optimizer._state.device, optimizer._stepper._programs[0]._kernel._steps[1]
        arrays = [*self.params[number], *optimizer._state.buffers]
        arrays += [state.first, state.previous_lr, state.counts, found.S, found.C, found.gamma]
        return [np.asarray(x).tobytes() for x in arrays]


@contextlib.contextmanager
def twins(path: Path | str, grid: int, sizes: Sequence[int] = SIZES) -> Iterator[Twins]:
    """Yield twins, of which the one that uses the library at `path` takes its steps with so many blocks."""
    with cuda_on_cpu.pretended():
        found = Twins(sizes)
        found.place(Path(path), grid)
        yield found


def random_turns(rng: np.random.Generator, grid: int, share: float) -> Any:
    """Return turns that change at a share of the points."""
    points = 2000
    return np.where(rng.random(points) < share, rng.integers(1, max(grid, 2), points), 0)


def survives(path: Path | str, *, runs: int = 30, as_they_come: bool = False) -> bool:
    """Return whether steps are right in random turns, or as the system runs the blocks, for grids of several sizes."""
    rng = np.random.default_rng(0)
    for grid in (1, 2, 3, 7):
        with twins(path, grid) as found:
            for run in range(runs):
                turns = () if as_they_come else random_turns(rng, grid, (0.02, 0.2, 0.7)[run % 3])
                if not found.step(turns, found_inf=run % 5 == 4):
                    return False
    return True
