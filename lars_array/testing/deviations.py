"""The mistakes that the kit knows by name, in the order in which they are tried."""

from __future__ import annotations

from typing import Any

import numpy as np

from lars_array.core import Hyper
from lars_array.testing.reference import Coefficients, Deviation, Form, LayerNorms

__all__ = ["DEVIATIONS"]


def _at_first(norms: LayerNorms, hyper: Hyper) -> Any:
    """Return where a momentum buffer begins."""
    return hyper.first & (hyper.momentum != 0)


# ---------------------------------------------------------------------------------------------- momentum buffer


def _raw_copy(C: Coefficients, norms: LayerNorms, hyper: Hyper, form: Form) -> Coefficients:
    first = _at_first(norms, hyper)
    return C._replace(
        alpha=np.where(first, hyper.lr if form.rate_inside else 1.0, C.alpha), beta=np.where(first, 0.0, C.beta)
    )


def _raw_copy_always(C: Coefficients, norms: LayerNorms, hyper: Hyper, form: Form) -> Coefficients:
    first = hyper.first & (hyper.momentum == 0)
    lam = C.lam if form.scales_buffer else hyper.lr
    return _raw_copy(C, norms, hyper, form)._replace(lam=np.where(first, lam, C.lam), mu=np.where(first, 0.0, C.mu))


def _raw_start(C: Coefficients, norms: LayerNorms, hyper: Hyper, form: Form) -> Coefficients:
    return C._replace(alpha=C.alpha + np.where(_at_first(norms, hyper), C.m, 0.0))


def _doubled(C: Coefficients, norms: LayerNorms, hyper: Hyper, form: Form) -> Coefficients:
    factor = np.where(_at_first(norms, hyper), C.m + 1 - hyper.dampening, 1.0)
    return C._replace(alpha=C.alpha * factor, beta=C.beta * factor)


def _dampened_first(C: Coefficients, norms: LayerNorms, hyper: Hyper, form: Form) -> Coefficients:
    factor = np.where(_at_first(norms, hyper), 1 - hyper.dampening, 1.0)
    return C._replace(alpha=C.alpha * factor, beta=C.beta * factor)


def _undampened_first(C: Coefficients, norms: LayerNorms, hyper: Hyper, form: Form) -> Coefficients:
    factor = np.where(_at_first(norms, hyper), 1 / (1 - hyper.dampening), 1.0)
    return C._replace(alpha=C.alpha * factor, beta=C.beta * factor)


def _rate_inside(C: Coefficients, norms: LayerNorms, hyper: Hyper, form: Form) -> Coefficients:
    if form.rate_inside:
        return C
    return C._replace(alpha=C.alpha * hyper.lr, beta=C.beta * hyper.lr, kappa=C.kappa / hyper.lr)


def _rate_outside(C: Coefficients, norms: LayerNorms, hyper: Hyper, form: Form) -> Coefficients:
    if not form.rate_inside:
        return C
    return C._replace(alpha=C.alpha / hyper.lr, beta=C.beta / hyper.lr, kappa=C.kappa * hyper.lr)


# --------------------------------------------------------------------------------------------------- weight decay


def _never_decayed(C: Coefficients, norms: LayerNorms, hyper: Hyper, form: Form) -> Coefficients:
    return C._replace(beta=np.zeros_like(C.beta), mu=np.zeros_like(C.mu))


def _undecayed_at_zero(C: Coefficients, norms: LayerNorms, hyper: Hyper, form: Form) -> Coefficients:
    is_zero = norms.g == 0
    return C._replace(beta=np.where(is_zero, 0.0, C.beta), mu=np.where(is_zero, 0.0, C.mu))


def _decayed_at_zero(C: Coefficients, norms: LayerNorms, hyper: Hyper, form: Form) -> Coefficients:
    is_zero, w = norms.g == 0, hyper.weight_decay
    return C._replace(beta=np.where(is_zero, C.alpha * w, C.beta), mu=np.where(is_zero, C.lam * w, C.mu))


# --------------------------------------------------------------------------------------------------- trust ratio


def _scaled(C: Coefficients, factor: Any, form: Form) -> Coefficients:
    """Return the coefficients with the ratio multiplied by a factor."""
    if form.scales_buffer:
        return C._replace(kappa=C.kappa * factor, lam=C.lam * factor, mu=C.mu * factor)
    return C._replace(alpha=C.alpha * factor, beta=C.beta * factor, lam=C.lam * factor, mu=C.mu * factor)


def _ratio_at_zero(C: Coefficients, norms: LayerNorms, hyper: Hyper, form: Form) -> Coefficients:
    w = hyper.weight_decay
    is_zero = (norms.g == 0) & (norms.p != 0) & (w != 0)
    denominator = np.where(is_zero, w * norms.p + hyper.eps, 1.0)
    ratio = np.where(is_zero, hyper.trust_coefficient * norms.p / denominator, 1.0)
    return _scaled(_decayed_at_zero(C, norms, hyper, form), ratio, form)


