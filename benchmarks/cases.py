"""What is measured, by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from benchmarks import shapes

__all__ = ["CASES", "GROUPS", "Case", "chosen"]


class Case(NamedTuple):
    """A list of arrays to step over, and how often.

    Parameters
    ----------
    title : str
        For people.
    shapes : callable
        Returns the shapes.
    rounds : int
        How often each contestant is timed, if the command line does not say.
    everyone : bool
        False: only lars_array's kernels and the limit.
    """

    title: str
    shapes: Callable[[], list[shapes.Shape]]
    rounds: int
    everyone: bool = True

    @property
    def sizes(self) -> list[int]:
        """The number of elements of each array."""
        return [math.prod(shape) for shape in self.shapes()]


CASES = {
    "resnet50": Case("ResNet-50", shapes.resnet50, 31),
    "vit-b": Case("ViT-B/16", shapes.vit_b, 21),
    "alexnet": Case("AlexNet", shapes.alexnet, 21),
    "tiny": Case("many small arrays", shapes.tiny, 15),
    "growth-1m": Case("one array", partial(shapes.flat, 10**6), 101, everyone=False),
    "growth-10m": Case("one array", partial(shapes.flat, 10**7), 51, everyone=False),
    "growth-100m": Case("one array", partial(shapes.flat, 10**8), 11, everyone=False),
    "flat-100m": Case("one array", partial(shapes.flat, 10**8), 11),
    "flat-1b": Case("one array", partial(shapes.flat, 10**9), 5, everyone=False),
}

_GROWTH = ["growth-1m", "growth-10m", "growth-100m"]
GROUPS = {
    "growth": _GROWTH,
    "default": ["resnet50", "vit-b", "alexnet", "tiny", *_GROWTH],
    "all": list(CASES),
}


def chosen(names: Sequence[str]) -> list[str]:
    """Return the names of cases that are meant, each once, in the order of `CASES`.

    Parameters
    ----------
    names : sequence of str
        Names in `CASES` and `GROUPS`.

    Raises
    ------
    ValueError
        For a name that is in neither.
    """
    meant = {name for group in names for name in GROUPS.get(group, [group])}
    unknown = meant - CASES.keys()
    if unknown:
        raise ValueError(f"case must be one of {', '.join([*CASES, *GROUPS])}; got {min(unknown)!r}")
    return [name for name in CASES if name in meant]
