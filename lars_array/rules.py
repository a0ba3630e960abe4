r"""The variants of LARS by name, each a few lines from the same building blocks, and presets of their defaults.

Every rule is a function ``rule(S, hyper, xp) -> C``, see `lars_array.Rule`. Notation in the docstrings: :math:`\eta`
trust coefficient, w weight decay, :math:`\mu` momentum, :math:`\tau` dampening, :math:`r` trust ratio,
:math:`d = g + w p`, RAW :math:`\eta\|p\| / (\|g\| + w\|p\| + \epsilon)` and SUM :math:`\eta\|p\| / (\|d\| + \epsilon)`.
"""

from __future__ import annotations

from typing import Any

from lars_array._messages import listed, near, shown
from lars_array.core import RULES, Hyper, flash, momentum_form, norms, register, trust_ratio

__all__ = [
    "PRESETS",
    "apex",
    "barlow",
    "flash",
    "kozistr",
    "nus",
    "nvidia",
    "optax",
    "paddle",
    "paper",
    "preset",
    "simclr_popular",
    "tf_contrib",
    "timm",
]

Array = Any
Namespace = Any


def _raw_ratio(S: Array, hyper: Hyper, xp: Namespace) -> Array:
    """Return RAW, or 1 where a norm is zero."""
    p_norm, g_norm, _ = norms(S, xp)
    return trust_ratio(p_norm, g_norm + hyper.weight_decay * p_norm, ~((p_norm == 0) | (g_norm == 0)), hyper, xp)


def _sum_ratio(S: Array, hyper: Hyper, xp: Namespace) -> Array:
    """Return SUM with the norm of the third sum, or 1 where a norm is zero."""
    p_norm, _, d_norm = norms(S, xp)
    return trust_ratio(p_norm, d_norm, ~((p_norm == 0) | (d_norm == 0)), hyper, xp)


def _buffer_ratio(S: Array, hyper: Hyper, xp: Namespace) -> Array:
    """Return RAW for a step that scales the whole buffer, which may be far larger than the gradient.

    It is at most the root of the largest ratio: that of the least gradients whose square the compute dtype can hold.
    """
    return _raw_ratio(S, hyper._replace(max_ratio_root=xp.sqrt(hyper.max_ratio_root)), xp)


@register("paper", "mmselfsup")
@register("mlperf", "open-lars", "tinygrad", "tf-tpu", keeps_buffer=True)
def paper(S: Array, hyper: Hyper, xp: Namespace) -> Array:
    r"""Algorithm 1 of the paper: :math:`v' = \mu v + \text{lr}\,r\,d, p' = p - v'`, r = RAW, with lr inside the buffer.

    Where a norm is zero, r = 1 and weight decay still applies. With nesterov
    :math:`p' = p - (\mu v' + \text{lr}\,r\,d)`.

    Sources: arXiv 1708.03888, Algorithm 1; mlcommons/training
    retired_benchmarks/resnet-tf2/tensorflow2/lars_optimizer.py; open-lars 0.1.1; tinygrad 0.14.0 nn/optim.py
    (classic); mmselfsup mmselfsup/engine/optimizers/lars.py; tensorflow/tpu models/official/efficientnet.
    """
    grad_scale = hyper.lr * _raw_ratio(S, hyper, xp)
    return momentum_form(grad_scale, xp.ones_like(grad_scale), hyper.weight_decay, hyper, xp)


@register("timm")
def timm(S: Array, hyper: Hyper, xp: Namespace) -> Array:
    """As flash, but where a norm is zero, r = 1 and weight decay still applies; `trust_clip` also acts on this 1.

    Source: timm 1.0.31 timm/optim/lars.py.
    """
    adapted = (hyper.weight_decay != 0) | hyper.always_adapt
    ratio = xp.where(adapted, _raw_ratio(S, hyper, xp), 1.0)
    return momentum_form(ratio, hyper.lr, hyper.weight_decay, hyper, xp)


@register("apex", "solo")
def apex(S: Array, hyper: Hyper, xp: Namespace) -> Array:
    """As flash with ``always_adapt``: layers without weight decay are adapted too.

    Sources: NVIDIA/apex apex/parallel/LARC.py (as in ROCm/apex); solo-learn solo/utils/lars.py.
    """
    return flash(S, hyper._replace(always_adapt=xp.ones_like(hyper.always_adapt)), xp)


