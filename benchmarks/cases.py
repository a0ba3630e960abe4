"""What is measured, by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from benchmarks import shapes

__all__ = ["CASES", "GROUPS", "GROWTH", "Case", "chosen"]


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
    """

    title: str
    shapes: Callable[[], list[shapes.Shape]]
    rounds: int

    @property
    def sizes(self) -> list[int]:
        """The number of elements of each array."""
        return [math.prod(shape) for shape in self.shapes()]


CASES = {
    "resnet50": Case("ResNet-50", shapes.resnet50, 31),
    "vit-b": Case("ViT-B/16", shapes.vit_b, 21),
    "alexnet": Case("AlexNet", shapes.alexnet, 21),
    "tiny": Case("many small arrays", shapes.tiny, 15),
    "flat-100m": Case("one array", partial(shapes.flat, 10**8), 11),
}

# Measured by `benchmarks.growth`, in the same rounds.
_SIZES = {"growth-1m": 10**6, "growth-10m": 10**7, "growth-100m": 10**8, "growth-1b": 10**9}
GROWTH = {name: Case("one array", partial(shapes.flat, size), 11) for name, size in _SIZES.items()}

GROUPS = {
    "default": ["resnet50", "vit-b", "alexnet", "tiny", "growth"],
    "all": [*CASES, "growth"],
}


def chosen(names: Sequence[str]) -> list[str]:
    """Return the names of cases that are meant, each once, in the order of `CASES`, and then "growth".

    Parameters
    ----------
    names : sequence of str
        Names in `CASES` and `GROUPS`, and "growth".

    Raises
    ------
    ValueError
        For a name that is in neither.
    """
    meant = {name for group in names for name in GROUPS.get(group, [group])}
    known = [*CASES, "growth"]
    unknown = meant.difference(known)
    if unknown:
        raise ValueError(f"case must be one of {', '.join([*known, *GROUPS])}; got {min(unknown)!r}")
    return [name for name in known if name in meant]
