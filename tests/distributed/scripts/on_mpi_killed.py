"""Run by `test_mpi.py` in four processes under ``mpirun --with-ft ulfm``; survivors write JSON to a folder."""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
from assertions import fingerprint
from launch import TIME_LIMIT
from mpi4py import MPI

from lars_array import LARS, collectives

OPTIONS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
KILLED = 1


class Pieces:
    """An optimizer over pieces that this process draws."""

    def __init__(self, comm: Any, kernel: str) -> None:
        self.rng = np.random.default_rng(comm.rank)
        self.params = {"w": self.draw(3, 4), "b": self.draw(2)}
        self.optimizer = LARS(self.params, **OPTIONS, all_reduce=collectives.mpi(comm), kernel=kernel)

    def draw(self, *shape: int) -> Any:
        return self.rng.normal(size=shape).astype(np.float32)

    def step(self) -> None:
        self.optimizer.step([self.draw(*p.shape) for p in self.params.values()])

    def state(self) -> Any:
        return fingerprint([self.params, self.optimizer])

    def carry_on(self, comm: Any) -> None:
        """Go on with the pieces of the processes of `comm`."""
        successor = LARS(self.params, **OPTIONS, all_reduce=collectives.mpi(comm))
        successor.load_state_dict(self.optimizer.state_dict())
        self.optimizer = successor


def main(folder: Path) -> None:
    faulthandler.dump_traceback_later(TIME_LIMIT, exit=True)
    comm, found = MPI.COMM_WORLD, []
    cases = [Pieces(comm, kernel) for kernel in ("compiled", "blocked")]
    for case in cases:
        for _ in range(5):
            case.step()
    comm.Barrier()
    if comm.rank == KILLED:
        os.kill(os.getpid(), signal.SIGKILL)
    for case in cases:
        before, error = case.state(), MPI.SUCCESS
        try:
            case.step()
        except MPI.Exception as caught:
            error = caught.Get_error_class()
        found.append({"failed": error == MPI.ERR_PROC_FAILED, "changed": case.state() != before})
    survivors = comm.Shrink()
    for case, row in zip(cases, found, strict=True):
        case.carry_on(survivors)
        case.step()
        norms = survivors.allgather(repr(case.optimizer.norms()))
        row |= {"survivors": survivors.size, "steps": case.optimizer.steps, "agree": len(set(norms)) == 1}
    (folder / f"{comm.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