@register("kozistr", damped_nesterov=True)
def kozistr(S: Array, hyper: Hyper, xp: Namespace) -> Array:
    r"""As timm with ``always_adapt``, but r = :math:`\eta/w` for a zero gradient, and the first step is dampened too.

    Source: pytorch-optimizer 4.1.0 pytorch_optimizer/optimizer/lars.py.
    """
    p_norm, g_norm, _ = norms(S, xp)
    denominator = g_norm + hyper.weight_decay * p_norm
    ratio = trust_ratio(p_norm, denominator, ~((p_norm == 0) | (denominator == 0)), hyper, xp)
    return momentum_form(ratio, hyper.lr, hyper.weight_decay, hyper, xp, dampen_first_step=True)


@register("barlow", "vicreg", "moco-v3", norm_of="decayed gradient", keeps_buffer=True)
def barlow(S: Array, hyper: Hyper, xp: Namespace) -> Array:
    r"""r = SUM, 1 where a norm is zero: :math:`v' = \mu v + r\,d, p' = p - \text{lr}\,v'`.

    Sources: facebookresearch/barlowtwins main.py; facebookresearch/vicreg main_vicreg.py; facebookresearch/moco-v3
    moco/optimizer.py.
    """
    return momentum_form(_sum_ratio(S, hyper, xp), hyper.lr, hyper.weight_decay, hyper, xp)


@register("optax", "simclr", "tf-models", norm_of="decayed gradient", keeps_buffer=True)
def optax(S: Array, hyper: Hyper, xp: Namespace) -> Array:
    r"""r = SUM, 1 where a norm is zero, with lr inside the buffer: :math:`v' = \mu v + \text{lr}\,r\,d, p' = p - v'`.

    Sources: optax 0.2.8 optax/_src/alias.py; google-research/simclr lars_optimizer.py and tf-models-official 2.20.0
    official/modeling/optimization/lars.py (classic momentum).
    """
    grad_scale = hyper.lr * _sum_ratio(S, hyper, xp)
    return momentum_form(grad_scale, xp.ones_like(grad_scale), hyper.weight_decay, hyper, xp)


@register("simclr-popular", "tf-models-popular", norm_of="update", keeps_buffer=True)
def simclr_popular(S: Array, hyper: Hyper, xp: Namespace) -> Array:
    r""":math:`v' = \mu v + d, p' = p - \text{lr}\,r\,u`; r divides by :math:`\|u\|`, u = v', or d + μv' with nesterov.

    Sources: as `optax`, with classic_momentum=False.
    """
    ratio = _sum_ratio(S, hyper, xp)
    return momentum_form(xp.ones_like(ratio), hyper.lr * ratio, hyper.weight_decay, hyper, xp)


@register("nvidia", "mxnet")
def nvidia(S: Array, hyper: Hyper, xp: Namespace) -> Array:
    r"""As paper, with momentum correction: :math:`v' = \mu \frac{\text{lr}}{\text{lr}_{t-1}} v + \text{lr}\,r\,d`.

    The trajectory equals that with lr outside the buffer. No correction if the previous lr was 0.

    Sources: mlcommons/training_results_v0.7 NVIDIA resnet MXNet fit.py, SGDwLARS and SGDwFASTLARS; MXNet 1.9.1
    python/mxnet/optimizer/lars.py.
    """
    grad_scale = hyper.lr * _raw_ratio(S, hyper, xp)
    known = hyper.previous_lr > 0
    correction = xp.where(known, hyper.lr / xp.where(known, hyper.previous_lr, 1.0), 1.0)
    momentum = hyper.momentum * correction
    return momentum_form(grad_scale, xp.ones_like(grad_scale), hyper.weight_decay, hyper, xp, momentum=momentum)


