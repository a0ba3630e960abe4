"""What `benchmarks.compare` measures of two checkouts."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from functools import partial
from typing import Any, NamedTuple

from benchmarks import host, shapes
from benchmarks.arrays import GRADIENT, PARAMETER, make
from benchmarks.contestant import OPTIONS, Run, UnavailableError
from benchmarks.contestants import TRACED
from benchmarks.peers import moving, our_jax, our_lars, our_torch

__all__ = ["COMPARISONS", "DEFAULT", "PEER", "Comparison", "chosen", "kept_bytes"]

PEER = "torch.optim.SGD(fused=True)"


class Comparison(NamedTuple):
    """A step, or what it keeps.

    Parameters
    ----------
    shapes : callable
        Returns the shapes of the parameters.
    build : callable, optional
        ``build(params, grads) -> Run``. None: it is memory that is measured, not time.
    peer : callable, optional
        The same of something to be timed beside it, in the same process.
    most_arrays : int, optional
        Beyond so many it is skipped, because compiling takes minutes.
    """

    shapes: Callable[[], list[shapes.Shape]]
    build: Callable[[list[Any], list[Any]], Run] | None
    peer: Callable[[list[Any], list[Any]], Run] | None = None
    most_arrays: int | None = None

    def runs(self) -> dict[str, Run]:
        """Return what is to be timed, with arrays of its own: "" and perhaps `PEER`."""
        found = {}
        sizes = self.shapes()
        if self.most_arrays is not None and len(sizes) > self.most_arrays:
            raise UnavailableError(f"compiling {len(sizes):,} arrays takes too long")
        for name, build in (("", self.build), (PEER, self.peer)):
            if build is not None:
                found[name] = build(make(sizes, PARAMETER), make(sizes, GRADIENT))
        return found


CONTESTANTS: dict[str, tuple[Callable[[list[Any], list[Any]], Run], int | None]] = {
    "lars_array, raise": (our_lars.compiled, None),
    "lars_array, propagate": (our_lars.compiled_unchecked, None),
    "lars_torch": (our_torch.build, None),
    "lars_jax.lars, jitted": (partial(our_jax.build, donate=False), TRACED),
    "lars_jax.lars, jitted, donated": (partial(our_jax.build, donate=True), TRACED),
    "lars_jax.LARS": (our_jax.build_eager_copying, None),
    "lars_jax.LARS, donated": (our_jax.build_eager, None),
}

CASES: dict[str, Callable[[], list[shapes.Shape]]] = {
    "resnet50": shapes.resnet50,
    "vit-b": shapes.vit_b,
    "tiny": shapes.tiny,
    "small": lambda: [(7, 3), (5,), (40, 40)],  # to see whether all of it runs
}


def _host(count: int) -> list[shapes.Shape]:
    return [(64,)] * count


COMPARISONS = {
    f"{case}: {name}": Comparison(of, build, most_arrays=most)
    for case, of in CASES.items()
    for name, (build, most) in CONTESTANTS.items()
}
COMPARISONS |= {
    f"host-{count}: lars_torch": Comparison(partial(_host, count), moving.lars, moving.sgd) for count in (161, 1000)
}
COMPARISONS |= {
    f"host-cuda: {name}, {kind}": Comparison(
        shapes.resnet50, partial(build, **changes), partial(host.CONTESTANTS[host.SGD], **changes)
    )
    for name, build in host.CONTESTANTS.items()
    if "SGD" not in name
    for kind, changes in host.KINDS.items()
}
COMPARISONS["memory: lars_array"] = Comparison(shapes.tiny, None)

DEFAULT = ("resnet50", "vit-b", "tiny", "host-161", "host-1000", "memory")


def chosen(patterns: Sequence[str]) -> list[str]:
    """Return the names that are meant by names of cases, or by patterns of full names, in the order of `COMPARISONS`.

    Raises
    ------
    ValueError
        For one that means nothing.
    """

    def meant(name: str, pattern: str) -> bool:
        return name.partition(":")[0] == pattern or fnmatch(name, pattern)

    for pattern in patterns:
        if not any(meant(name, pattern) for name in COMPARISONS):
            cases = ", ".join(dict.fromkeys(name.partition(":")[0] for name in COMPARISONS))
            raise ValueError(f"case must be one of {cases}, or a pattern like 'tiny: lars_jax*'; got {pattern!r}")
    return [name for name in COMPARISONS if any(meant(name, pattern) for pattern in patterns)]


def kept_bytes(sizes: Sequence[shapes.Shape]) -> float:
    """Return the most bytes an array that building `lars_array.LARS` and two steps take beside p, g and v."""
    from lars_array import LARS

    few = [(8, 8)]
    LARS(make(few, PARAMETER), **OPTIONS).step(make(few, GRADIENT))  # for what is kept once a process
    params, grads = make(sizes, PARAMETER), make(sizes, GRADIENT)
    tracemalloc.start()
    try:
        optimizer = LARS(params, **OPTIONS)
        for _ in range(2):
            optimizer.step(grads)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    return (most - sum(p.nbytes for p in params)) / len(params)
