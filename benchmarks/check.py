"""Whether a contestant computes what it claims: a benchmark of something else is worth nothing.

The gradient is the same in every step, so the parameters of a layer stay a combination of what they were and of the
gradient: p = p0 + a p0 + b g. Three sums over p0 and g, in float64, give a and b after any number of steps, and every
element of p is compared with them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks.arrays import BLOCK, GRADIENT, PARAMETER, blocks
from benchmarks.contestant import DECAY, ETA, LR, MOMENTUM
from benchmarks.shapes import Shape

__all__ = ["RATIOS", "Truth", "WrongArithmeticError"]

TOLERANCE = 1e-4  # of the change of the parameters, not of the parameters, which change by a hundredth of themselves
FLOAT32_TOLERANCE, MANY = 1e-2, 20_000_000  # for arrays of more elements than that, whose norms are float32 throughout
EPS = 1e-8  # of the libraries that have one

Norms = tuple[float, float, float]  # of the parameters, of the gradient, of the gradient with decay


class WrongArithmeticError(Exception):
    """A contestant's parameters are not what its rule gives."""


# The trust ratio of each rule. What else differs between them does not show with a constant lr and without zeros.
RATIOS: dict[str, Callable[[Norms], float]] = {
    "flash": lambda norms: ETA * norms[0] / (norms[1] + DECAY * norms[0] + EPS),
    "timm": lambda norms: ETA * norms[0] / (norms[1] + DECAY * norms[0] + EPS),
    "kozistr": lambda norms: ETA * norms[0] / (norms[1] + DECAY * norms[0]),
    "optax": lambda norms: ETA * norms[0] / norms[2],
    "sgd": lambda norms: 1.0,
}


class Truth:
    """What the parameters of a case are after some steps.

    Parameters
    ----------
    shapes : sequence of tuple of int
        Of the case.
    """

    def __init__(self, shapes: Sequence[Shape]) -> None:
        self.shapes = shapes
        self._sums = [_sums(layer, math.prod(shape)) for layer, shape in enumerate(shapes)]

    def check(self, params: Sequence[Any], rule: str, steps: int, *, float32_norms: bool = False) -> float:
        """Compare every element.

        Parameters
        ----------
        params : sequence of ndarray
            After the steps.
        rule : str
            A name in `RATIOS`.
        steps : int
            How many were taken.
        float32_norms : bool
            See `Contestant`.

        Returns
        -------
        float
            The largest error of a layer's change, norm by norm. Rounding alone makes it about 1e-5.

        Raises
        ------
        WrongArithmeticError
            If one differs by more, or is nan.
        """
        largest = 0.0
        shapes = [p.shape for p in params]
        if shapes != list(self.shapes):
            raise WrongArithmeticError("the arrays have other shapes than those of the case")
        for layer, p in enumerate(params):
            a, b = _change(self._sums[layer], rule, p.ndim, steps)
            tolerance = FLOAT32_TOLERANCE if float32_norms and p.size > MANY else TOLERANCE
            worst, error = _errors(p.reshape(-1), layer, (a, b), self._sums[layer], steps, tolerance)
            if not worst <= 1:
                raise WrongArithmeticError(f"array {layer} of shape {p.shape} is off by {worst:.3g} tolerances")
            largest = max(largest, error)
        return largest


def _sums(layer: int, size: int) -> Norms:
    """Return the sums over p0², g² and p0 g."""
    total = np.zeros(3)
    for p, g in zip(blocks(layer, PARAMETER, size), blocks(layer, GRADIENT, size)):
        p, g = p.astype(np.float64), g.astype(np.float64)
        total += p @ p, g @ g, p @ g
    p_squares, g_squares, product = total.tolist()
    return p_squares, g_squares, product


def _change(sums: Norms, rule: str, axes: int, steps: int) -> tuple[float, float]:
    """Return a and b of p = p0 + a p0 + b g, by the definition of LARS on these two numbers."""
    p_squares, g_squares, product = sums
    ratio, decay = RATIOS[rule], DECAY
    if rule == "kozistr" and axes < 2:
        ratio, decay = RATIOS["sgd"], 0.0

    def norm(p_part: float, g_part: float) -> float:
        return math.sqrt(p_part**2 * p_squares + 2 * p_part * g_part * product + g_part**2 * g_squares)

    a = b = v_p = v_g = 0.0
    for _ in range(steps):
        d_p, d_g = decay * (1 + a), 1 + decay * b
        r = ratio((norm(1 + a, b), norm(0, 1), norm(d_p, d_g)))
        v_p, v_g = MOMENTUM * v_p + r * d_p, MOMENTUM * v_g + r * d_g
        a, b = a - LR * v_p, b - LR * v_g
    return a, b


def _errors(
    p: Any, layer: int, factors: tuple[float, float], sums: Norms, steps: int, tolerance: float
) -> tuple[float, float]:
    """Return the largest error as a multiple of what is tolerated, nan if there is one, and that of all, relative.

    Tolerated are a part of the element's change and of a typical one, and rounding.
    """
    a, b = factors
    p_squares, g_squares, product = sums
    changes = a * a * p_squares + 2 * a * b * product + b * b * g_squares
    typical = math.sqrt(changes / p.size)
    worst, squares = 0.0, 0.0
    pairs = zip(blocks(layer, PARAMETER, p.size), blocks(layer, GRADIENT, p.size))
    for number, (old, g) in enumerate(pairs):
        old = old.astype(np.float64)
        change = a * old + b * g
        rounding = steps * np.finfo(np.float32).eps * np.abs(old + change)  # each step stores float32
        error = np.abs(p[number * BLOCK :][: old.size] - old - change)
        worst = np.maximum(worst, (error / (tolerance * (typical + np.abs(change)) + rounding)).max())
        squares += float(error @ error)
    return float(worst), math.sqrt(squares / changes)
