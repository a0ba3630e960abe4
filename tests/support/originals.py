"""One step of the original of every rule: its arithmetic, branch by branch and array by array, in one type.

In float32 the squares of small numbers are 0 and those of large ones infinite, as in the originals. In float64 and with
`largest`, the largest number of another type, it is the step of `lars_array`: a ratio beyond that counts as that of a
zero norm.
"""

from __future__ import annotations

from typing import Any

import numpy as np

# Names of one family, as in the table of docs/what-lars-computes.md.
FLASH = ("flash", "bolts", "lightly", "torch-optimizer", "apex", "solo")
PAPER = ("paper", "mlperf", "open-lars", "tinygrad", "tf-tpu", "mmselfsup", "paddle", "nvidia", "mxnet")
SUM = ("barlow", "vicreg", "moco-v3", "optax", "simclr", "tf-models", "simclr-popular", "tf-models-popular")
BUFFER = ("nus", "colossalai", "tinygrad-popular", "tf-contrib")
POPULAR = ("simclr-popular", "tf-models-popular")


def original_step(
    rule: str,
    p: Any,
    g: Any,
    v: Any = None,
    *,
    lr: float,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    trust_coefficient: float = 1e-3,
    eps: float = 0.0,
    nesterov: bool = False,
    always_adapt: bool = False,
    rescale_grad: float = 1.0,
    kind: Any = np.float32,
    largest: float = np.inf,
) -> tuple[Any, Any]:
    """Return p' and v' in the type `kind`; v is None at the first step."""
    lr, mu, w, eta, eps = map(kind, (lr, momentum, weight_decay, trust_coefficient, eps))
    p, g = p.astype(kind), kind(rescale_grad) * g.astype(kind)
    p_norm, g_norm, d = _norm(p), _norm(g), g + w * p
    before = np.zeros_like(p) if v is None else v.astype(kind)

    def ratio(denominator: Any, *norms: Any) -> Any:
        if any(norm == 0 for norm in norms):
            return kind(1)
        found = eta * p_norm / (denominator + eps)
        bounded = [x for x in (lr, w, mu, kind(rescale_grad)) if x > 1]
        most = largest / np.prod(bounded) if np.isfinite(largest) else np.inf
        return kind(1) if found > (most**0.5 if rule in BUFFER else most) else found

    def sgd(x: Any, scale: Any) -> tuple[Any, Any]:
        new = mu * before + x
        return p - scale * (x + mu * new if nesterov else new), new

    def raw(*norms: Any) -> Any:
        return ratio(g_norm + w * p_norm, *(norms or (p_norm, g_norm)))

    adapts = w != 0 or always_adapt or rule not in ("flash", "bolts", "lightly", "torch-optimizer", "timm", "paddle")
    if rule in FLASH:
        if p_norm == 0 or g_norm == 0:
            return sgd(g, lr)
        return sgd((raw() if adapts else kind(1)) * d, lr)
    if rule == "timm":
        return sgd((raw() if adapts else kind(1)) * d, lr)
    if rule == "kozistr":
        return sgd(raw(p_norm, g_norm + w * p_norm) * d, lr)
    if rule in PAPER:
        return sgd(lr * ((raw() if adapts else kind(1)) * d), kind(1))
    if rule in POPULAR:
        new = mu * before + d
        update = d + mu * new if nesterov else new
        return p - lr * (ratio(_norm(update), p_norm, _norm(update)) * update), new
    if rule in SUM:
        x = ratio(_norm(d), p_norm, _norm(d)) * d
        return sgd(x, lr) if rule in ("barlow", "vicreg", "moco-v3") else sgd(lr * x, kind(1))
    assert rule in BUFFER, rule
    scale = raw()
    if rule in ("nus", "colossalai"):
        scale = min(scale, kind(50))
    new = mu * before + (g if rule == "tf-contrib" else d)
    return p - lr * (scale * ((g if rule == "tf-contrib" else d) + mu * new if nesterov else new)), new


def _norm(x: Any) -> Any:
    return np.sqrt(np.sum(x * x, dtype=x.dtype))
