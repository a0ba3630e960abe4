"""The cases of the kit: parameters, gradients, learning rates and hyper-parameters of a few steps each."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import numpy as np

__all__ = ["OPTIONS", "Case", "cases", "options_of"]

STEPS = 5
SHAPES = {"conv": (3, 2, 2), "weight": (4, 3), "bias": (4,)}
RATES = (0.5, 1.0, 1.5, 0.75, 0.25)  # different at each step, on both sides of 1
TINY, HUGE = 1e-12, 1e12  # their squares are float32 numbers, too

# The hyper-parameters that an original may lack.
OPTIONS = ("eps", "dampening", "nesterov")

# Of these, the ones that the original of a rule has; all, if the rule is not here.
_ORIGINALS = {
    **dict.fromkeys(("kozistr",), ("dampening", "nesterov")),
    **dict.fromkeys(("optax", "mlperf", "tf-tpu", "tf-contrib"), ("eps", "nesterov")),
    **dict.fromkeys(("simclr", "simclr-popular", "tf-models", "tf-models-popular"), ("nesterov",)),
    **dict.fromkeys(("tinygrad", "tinygrad-popular"), ("nesterov",)),
    **dict.fromkeys(("open-lars", "paddle", "nvidia", "mxnet", "nus", "colossalai"), ("eps",)),
    **dict.fromkeys(("paper", "barlow", "vicreg", "moco-v3"), ()),
}


class Case(NamedTuple):
    """A few steps of a small network.

    Parameters
    ----------
    name : str
        The term that it is about.
    hyper : dict of str to float or bool
        The hyper-parameters but the learning rate.
    rates : sequence of float
        The learning rate of each step.
    params : dict of str to array
        The initial parameters of each layer.
    grads : sequence of dict of str to array
        The gradients of each step.
    """

    name: str
    hyper: dict[str, Any]
    rates: tuple[float, ...]
    params: dict[str, Any]
    grads: list[dict[str, Any]]


def options_of(rule: Any) -> tuple[str, ...]:
    """Return those of `OPTIONS` that the original of a rule has."""
    return _ORIGINALS.get(rule, OPTIONS) if isinstance(rule, str) else OPTIONS


def cases(options: Collection[str], dtype: Any) -> Iterator[Case]:
    """Yield the cases, the simpler ones first, so that the first one that fails says most."""
    neutral = {"eps": 1e-8, "dampening": 0.0, "nesterov": False}
    base = {"weight_decay": 0.1, "trust_coefficient": 0.02, **{name: neutral[name] for name in options}}
    momentum = base | {"momentum": 0.9}
    yield _case("no momentum", base | {"momentum": 0.0}, dtype)
    yield _case("no momentum, no weight decay", base | {"momentum": 0.0, "weight_decay": 0.0}, dtype)
    yield _case("momentum, constant learning rate", momentum, dtype, rates=(0.5,) * STEPS)
    yield _case("momentum", momentum, dtype)
    yield _case("no weight decay", momentum | {"weight_decay": 0.0}, dtype)
    yield _case("large trust coefficient", momentum | {"trust_coefficient": 0.7}, dtype)
    if "eps" in options:
        yield _case("eps", momentum | {"eps": 0.3}, dtype)
    if "dampening" in options:
        yield _case("dampening", momentum | {"dampening": 0.3}, dtype)
    if "nesterov" in options:
        yield _case("nesterov", momentum | {"nesterov": True}, dtype)
    without = {(0, "conv"), (2, "weight"), (3, "conv"), (3, "bias")}
    yield _case("zero gradients, no momentum", base | {"momentum": 0.0}, dtype, without=without)
    yield _case("zero gradients", momentum, dtype, without=without)
    yield _case("zero parameters", momentum, dtype, p_scales={"weight": 0.0, "bias": 0.0})
    small = {"weight": 1e-6, "bias": 1e-6}
    yield _case("large trust ratio", momentum | {"weight_decay": 1e-5}, dtype, g_scales=small)
    scales = {"conv": TINY, "bias": TINY}, {"weight": TINY, "bias": TINY}
    yield _case("tiny norms", momentum, dtype, *scales)
    scales = {"conv": HUGE, "bias": HUGE}, {"weight": HUGE, "bias": HUGE}
    yield _case("huge norms", momentum, dtype, *scales)


def _case(
    name: str,
    hyper: dict[str, Any],
    dtype: Any,
    p_scales: dict[str, float] | None = None,
    g_scales: dict[str, float] | None = None,
    *,
    without: Collection[tuple[int, str]] = (),
    rates: tuple[float, ...] = RATES,
) -> Case:
    """Return a case; `without` are the steps and layers with a gradient of zeros."""
    numbers = np.random.RandomState(len(name))  # NumPy promises its numbers to stay the same in all releases

    def draw(scales: dict[str, float] | None) -> dict[str, Any]:
        normal = {layer: numbers.standard_normal(shape) for layer, shape in SHAPES.items()}
        return {layer: np.asarray((scales or {}).get(layer, 1.0) * x, dtype) for layer, x in normal.items()}

    params = draw(p_scales)
    grads = [draw(g_scales) for _ in rates]
    for step, layer in without:
        grads[step][layer][...] = 0
    return Case(name, hyper, rates, params, grads)
