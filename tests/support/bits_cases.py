"""What the recorder of bits steps through: scenarios, each for one or several of the ways to take a step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from bits_arrays import GRADIENT_TYPES, TYPES
from bits_rules import arithmetic, mean

from lars_array import RULES, warmup_cosine, warmup_polynomial

__all__ = ["SCENARIOS", "STEPS", "Scenario"]

STEPS = 5
BASE: dict[str, Any] = {"lr": 0.5, "momentum": 0.9, "weight_decay": 1e-3, "trust_coefficient": 0.1}

NUMPY = "compiled", "blocked", "portable"
ALL = *NUMPY, "cuda", "torch"
WITH_JAX = (*ALL, "update", "jax", "jax-eager", "jax-donated")
LARGE = ("compiled-1", "compiled-2", "compiled-3", "blocked", "portable", "torch", "jax-eager", "jax-donated")


class Scenario(NamedTuple):
    """Five steps.

    Parameters
    ----------
    name : str
        Unique.
    options : dict
        Of the optimizer, whichever it is.
    on : tuple of str
        The ways to take these steps, keys of `bits.WAYS`.
    model : str
        A key of `bits_arrays.MODELS`.
    dtype, g_dtype : str
        Of parameters and of gradients; None for the parameters'.
    layout, g_layout : str
        How they lie, a key of `bits_arrays.LAYOUTS`.
    groups : tuple of tuple (tuple of str, dict)
        Names of parameters and overrides of each group; none for one group of all.
    missing : dict of int to tuple of str
        The parameters without a gradient, by step.
    bad : dict of int to float
        What is put into a gradient, by step.
    found_inf : tuple of int
        The steps in which a loss scaler has found something.
    """

    name: str
    options: dict[str, Any]
    on: tuple[str, ...] = ALL
    model: str = "small"
    dtype: str = "float32"
    g_dtype: str | None = None
    layout: str = "C"
    g_layout: str = "C"
    groups: tuple[tuple[tuple[str, ...], dict[str, Any]], ...] = ()
    missing: Mapping[int, tuple[str, ...]] = MappingProxyType({})
    bad: Mapping[int, float] = MappingProxyType({})
    found_inf: tuple[int, ...] = ()


def _rules() -> Iterator[Scenario]:
    """Each rule that is not another one's under another name."""
    names = {rule: name for name, rule in reversed(RULES.items())}
    for name in sorted(names.values()):
        compiled = ("torch-compiled",) if name in ("flash", "simclr-popular") else ()
        yield Scenario(f"rule {name}", BASE | {"rule": name}, (*WITH_JAX, *compiled, "lars_step"))
        more = {"nesterov": True, "always_adapt": True, "trust_bounds": (0.01, 0.2), "max_grad_norm": 3.0}
        yield Scenario(f"rule {name}, nesterov, bounds, clipped", BASE | more | {"rule": name}, (*ALL, "update"))
        plain = {"rule": name, "momentum": 0.0, "trust_clip": True}
        yield Scenario(f"rule {name}, no momentum, trust_clip", BASE | plain, (*NUMPY, "cuda", "lars_step"))
        decayless = {"rule": name, "weight_decay": 0.0, "dampening": 0.3, "lr": warmup_cosine(0.5, 5, 2)}
        yield Scenario(f"rule {name}, no decay, dampening, schedule", BASE | decayless, NUMPY)
    yield Scenario("own rule", BASE | {"rule": arithmetic}, WITH_JAX)
    yield Scenario("own rule over all layers", BASE | {"rule": mean}, (*ALL, "update"))


