"""Norms and trust ratios, from what a step has computed anyway."""

from __future__ import annotations

from typing import Any, NamedTuple

from array_api_compat import array_namespace

from lars_array.core import coefficients
from lars_array.hyper import Hyper
from lars_array.layers import Taken

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


def trust_ratios(step: Taken) -> Any:
    r"""Return each layer's trust ratio: its first-order step along the gradient, relative to that of SGD.

    Taken from the coefficients, :math:`(\kappa\alpha + \lambda)` over the same of SGD, so any rule has one.

    Parameters
    ----------
    step : Taken
        What `Layers.step` returned.

    Returns
    -------
    array of shape (layers,)
        1 where a layer was not adapted.
    """
    (S, gamma, _, hyper, rules), kind_of = step.planned(), step.kind_of
    xp = array_namespace(S)
    if kind_of is not None:
        gamma, hyper = xp.take(gamma, kind_of), Hyper(*(xp.take(field, kind_of) for field in hyper))
        rules = [rules[kind] for kind in kind_of.tolist()]
    # A warm-up may start at lr = 0 and a buffer be damped to nothing: there is a ratio all the same, the limit.
    lr = xp.where(hyper.lr == 0, float(xp.finfo(hyper.lr.dtype).smallest_normal) ** 0.5, hyper.lr)
    hyper = hyper._replace(lr=lr, dampening=0 * hyper.dampening)
    S = xp.stack([S[:, 0], gamma**2 * S[:, 1], S[:, 2]], axis=1)
    C = coefficients(S, hyper, rules, xp.ones_like(gamma), xp=xp)
    alpha, kappa, lam = C[:, 1], C[:, 3], C[:, 4]
    return (kappa * alpha + lam) / (hyper.lr * xp.where(hyper.nesterov, 1 + hyper.momentum, 1.0))