@register("tinygrad-popular")
@register("nus", "colossalai", trust_bounds=(0.0, 50.0))
def nus(S: Array, hyper: Hyper, xp: Namespace) -> Array:
    r""":math:`v' = \mu v + d, p' = p - \text{lr}\,r\,v'`: the current r = RAW, at most 50, scales the whole buffer.

    The originals also clamp d elementwise to ±10. The clamp is not a function of sums and is not implemented.

    Sources: NUS-HPC-AI-Lab/LARS-ImageNet-PyTorch lars.py; ColossalAI colossalai/nn/optimizer/lars.py. tinygrad 0.14.0
    (classic=False) is the same without the 50.
    """
    ratio = _buffer_ratio(S, hyper, xp)
    return momentum_form(xp.ones_like(ratio), hyper.lr * ratio, hyper.weight_decay, hyper, xp)


@register("tf-contrib", keeps_buffer=True)
def tf_contrib(S: Array, hyper: Hyper, xp: Namespace) -> Array:
    r""":math:`v' = \mu v + g, p' = p - \text{lr}\,r\,v'`: w affects only the denominator of r = RAW, not the step.

    Add the L2 penalty to the loss. Source: tensorflow 1.x contrib/opt/python/training/lars_optimizer.py.
    """
    ratio = _buffer_ratio(S, hyper, xp)
    return momentum_form(xp.ones_like(ratio), hyper.lr * ratio, xp.zeros_like(ratio), hyper, xp)


@register("paddle", keeps_buffer=True)
def paddle(S: Array, hyper: Hyper, xp: Namespace) -> Array:
    """As paper, but layers without weight decay are not adapted. Source: Paddle 3.3.1 lars_momentum_kernel."""
    adapted = (hyper.weight_decay > 0) | hyper.always_adapt
    grad_scale = hyper.lr * xp.where(adapted, _raw_ratio(S, hyper, xp), 1.0)
    return momentum_form(grad_scale, xp.ones_like(grad_scale), hyper.weight_decay, hyper, xp)


# ----------------------------------------------------------------------------------------------------------- presets

_FAIR = {"momentum": 0.9, "eps": 0.0}
_SIMCLR = {"momentum": 0.9, "eps": 0.0}
_TENSORFLOW = {"momentum": 0.9, "weight_decay": 1e-4, "eps": 0.0}

# By rule: the original's defaults that differ from those of `LARS`.
PRESETS: dict[str, dict[str, Any]] = {
    "torch-optimizer": {"trust_coefficient": 0.01},
    "kozistr": {"momentum": 0.9, "eps": 0.0},
    "apex": {"trust_coefficient": 0.02, "trust_clip": True},
    "barlow": _FAIR,
    "vicreg": _FAIR,
    "moco-v3": _FAIR,
    "optax": {"momentum": 0.9, "eps": 0.0},
    "simclr": _SIMCLR,
    "simclr-popular": _SIMCLR,
    "tf-models": _SIMCLR,
    "tf-models-popular": _SIMCLR,
    # The reference's 0.0 is falsy, so Keras's 1e-7 is used.
    "mlperf": _TENSORFLOW | {"eps": 1e-7},
    "tf-tpu": _TENSORFLOW,
    "tf-contrib": _TENSORFLOW,
    "tinygrad": _TENSORFLOW,
    "tinygrad-popular": _TENSORFLOW,
    "nvidia": {"eps": 0.0},
    "mxnet": {"eps": 0.0},
    "nus": {"eps": 0.0},
    "colossalai": {"eps": 0.0},
    "open-lars": {"momentum": 0.9},
    "paddle": {"momentum": 0.9, "weight_decay": 5e-4, "eps": 0.0},
}


def preset(name: str) -> dict[str, Any]:
    """Return the arguments with which `LARS` equals the implementation `name` with its default hyper-parameters.

    Parameters
    ----------
    name : str
        A name in `lars_array.RULES`.

    Returns
    -------
    dict
        The rule, and the original's defaults that differ from those of `LARS`. Exclusions by name or number of axes,
        which are built into some originals, are not included: use `param_groups`.

    Raises
    ------
    ValueError
        For an unknown name.

    Examples
    --------
    >>> preset("apex")
    {'rule': 'apex', 'trust_coefficient': 0.02, 'trust_clip': True}
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a string in lars_array.RULES; got {shown(name)}")
    if name not in RULES:
        question = near(name, RULES)
        known = "lars_array.RULES" if question else listed(sorted(RULES))
        raise ValueError(f"name must be one of {known}; got {shown(name)}{question}")
    return {"rule": name, **PRESETS.get(name, {})}
