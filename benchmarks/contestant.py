"""What a contestant is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

__all__ = [
    "DECAY",
    "ETA",
    "FLOOR",
    "LARS",
    "LIMIT",
    "LR",
    "MOMENTUM",
    "OPTIONS",
    "Contestant",
    "Run",
    "UnavailableError",
]

# Of all contestants. The lr is large enough for float32 to show in three steps what was computed.
LR, MOMENTUM, DECAY, ETA = 1.0, 0.9, 1e-4, 1e-3
OPTIONS: dict[str, Any] = {"lr": LR, "momentum": MOMENTUM, "weight_decay": DECAY, "trust_coefficient": ETA}

# What a contestant is measured as.
LARS = "LARS"
FLOOR = "floor, not LARS"
LIMIT = "limit, not LARS"


class UnavailableError(Exception):
    """A contestant can't take part on this machine; the message says why."""


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Run:
    """A contestant with its arrays.

    Parameters
    ----------
    step : callable
        Takes a step, and returns when it is done.
    parameters : callable
        Returns the parameters as they are now, NumPy arrays in the order of the shapes.
    before : callable
        What must be done before each step, and is not timed.
    """

    step: Callable[[], object]
    parameters: Callable[[], list[Any]]
    before: Callable[[], object] = _nothing


@dataclass(frozen=True)
class Contestant:
    """Something that takes a step over a list of arrays.

    Parameters
    ----------
    name : str
        Unique.
    build : callable
        ``build(params, grads) -> Run`` of lists of float32 NumPy arrays, which it may empty to give back memory. Raises
        ImportError or `UnavailableError` if it can't take part.
    rule : str
        What it claims to compute, see `benchmarks.check.RATIOS`.
    kind : str
        LARS, or what else it is.
    distribution : str, optional
        The package whose version belongs behind the name.
    copies : int
        How many arrays of the size of the parameters are kept: parameters, gradients, momentum, and what only the
        benchmark needs.
    float32_norms : bool
        Whether it adds squares one after the other in float32, as torch does: for 100 M elements that is good to three
        digits.
    most_arrays : int, optional
        Beyond so many it is skipped, because compiling takes minutes or hours.
    in_place : bool
        Whether a step allocates next to nothing; `tracemalloc` tells how much.
    """

    name: str
    build: Callable[[list[Any], list[Any]], Run]
    rule: str = "flash"
    kind: str = LARS
    distribution: str | None = None
    copies: int = 3
    float32_norms: bool = False
    most_arrays: int | None = None
    in_place: bool = False

    @property
    def label(self) -> str:
        """The name, the version if one belongs there, and what it is if it is not LARS."""
        label = self.name
        if self.distribution is not None:
            try:
                label = label.replace(self.distribution, f"{self.distribution} {version(self.distribution)}", 1)
            except PackageNotFoundError:
                pass
        return label if self.kind == LARS else f"{label} ({self.kind})"