def _options() -> Iterator[Scenario]:
    for name, more in {
        "nesterov": {"nesterov": True},
        "dampening": {"dampening": 0.4},
        "trust_clip": {"trust_clip": True},
        "trust_bounds": {"trust_bounds": (0.02, 0.1)},
        "always_adapt": {"always_adapt": True, "weight_decay": 0.0},
        "max_grad_norm": {"max_grad_norm": 2.0, "rule": "optax"},
        "rescale_grad": {"rescale_grad": 0.125, "maximize": True},
        "eps": {"eps": 0.5},
    }.items():
        yield Scenario(name, BASE | more, (*WITH_JAX, "lars_step"))
    yield Scenario("sgd", BASE | {"weight_decay": 0.0}, (*WITH_JAX, "torch-compiled"))
    live = {"lr": warmup_polynomial(0.5, 5, 2), "rule": "nvidia"}
    yield Scenario("schedule", BASE | live, (*NUMPY, "cuda", "jax-eager", "update"))
    for policy in ("propagate", "raise", "skip"):
        on = (*ALL, "jax-eager", "jax-donated") if policy == "raise" else WITH_JAX
        for what in (np.nan, np.inf):
            options = {"nonfinite": policy, "rule": "optax"}
            yield Scenario(f"nonfinite {policy}, {what}", BASE | options, on, bad={2: what})
    on = (*ALL, "jax-eager", "jax-donated")
    yield Scenario("found_inf", BASE, on, found_inf=(1, 3))
    yield Scenario("found_inf, propagate", BASE | {"nonfinite": "propagate"}, on, found_inf=(0,), bad={0: np.inf})
    yield Scenario("many", BASE, (*ALL, "update", "jax-eager", "torch-compiled"), model="many")
    missing = {0: ("w", "z"), 2: ("w",), 3: ("b", "one", "long")}
    for rule in ("flash", "optax", "nvidia"):
        name, lr = f"sits out, {rule}", warmup_cosine(0.5, 5, 1)
        yield Scenario(name, BASE | {"rule": rule, "lr": lr}, (*NUMPY, "cuda", "update", "jax-eager"), missing=missing)
    yield Scenario("sits out", BASE | {"dampening": 0.5}, (*WITH_JAX, "torch-compiled"), missing=missing)


def _groups() -> Iterator[Scenario]:
    on = (*ALL, "update")
    one = (("w", "k"), {"lr": 0.25}), (("b", "one", "z"), {"weight_decay": 0.0}), (("long", "none"), {"rule": "optax"})
    yield Scenario("groups", BASE, (*on, "torch-compiled"), groups=one)
    two = (("w", "long", "k"), {"momentum": 0.0}), (("b", "one", "z", "none"), {"adapt": False})
    yield Scenario("groups, adapt=False", BASE, on, groups=two)
    three = (("w", "long"), {"nonfinite": "propagate"}), (("k", "b", "one", "z", "none"), {"nonfinite": "skip"})
    yield Scenario("groups, policies", BASE, on, groups=three, bad={2: np.nan}, missing={1: ("k",)})
    four = (("w",), {"max_grad_norm": 1.0}), (("k", "b", "one", "z", "long", "none"), {"maximize": True})
    yield Scenario("groups, clipped", BASE | {"rule": "simclr-popular"}, on, groups=four)
    five = (("m", "n"), {"layer_axes": 1}), (("e", "o"), {"lr": 0.1})
    yield Scenario("groups, layer_axes", BASE, on, model="stacked", groups=five)
    masks = {"weight_decay_mask": lambda tree: {name: x.ndim > 1 for name, x in tree.items()}}
    yield Scenario("jax, weight_decay_mask", BASE | masks, ("jax", "jax-eager"))
    yield Scenario("jax, trust_ratio_mask", BASE | {"trust_ratio_mask": False}, ("jax", "jax-eager", "jax-donated"))


