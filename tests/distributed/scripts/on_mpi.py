"""Run by `test_mpi.py` in four processes under mpirun; the first prints JSON."""

from __future__ import annotations

import faulthandler
import json
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
from assertions import fingerprint
from launch import TIME_LIMIT
from mpi4py import MPI

from lars_array import LARS, collectives, warmup_cosine

STEPS = 24

# Cut along their first axes into pieces for four processes: even and uneven ones, and some of length 0.
SHAPES = {"even": (8, 6), "uneven": (7, 5), "few": (2, 3), "last": (3, 4), "bias": (6,), "one": (1,), "whole": (4, 3)}
PLAIN = ("bias", "one")

# As a flat vector: two processes have a part from the middle of one layer, and the last one has padding only.
TABLE = [("long", 0, 100), ("short", 103, 28)]
SLICE = 45

KERNELS = ("compiled", "blocked")
OPTIONS: dict[str, dict[str, Any]] = {
    "flash": {},
    "flash, nesterov, skip": {"nesterov": True, "nonfinite": "skip"},
    "flash, clipped": {"max_grad_norm": 0.5},
    "optax": {"rule": "optax"},
    "optax, clipped": {"rule": "optax", "max_grad_norm": 0.5},
    "nvidia": {"rule": "nvidia"},
    "nvidia, clipped, propagate": {"rule": "nvidia", "max_grad_norm": 0.5, "nonfinite": "propagate"},
}

Arrays = dict[str, Any]


class Counted:
    """A communicator that notes how often it adds arrays, and of which types."""

    def __init__(self, comm: Any) -> None:
        self.comm, self.calls, self.dtypes = comm, 0, set[str]()

    def Get_size(self) -> int:  # noqa: N802
        return int(self.comm.Get_size())

    def Allreduce(self, sent: Any, table: Any) -> None:  # noqa: N802
        self.calls += 1
        self.dtypes.add(table.dtype.name)
        self.comm.Allreduce(sent, table)


