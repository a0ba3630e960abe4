"""What rules are made of: the norms, the trust ratio and the momentum form."""

from __future__ import annotations

from typing import Any

from lars_array.hyper import Hyper

__all__ = ["momentum_form", "norms", "trust_ratio", "update_weights"]

Array = Any
Namespace = Any


def norms(S: Array, xp: Namespace) -> tuple[Array, Array, Array]:
    """Return the three norms of each layer: of p, of g and of the rule's operand."""
    roots = xp.sqrt(S)
    return roots[:, 0], roots[:, 1], roots[:, 2]


def trust_ratio(p_norm: Array, denominator: Array, defined: Array, hyper: Hyper, xp: Namespace) -> Array:
    r"""Return each layer's trust ratio, :math:`\eta \|p\| / (\text{denominator} + \epsilon)`.

    1 where `defined` is false. Then `trust_bounds` are applied, then `trust_clip` (LARC):
    :math:`\min(\text{ratio} / \text{lr}, 1)`; last, a layer with ``adapt=False`` has the ratio 1.

    Parameters
    ----------
    p_norm, denominator : arrays of shape (layers,)
        Norm of the parameters, and what the rule divides it by, without eps.
    defined : bool array of shape (layers,)
        Where there is a ratio at all; usually where neither norm is zero.
    hyper : Hyper
        Hyper-parameters, arrays of shape (layers,).
    xp : Array API namespace
        Namespace of the arrays.

    Returns
    -------
    array of shape (layers,)
        The ratios.
    """
    denominator = denominator + hyper.eps
    defined = defined & (denominator > 0)
    ratio = hyper.trust_coefficient * p_norm / xp.where(defined, denominator, 1.0)
    ratio = xp.where(defined, ratio, 1.0)
    ratio = xp.where(ratio < hyper.trust_lower, hyper.trust_lower, ratio)
    ratio = xp.where(ratio > hyper.trust_upper, hyper.trust_upper, ratio)
    within_lr = ratio < hyper.lr
    larc = xp.where(within_lr, ratio / xp.where(within_lr, hyper.lr, 1.0), 1.0)
    return xp.where(hyper.adapt, xp.where(hyper.trust_clip, larc, ratio), 1.0)


def momentum_form(
    into: Array,
    out: Array,
    weight_decay: Array,
    hyper: Hyper,
    xp: Namespace,
    *,
    momentum: Array | None = None,
    starts_as_copy: bool = True,
) -> Array:
    r"""Return the coefficients of SGD with momentum around a scaled gradient, :math:`d = g + w p`.

    .. math::
        v' = \mu v + (1 - \tau)\,\text{into}\,d, \qquad
        p' = p - \text{out}\,v' \quad\text{or, nesterov,}\quad p' = p - \text{out}\,(\text{into}\,d + \mu v')

    `into` is what enters the buffer and `out` what the buffer is written with: on which side the learning rate and the
    trust ratio stand is what tells the peers apart. Without momentum, :math:`p' = p - \text{out}\,\text{into}\,d`.

    Parameters
    ----------
    into, out, weight_decay : arrays of shape (layers,)
        The two factors, and w.
    hyper : Hyper
        Hyper-parameters, arrays of shape (layers,).
    xp : Array API namespace
        Namespace of the arrays.
    momentum : array of shape (layers,), optional
        The factor of v, where it is not ``hyper.momentum``.
    starts_as_copy : bool
        Whether dampening spares a layer's first step, as in torch's SGD.

    Returns
    -------
    array of shape (layers, 6)
        The coefficients.
    """
    m = hyper.momentum if momentum is None else momentum
    alpha = into * (_undamped(hyper, xp) if starts_as_copy else 1 - hyper.dampening)
    direct = _direct(hyper)
    kappa = xp.where(direct, out * hyper.momentum, out)
    lam = xp.where(direct, out * into, 0.0)
    return xp.stack([m, alpha, alpha * weight_decay, kappa, lam, lam * weight_decay], axis=1)


def update_weights(hyper: Hyper, xp: Namespace) -> tuple[Array, Array]:
    """Return a and h for which a d + h v is what `momentum_form` writes with, before any ratio: SGD's update."""
    undamped = _undamped(hyper, xp)
    direct = _direct(hyper)
    a = xp.where(direct, 1 + hyper.momentum * undamped, undamped)
    return a, xp.where(direct, hyper.momentum**2, hyper.momentum)


def _undamped(hyper: Hyper, xp: Namespace) -> Array:
    return xp.where(hyper.first, 1.0, 1 - hyper.dampening)


def _direct(hyper: Hyper) -> Array:
    """Where the gradient reaches the parameters beside the buffer: nesterov, or no momentum at all."""
    return hyper.nesterov | (hyper.momentum == 0)
