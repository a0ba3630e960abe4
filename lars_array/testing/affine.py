"""A step written as a sum of its momentum buffer, gradient and parameters, which every LARS is."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["compared"]

# What is wrong where the factor of an array differs.
_TERMS = {"v": "momentum", "g": "learning rate times trust ratio", "p": "weight decay"}


def compared(found: Any, expected: Any, arrays: dict[str, Any], bound: float) -> str:
    """Return in words how a step p - p' differs from the expected one.

    `arrays` holds v, g and p before the step; factors that differ by less than `bound` count as the same.
    """
    if not np.all(np.isfinite(found)):
        return "p' is not finite"
    basis = _independent(arrays)
    (ours, rest), (theirs, _) = _factors(found, basis), _factors(expected, basis)
    length = max(np.max(np.abs(found)), np.max(np.abs(expected)))
    if rest > max(1e-6, 100 * bound) * length:
        worst = np.max(np.abs(found - expected)) / max(np.max(np.abs(expected)), np.finfo(float).tiny)
        return f"p - p' is not a sum of multiples of {', '.join(basis)}; it is off by {worst:.2g} of the expected step"
    scales = {name: np.max(np.abs(x)) for name, x in basis.items()}
    wrong = [name for name in basis if abs(ours[name] - theirs[name]) * scales[name] > bound * length]
    ours, theirs = (
        {name: c for name, c in factors.items() if abs(c) * scales[name] > bound * length} for factors in (ours, theirs)
    )
    terms = f"; wrong: {', '.join(_TERMS[name] for name in wrong)}" if wrong else ""
    digits = 6 if _sum(ours, 6) != _sum(theirs, 6) else 12
    return f"p - p' = {_sum(ours, digits)}, expected {_sum(theirs, digits)}{terms}"


def _independent(arrays: dict[str, Any]) -> dict[str, Any]:
    """Return the arrays that are not zero, without those that are combinations of earlier ones."""
    basis: dict[str, Any] = {}
    for name, x in arrays.items():
        columns = [y.ravel() / np.linalg.norm(y) for y in (*basis.values(), x) if np.any(y)]
        if len(columns) > len(basis) and np.linalg.matrix_rank(np.stack(columns), tol=1e-8) == len(columns):
            basis[name] = x
    return basis


def _factors(step: Any, basis: dict[str, Any]) -> tuple[dict[str, float], float]:
    """Return the factors of the least-squares fit, and the largest entry that remains."""
    if not basis:
        return {}, float(np.max(np.abs(step)))
    lengths = [np.linalg.norm(x) for x in basis.values()]
    columns = np.stack([x.ravel() / length for x, length in zip(basis.values(), lengths, strict=True)], axis=1)
    solution = np.linalg.lstsq(columns, step.ravel(), rcond=None)[0]
    rest = float(np.max(np.abs(columns @ solution - step.ravel())))
    return {name: float(c / length) for name, c, length in zip(basis, solution, lengths, strict=True)}, rest


def _sum(factors: dict[str, float], digits: int) -> str:
    return " + ".join(f"{factor:.{digits}g} {name}" for name, factor in factors.items()).replace("+ -", "- ") or "0"