class Case:
    """A model in pieces, one a process, beside the whole model, which every process steps as well.

    Parameters
    ----------
    comm : mpi4py.MPI.Comm
        The processes.
    lists_layers : bool
        Whether pieces of length 0 are left out, and `layers` is given instead.
    dtype : dtype
        Of parameters and gradients.
    **options : object
        Of LARS.
    """

    def __init__(self, comm: Any, *, lists_layers: bool = False, dtype: Any = np.float32, **options: Any) -> None:
        self.comm, self.counted, self.dtype = comm, Counted(comm), dtype
        self.lists_layers = lists_layers
        self.whole = self.draw(0)
        self.pieces = {name: x.copy() for name, x in self.cut(self.whole).items()}
        options = {"lr": warmup_cosine(0.5, STEPS, 4), "momentum": 0.9, "weight_decay": 0.01} | options
        self.theirs = LARS(self.groups(self.whole), **options)
        if lists_layers:
            options["layers"] = [name for name in SHAPES if name != "whole"]
        self.ours = LARS(self.groups(self.pieces), all_reduce=collectives.mpi(self.counted), **options)

    def draw(self, seed: int) -> Arrays:
        rng = np.random.default_rng(seed)
        return {name: rng.normal(size=shape).astype(self.dtype) for name, shape in SHAPES.items()}

    def groups(self, arrays: Arrays) -> list[dict[str, Any]]:
        plain = {"weight_decay": 0.0, "adapt": False, "lr": 0.05}
        return [
            {"params": {name: x for name, x in arrays.items() if name not in (*PLAIN, "whole")}},
            {"params": {name: arrays[name] for name in PLAIN if name in arrays}, **plain},
            {"params": {"whole": arrays["whole"]}, "all_reduce": None},
        ]

    def cut(self, arrays: Arrays) -> Arrays:
        pieces = {name: self.piece(name, x) for name, x in arrays.items()}
        return {name: x for name, x in pieces.items() if x.size or not self.lists_layers}

    def piece(self, name: str, x: Any) -> Any:
        rank, size = self.comm.rank, self.comm.size
        if name in ("whole", "last"):
            return x if name == "whole" or rank == size - 1 else x[:0]
        return np.array_split(x, size)[rank]

    def train(self, steps: range) -> None:
        for t in steps:
            grads = self.draw(1000 + t)
            self.theirs.step(grads)
            self.ours.step(self.cut(grads))

    def go_wrong(self, spoil: Callable[[Arrays], Any], **options: Any) -> dict[str, Any]:
        """Take a step with gradients that `spoil` changes, between others."""
        self.train(range(4))
        before, error, rate = self.state(), "", self.ours.param_groups[0]["lr"]
        grads = self.cut(self.draw(99))
        self.comm.Barrier()
        begin = time.perf_counter()
        try:
            self.ours.step(spoil(grads), **options)
        except Exception as caught:
            error = f"{type(caught).__name__}: {caught}"
        seconds = time.perf_counter() - begin
        self.ours.param_groups[0]["lr"] = rate
        own = {"error": error, "changed": self.state() != before, "skipped": self.ours.skipped_steps}
        self.train(range(4, 8))
        return self.result() | {"ranks": self.comm.allgather(own | {"seconds": seconds})}

    def state(self) -> Any:
        return fingerprint([self.pieces, self.ours.state_dict()["state"], self.ours.steps])

    def result(self) -> dict[str, Any]:
        """Return how far this is from the whole model, and what differs between the processes."""
        telemetry = self.comm.allgather({name: repr(x) for name, x in self.telemetry(self.ours).items()})
        theirs = self.telemetry(self.theirs)
        off = [np.abs(np.array(x) / np.array(theirs[name]) - 1) for name, x in self.telemetry(self.ours).items()]
        wholes = self.comm.allgather(fingerprint(self.pieces["whole"]))
        return {
            "distance": max(self.comm.allgather(self.distance())),
            "norms off": float(np.max(off)),
            "norms differ": any(x[name] != telemetry[-1].get(name, x[name]) for x in telemetry for name in x),
            "wholes differ": any(x != wholes[0] for x in wholes),
            "calls": (self.counted.calls - 1) / self.ours.steps,  # one compares the layers before the first step
            "dtypes": sorted(self.counted.dtypes),
        }

    @staticmethod
    def telemetry(optimizer: LARS) -> dict[str, tuple[float, ...]]:
        ratios = optimizer.trust_ratios()
        return {name: (*x, ratios[name]) for name, x in optimizer.norms().items()}

    def distance(self) -> float:
        """Return the largest difference, of parameters and of all that is kept for them, relative to the whole arrays.

        With master weights it is theirs: what they are rounded to may differ by the last place.
        """
        ours, theirs = self.ours.state_views(), self.theirs.state_views()
        worst = 0.0
        for name, piece in self.pieces.items():
            pairs = [(ours[name][key], x) for key, x in theirs[name].items() if key != "previous_lr"]
            pairs += [] if "master" in theirs[name] else [(piece, self.whole[name])]
            for own, x in pairs:
                difference = np.abs(own - self.piece(name, x)).max(initial=0.0)
                worst = max(worst, float(difference / np.abs(x).max()))
        return worst


def in_a_flat_vector(comm: Any, kernel: str) -> dict[str, Any]:
    """Step slices of one vector, whose elements 100 to 102, and 131 onwards, are padding."""
    rng, padding = np.random.default_rng(0), np.r_[100:103, 131:180]
    start = SLICE * comm.rank
    whole, grads = rng.normal(size=180).astype(np.float32), rng.normal(size=(STEPS, 180)).astype(np.float32)
    grads[:, padding] = np.nan
    buffer, options = whole[start : start + SLICE].copy(), {"momentum": 0.9, "weight_decay": 0.01, "kernel": kernel}
    theirs = LARS({name: whole[at : at + length] for name, at, length in TABLE}, 0.5, **options)
    pieces = collectives.flat_pieces(buffer, start, TABLE)
    ours = LARS(pieces, 0.5, all_reduce=collectives.mpi(comm), **options)
    for g in grads:
        theirs.step([g[at : at + length] for _, at, length in TABLE])
        ours.step(collectives.flat_pieces(g[start : start + SLICE], start, TABLE))
    norms = comm.allgather(repr(ours.norms()))
    distance = float(np.abs(buffer - whole[start : start + SLICE]).max() / np.abs(whole).max())
    return {
        "distance": max(comm.allgather(distance)),
        "norms differ": any(x != norms[0] for x in norms),
        "lengths": comm.allgather([len(x) for x in pieces.values()]),
    }