def _stuck_at_zero(C: Coefficients, norms: LayerNorms, hyper: Hyper, form: Form) -> Coefficients:
    return _scaled(C, np.where(norms.p == 0, 0.0, 1.0), form)


def _without_decay(norms: LayerNorms, hyper: Hyper) -> Hyper:
    return hyper._replace(eps=hyper.eps - hyper.weight_decay * norms.p)


def _norm_of_sum(norms: LayerNorms, hyper: Hyper) -> Hyper:
    return hyper._replace(eps=hyper.eps + norms.d - norms.g - hyper.weight_decay * norms.p)


def _sum_of_norms(norms: LayerNorms, hyper: Hyper) -> Hyper:
    return hyper._replace(eps=hyper.eps - norms.d + norms.g + hyper.weight_decay * norms.p)


def _norm_of_gradient(norms: LayerNorms, hyper: Hyper) -> Hyper:
    return hyper._replace(eps=hyper.eps - norms.d + norms.g)


def _only_with_decay(norms: LayerNorms, hyper: Hyper) -> Hyper:
    return hyper._replace(adapt=hyper.adapt & (hyper.weight_decay != 0))


def _uncorrected(norms: LayerNorms, hyper: Hyper) -> Hyper:
    return hyper._replace(previous_lr=np.zeros_like(hyper.previous_lr))


BUFFER, DECAY, RATIO, VECTORS = "momentum buffer", "weight decay", "trust ratio", "layers with one axis"

DEVIATIONS = (
    Deviation(BUFFER, "it starts as the raw gradient, not as the scaled one", after=_raw_copy),
    Deviation(BUFFER, "it starts as the raw gradient, even where momentum is 0", after=_raw_copy_always),
    Deviation(BUFFER, "it starts as the raw gradient, to which the first step adds the scaled one", after=_raw_start),
    Deviation(BUFFER, "it starts as the scaled gradient, which the first step adds once more", after=_doubled),
    Deviation("momentum", "it is ignored", options={"momentum": 0.0, "nesterov": False}),
    Deviation("nesterov", "it is ignored", options={"nesterov": False}),
    Deviation("dampening", "it is ignored", options={"dampening": 0.0}),
    Deviation("dampening", "it also acts on the first step", after=_dampened_first),
    Deviation("dampening", "it does not act on the first step", after=_undampened_first),
    Deviation("learning rate", "it is inside the momentum buffer, not outside", after=_rate_inside),
    Deviation("learning rate", "it is outside the momentum buffer, not inside", after=_rate_outside),
    Deviation("momentum", "it is not corrected by the ratio of the learning rates", before=_uncorrected),
    Deviation(DECAY, "the weights are never decayed; it is in the trust ratio only", after=_never_decayed),
    Deviation(DECAY, "it is ignored", options={"weight_decay": 0.0}),
    Deviation(DECAY, "it is ignored, but layers are adapted", options={"weight_decay": 0.0, "always_adapt": True}),
    Deviation(DECAY, "it is dropped where the gradient is zero", after=_undecayed_at_zero),
    Deviation(DECAY, "it still acts where the gradient is zero", after=_decayed_at_zero),
    Deviation(DECAY, "it acts where the gradient is zero, scaled by the trust ratio", after=_ratio_at_zero),
    Deviation(RATIO, "its norms are those of the whole network, not of the layer", joins=True),
    Deviation(RATIO, "there is none: the steps are those of SGD", options={"adapt": False}),
    Deviation("trust coefficient", "it is ignored, as if it were 1", options={"trust_coefficient": 1.0}),
    Deviation("trust coefficient", "it is always 0.001", options={"trust_coefficient": 1e-3}),
    Deviation("eps", "it is missing", options={"eps": 0.0}),
    Deviation("eps", "it is always 1e-8", options={"eps": 1e-8}),
    Deviation(RATIO, "its denominator lacks the weight decay", before=_without_decay),
    Deviation(RATIO, "it divides by the norm of g + w p, not by the sum of the norms of both", before=_norm_of_sum),
    Deviation(RATIO, "it divides by the sum of the norms of g and w p, not by the norm of both", before=_sum_of_norms),
    Deviation(RATIO, "it divides by the norm of the gradient without weight decay", before=_norm_of_gradient),
    Deviation(RATIO, "it is divided by the learning rate, and at most 1 (LARC)", options={"trust_clip": True}),
    Deviation(RATIO, "it is at most 1", options={"trust_bounds": (0.0, 1.0)}),
    Deviation(RATIO, "it is 0 for a layer of zeros, which never moves", after=_stuck_at_zero),
    Deviation(RATIO, "layers without weight decay are adapted too", options={"always_adapt": True}),
    Deviation(RATIO, "layers without weight decay are not adapted", before=_only_with_decay),
    Deviation(
        VECTORS, "they are neither decayed nor adapted", options={"weight_decay": 0.0, "adapt": False}, of_vectors=True
    ),
    Deviation(VECTORS, "they are not adapted", options={"adapt": False}, of_vectors=True),
    Deviation(VECTORS, "they are not decayed", options={"weight_decay": 0.0}, of_vectors=True),
)
