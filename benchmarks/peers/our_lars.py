"""`lars_array.LARS` with each kernel."""

from __future__ import annotations

from typing import Any

from benchmarks.contestant import OPTIONS, Run, UnavailableError

__all__ = ["blocked", "compiled", "compiled_unchecked"]


def compiled_unchecked(params: list[Any], grads: list[Any]) -> Run:
    """The compiled kernel, doing what peers do about what is not finite: nothing."""
    return _build(params, grads, kernel="compiled", nonfinite="propagate")


def compiled(params: list[Any], grads: list[Any]) -> Run:
    """The compiled kernel as users get it: a step over what is not finite is refused before anything is written."""
    return _build(params, grads, kernel="compiled")


def blocked(params: list[Any], grads: list[Any]) -> Run:
    """The NumPy kernel, with the same promise."""
    return _build(params, grads, kernel="blocked")


def _build(params: list[Any], grads: list[Any], **options: Any) -> Run:
    from lars_array import LARS

    try:
        optimizer = LARS(params, **OPTIONS, **options)
    except ValueError as error:  # no such kernel, or not here
        raise UnavailableError(str(error)) from error
    return Run(lambda: optimizer.step(grads), lambda: params)