def _layers() -> Iterator[Scenario]:
    for rule in ("flash", "optax"):
        stacked = BASE | {"layer_axes": 1, "rule": rule}
        yield Scenario(f"layer_axes, {rule}", stacked, WITH_JAX, model="stacked")
        yield Scenario(f"layer_axes, {rule}, F order", stacked, ALL, model="stacked", layout="F", g_layout="F")
        yield Scenario(f"layer_axes, {rule}, F gradients", stacked, NUMPY, model="stacked", g_layout="F")
        yield Scenario(f"layer_axes, {rule}, strided", stacked, NUMPY, model="stacked", layout="strided")
    joined = BASE | {"layer_of": {"w": "both", "b": "both", "k": "two", "long": "two"}.get}
    yield Scenario("layer_of", joined, (*WITH_JAX, "torch-compiled"))
    yield Scenario("layer_of, optax", joined | {"rule": "optax", "max_grad_norm": 1.0}, WITH_JAX, missing={1: ("w",)})
    both = BASE | {"layer_axes": 1, "layer_of": {"m": "both", "n": "both"}}
    yield Scenario("layer_of and layer_axes", both, (*ALL, "update", "jax"), model="stacked")
    for layout in ("F", "strided", "backwards"):
        on = NUMPY if layout == "backwards" else ALL
        yield Scenario(f"{layout} parameters", BASE, on, layout=layout, g_layout=layout)
        yield Scenario(f"{layout} gradients", BASE | {"rule": "simclr-popular"}, on, g_layout=layout)


def _types() -> Iterator[Scenario]:
    for dtype in TYPES:
        half = dtype in ("float16", "bfloat16")
        for rule in ("flash", "simclr-popular"):
            yield Scenario(f"{dtype}, {rule}", BASE | {"rule": rule}, WITH_JAX, dtype=dtype)
        if half:
            for g_dtype in (dtype, "float32"):
                name = f"{dtype}, masters, {g_dtype} gradients"
                on = (*ALL, "jax-eager", "jax-donated")
                yield Scenario(name, BASE | {"master_weights": True, "lr": 1e-3}, on, dtype=dtype, g_dtype=g_dtype)
            name, skips = f"{dtype}, masters, skip", {"master_weights": True, "nonfinite": "skip", "lr": 1e-3}
            yield Scenario(name, BASE | skips, dtype=dtype, bad={1: np.inf}, missing={3: ("w",)})
            layers = {"master_weights": True, "layer_axes": 1, "rule": "optax"}
            yield Scenario(f"{dtype}, masters, layer_axes", BASE | layers, dtype=dtype, model="stacked")
    for dtype, g_dtype in GRADIENT_TYPES:
        on = (*NUMPY, "cuda", "update", "jax-eager")
        yield Scenario(f"{dtype}, {g_dtype} gradients", BASE, on, dtype=dtype, g_dtype=g_dtype)
    yield Scenario("several types", BASE | {"max_grad_norm": 3.0}, (*ALL, "torch-compiled"), dtype="mixed")


def _large() -> Iterator[Scenario]:
    """Layers of more and of fewer pieces than threads share."""
    for policy in ("raise", "propagate"):
        for rule in ("flash", "simclr-popular"):
            on = LARGE if rule == "flash" else LARGE[:4]
            yield Scenario(f"large, {policy}, {rule}", BASE | {"nonfinite": policy, "rule": rule}, on, model="large")
    for policy in ("skip", "propagate"):
        clipped = BASE | {"nonfinite": policy, "max_grad_norm": 2.0, "rule": "optax"}
        yield Scenario(f"large, {policy}, clipped", clipped, LARGE[:4], model="large", bad={1: np.nan})
    masters = {"master_weights": True, "nonfinite": "propagate"}
    yield Scenario("large, float16, masters", BASE | masters, LARGE[:3], "large", "float16")
    yield Scenario("large, bfloat16", BASE, LARGE[:3], model="large", dtype="bfloat16", g_dtype="float32")
    yield Scenario("large, float64", BASE | {"nonfinite": "propagate"}, LARGE[:4], model="large", dtype="float64")
    joined = {"layer_of": {"a": "x", "d": "x"}, "nonfinite": "propagate"}
    yield Scenario("large, layer_of", BASE | joined, LARGE[:3], model="large")
    yield Scenario("large, jitted", BASE, ("jax", "update", "torch"), model="edges")
    yield Scenario("edges, propagate", BASE | {"nonfinite": "propagate"}, LARGE[:3], "edges")


SCENARIOS = [*_rules(), *_options(), *_groups(), *_layers(), *_types(), *_large()]