def norm_of_many_equal(comm: Any) -> float:
    """Return how far the norm of 67 million equal elements is from the true one."""
    p, g = (np.full((1 << 26) // comm.size, 0.1, np.float32) for _ in range(2))
    optimizer = LARS({"w": p}, 0.1, weight_decay=0.1, all_reduce=collectives.mpi(comm))
    optimizer.step({"w": g})
    return abs(optimizer.norms()["w"].parameter / (float(np.float32(0.1)) * 2**13) - 1)


def with_other_layers(comm: Any) -> list[str]:
    """Return the errors where one process has other layers than the others."""
    names = ("a", "b") if comm.rank != 2 else ("a", "c", "d")
    optimizer = LARS({name: np.ones(3) for name in names}, 0.1, all_reduce=collectives.mpi(comm), weight_decay=0.1)
    try:
        optimizer.step([np.ones(3)] * len(names))
    except ValueError as caught:
        return comm.allgather(str(caught))
    return comm.allgather("")


def wrong_steps(comm: Any, kernel: str) -> dict[str, dict[str, Any]]:
    """Return the results of steps in which one process is not like the others."""

    def on(rank: int, change: Callable[[Arrays], Any]) -> Callable[[Arrays], Any]:
        return lambda grads: grads | change(grads) if comm.rank == rank else grads

    def nan(name: str) -> Callable[[Arrays], Any]:
        return lambda grads: {name: grads[name] * np.nan}

    def case(**options: Any) -> Case:
        return Case(comm, kernel=kernel, **options)

    def of_rate(rate: float) -> dict[str, Any]:
        own = case()
        return own.go_wrong(on(3, lambda grads: own.ours.param_groups[0].update(lr=rate) or {}))

    return {
        "learning rate": of_rate(0.2),
        "negative learning rate": of_rate(-1.0),
        "shape": case().go_wrong(on(1, lambda grads: {"uneven": np.ones((9, 9))})),
        "nan, raise": case().go_wrong(on(2, nan("uneven"))),
        "nan, skip": case(nonfinite="skip").go_wrong(on(2, nan("uneven"))),
        "nan in a whole layer": case().go_wrong(on(2, nan("whole"))),
        "no gradient": case().go_wrong(on(0, lambda grads: {"even": None})),
        "found_inf": case().go_wrong(lambda grads: grads, found_inf=float(comm.rank == 3)),
    }


def late_step(comm: Any) -> dict[str, Any]:
    """Return the results of steps to one of which the last process comes three seconds late."""
    case = Case(comm)
    case.train(range(4))
    comm.Barrier()
    begin = time.perf_counter()
    if comm.rank == comm.size - 1:
        time.sleep(3)
    case.train(range(4, 5))
    seconds = comm.allgather(time.perf_counter() - begin)
    case.train(range(5, 8))
    return case.result() | {"seconds": seconds}


def main() -> None:
    faulthandler.dump_traceback_later(TIME_LIMIT, exit=True)
    comm = MPI.COMM_WORLD
    runs: dict[str, Any] = {}

    def run(name: str, case: Case) -> None:
        case.train(range(STEPS))
        runs[name] = case.result()

    for kernel in KERNELS:
        for name, options in OPTIONS.items():
            run(f"{kernel}: {name}", Case(comm, kernel=kernel, **options))
        run(f"{kernel}: with a list of layers", Case(comm, kernel=kernel, lists_layers=True))
        for dtype in ("float64", "float16", *(["bfloat16"] if find_spec("ml_dtypes") else [])):
            wide = {"master_weights": dtype != "float64", "dtype": np.dtype(_named(dtype))}
            run(f"{kernel}: {dtype}", Case(comm, kernel=kernel, **wide))
    found = {
        "runs": runs,
        "flat": {kernel: in_a_flat_vector(comm, kernel) for kernel in KERNELS},
        "wrong": {kernel: wrong_steps(comm, kernel) for kernel in KERNELS},
        "late": late_step(comm),
        "other layers": with_other_layers(comm),
        "many equal": norm_of_many_equal(comm),
    }
    if comm.rank == 0:
        print(json.dumps(found))


def _named(dtype: str) -> Any:
    if dtype != "bfloat16":
        return dtype
    import ml_dtypes

    return ml_dtypes.bfloat16


if __name__ == "__main__":
    main()
