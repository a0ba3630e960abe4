"""Norms and trust ratios, from what a step has computed anyway."""

from __future__ import annotations

from typing import Any, NamedTuple

from lars_array.core import Plan, coefficients

__all__ = ["Norms", "trust_ratios"]


class Norms(NamedTuple):
    """The norms of a layer at its last step.

    Parameters
    ----------
    parameter : float
        Of its parameters, before the step.
    gradient : float
        Of its gradient as it was given.
    """

    parameter: float
    gradient: float


def trust_ratios(step: Plan, *, xp: Any) -> Any:
    r"""Return each layer's trust ratio: its first-order step along the gradient, relative to that of SGD.

    Taken from the coefficients, :math:`(\kappa\alpha + \lambda)` over the same of SGD, so any rule has one.

    Parameters
    ----------
    step : Plan
        What `core.plan` returned.
    xp : Array API namespace
        Namespace of its arrays.

    Returns
    -------
    array of shape (layers,)
        1 where a layer was not adapted.
    """
    # A warm-up may start at lr = 0 and a buffer be damped to nothing: there is a ratio all the same, the limit.
    lr = step.hyper.lr
    lr = xp.where(lr == 0, float(xp.finfo(lr.dtype).smallest_normal) ** 0.5, lr)
    hyper = step.hyper._replace(lr=lr, dampening=0 * step.hyper.dampening)
    S = xp.stack([step.S[:, 0], step.gamma**2 * step.S[:, 1], step.S[:, 2]], axis=1)
    C = coefficients(S, hyper, step.rules, xp.ones_like(step.gamma), xp=xp)
    alpha, kappa, lam = C[:, 1], C[:, 3], C[:, 4]
    return (kappa * alpha + lam) / (hyper.lr * xp.where(hyper.nesterov, 1 + hyper.momentum, 1.0))
