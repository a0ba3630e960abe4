"""Trajectories of the original implementations, and the `LARS` call that must reproduce each."""

from __future__ import annotations

import json
import os
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import lars_array
from lars_array import Rule, preset
from lars_array.core import momentum_form, norms, trust_ratio

ARCHIVE = Path(__file__).parents[1] / "golden" / "trajectories.zip"


class Case(NamedTuple):
    """A file of the golden set: its name without ending, and what it holds."""

    name: str
    data: dict[str, Any]


def read_cases() -> list[Case]:
    """Return all cases, of the directory that LARS_GOLDEN names or of the archive here, in order of name."""
    return sorted(_read(), key=lambda case: case.name)


def _read() -> Iterator[Case]:
    directory = os.environ.get("LARS_GOLDEN")
    if directory is not None:
        for path in Path(directory).rglob("*.json"):
            yield Case(path.relative_to(directory).with_suffix("").as_posix(), json.loads(path.read_text()))
    else:
        with zipfile.ZipFile(ARCHIVE) as archive:
            for name in archive.namelist():
                if name.endswith(".json"):
                    yield Case(name.removesuffix(".json"), json.loads(archive.read(name)))


class Call(NamedTuple):
    """How `LARS` is to be called: options a layer, what a missing gradient means, and the sign of the buffer."""

    options: list[dict[str, Any]]
    missing_is_zero: bool
    buffer_sign: int


# ------------------------------------------------------------------------------------------- rules not worth a name


def chainer(threshold: float, *, odd_nesterov: bool = False) -> Callable[..., Any]:
    """Chainer 7.8.1's GradientLARS: no trust coefficient, a threshold for a norm that is small, and an odd Nesterov."""

    def rule(S: Any, hyper: Any, xp: Any) -> Any:
        p_norm, g_norm, _ = norms(S, xp)
        ratio = trust_ratio(p_norm, g_norm + hyper.weight_decay * p_norm, p_norm > threshold, hyper, xp)
        grad_scale = hyper.lr * ratio
        C = momentum_form(grad_scale, xp.ones_like(grad_scale), hyper.weight_decay, hyper, xp)
        if odd_nesterov:  # p -= mu^2 v' + (1 + mu) lr d, where the textbook has the old v
            lam = (1 + hyper.momentum) * grad_scale
            C = xp.stack([C[:, 0], C[:, 1], C[:, 2], hyper.momentum**2, lam, lam * hyper.weight_decay], axis=1)
        return C

    return rule


def unguarded(S: Any, hyper: Any, xp: Any) -> Any:
    """The reference of Paddle's unit test: a layer of zeros stays at zero."""
    p_norm, g_norm, _ = norms(S, xp)
    ratio = hyper.trust_coefficient * p_norm / (g_norm + hyper.weight_decay * p_norm)
    return momentum_form(hyper.lr * ratio, xp.ones_like(ratio), hyper.weight_decay, hyper, xp)


def tinygrad_decay_apart(S: Any, hyper: Any, xp: Any) -> Any:
    """tinygrad's pre_wd=False: p -= lr wd p beside the buffer."""
    p_norm, g_norm, _ = norms(S, xp)
    defined = (p_norm > 0) & (g_norm > 0)
    grad_scale = hyper.lr * trust_ratio(p_norm, g_norm + hyper.weight_decay * p_norm, defined, hyper, xp)
    C = momentum_form(grad_scale, xp.ones_like(grad_scale), xp.zeros_like(grad_scale), hyper, xp)
    return xp.stack([*(C[:, i] for i in range(5)), hyper.lr * hyper.weight_decay], axis=1)


# --------------------------------------------------------------------------------------------- from config to options

NAMES = {
    **{name: "weight_decay" for name in ("weight_decay", "wd", "weight_decay_rate", "lars_weight_decay")},
    **{
        name: "trust_coefficient"
        for name in ("trust_coefficient", "trust_coeff", "eta", "eeta", "lars_eta", "lars_coeff", "tcoef")
    },
    **{name: "eps" for name in ("eps", "epsilon", "lars_eps")},
    **{name: "nesterov" for name in ("nesterov", "use_nesterov")},
    **{name: "trust_clip" for name in ("trust_clip", "clip_lr", "clip")},
    **{name: name for name in ("dampening", "always_adapt", "rescale_grad", "maximize")},
    **{name: "momentum" for name in ("momentum", "mu")},
}
IGNORED = {"lr", "learning_rate", "foreach"}
RULES = {
    "lightning-flash": "flash",
    "lightning-bolts": "bolts",
    "torch-optimizer": "torch-optimizer",
    "apex-larc-clip": "apex",
    "apex-larc-scale": "apex",
    "solo-learn": "solo",
    "barlowtwins": "barlow",
    "mlperf-tf2": "mlperf",
    "tf-tpu-efficientnet": "tf-tpu",
    "mxnet-lars": "mxnet",
    "nvidia-fastlars": "nvidia",
    "nvidia-lars": "nvidia",
    "mxnet-test-fast-lars": "mlperf",
    "paddle-test-reference": Rule(unguarded, keeps_buffer=True),
}
NEGATIVE_BUFFERS = {
    "optax",
    "mlperf-tf2",
    "mxnet-lars",
    "nvidia-fastlars",
    "nvidia-lars",
    "mxnet-test-fast-lars",
    "chainer",
}


def call_of(case: Case) -> Call:
    """Return the call that must reproduce `case`."""
    implementation, _, variant = case.name.removeprefix("negative/").partition("__")
    config = case.data["config"]
    rule: Any = RULES.get(implementation, implementation)
    options = []
    for number, layer in enumerate(case.data["layers"]):
        group = config["groups"][layer["group"]]
        if implementation == "lightning-flash":  # ignores these in groups
            group = {name: value for name, value in group.items() if name not in ("trust_coefficient", "eps")}
        given = config["args"] | config.get("inner", {}).get("args", {}) | group
        if "effective_wd_per_layer" in config:
            given["wd"] = config["effective_wd_per_layer"][number]
        layer_rule, decays, adapts, rest = _peculiarities(implementation, given, layer, rule, config)
        if implementation == "nvidia-fastlars" and variant == "batches_of_4" and number >= 4:
            layer_rule = "paper"  # the second of two update calls a step sees no correction
        defaults = preset(rule) if rule in lars_array.RULES else {"eps": 0.0}
        if implementation == "paddle":  # keeps hyper-parameters in float32
            defaults |= {
                name: float(np.float32(x))
                for name, x in (defaults | {"trust_coefficient": 1e-3}).items()
                if name != "rule"
            }
        own = defaults | {NAMES[name]: value for name, value in rest.items() if name not in IGNORED}
        own |= {"rule": layer_rule, "adapt": adapts}
        if implementation == "mlperf-tf2":
            own["eps"] = own["eps"] or 1e-7
        options.append(own | ({} if decays else {"weight_decay": 0.0}))
    sign = -1 if implementation in NEGATIVE_BUFFERS else 1
    return Call(options, implementation == "chainer", sign)


def _peculiarities(
    implementation: str, given: dict[str, Any], layer: dict[str, Any], rule: Any, config: dict[str, Any]
) -> tuple[Any, bool, bool, dict[str, Any]]:
    """Return the rule, whether the layer is decayed, whether it is adapted, and the arguments that remain."""
    rest = dict(given)
    name, ndim = layer["name"], len(layer["shape"])
    decays = adapts = True
    match implementation:
        case "kozistr" | "moco-v3":
            decays = adapts = ndim > 1
        case "barlowtwins" | "vicreg":
            decays = not (rest.pop("weight_decay_filter", None) and ndim == 1)
            adapts = not (rest.pop("lars_adaptation_filter", None) and ndim == 1)
        case "solo-learn":
            decays = adapts = not (rest.pop("exclude_bias_n_norm", False) and ndim == 1)
        case "open-lars":
            adapts = ndim > 1
        case "mmselfsup":
            adapts = not rest.pop("lars_exclude", False)
        case "nus" | "colossalai":
            decays = adapts = rest.pop("lars", True)
        case "optax":
            masks = (rest.pop(mask, True) for mask in ("weight_decay_mask", "trust_ratio_mask"))
            decays, adapts = (mask[name] if isinstance(mask, dict) else mask for mask in masks)
        case "simclr" | "tf-models":
            if not rest.pop("classic_momentum", True):
                rule = implementation + "-popular" if implementation == "tf-models" else "simclr-popular"
            no_decay = rest.pop("exclude_from_weight_decay", None) or []
            no_adapt = rest.pop("exclude_from_layer_adaptation", None) or no_decay
            decays, adapts = (not any(re.search(pattern, name) for pattern in found) for found in (no_decay, no_adapt))
        case "mlperf-tf2" | "tf-tpu-efficientnet" | "tf-contrib":
            decays = adapts = not any(part in name for part in rest.pop("skip_list", None) or [])
        case "paddle":
            decays = not any(part in name for part in rest.pop("exclude_from_weight_decay", None) or [])
        case "mxnet-lars" | "nvidia-lars" | "nvidia-fastlars":
            adapts = not name.endswith(("gamma", "beta", "bias"))
            if not rest.pop("momentum_correction", True):
                rule = "paper"
        case "tinygrad":
            classic, before = rest.pop("classic", True), rest.pop("pre_wd", True)
            rule = tinygrad_decay_apart if not before else "tinygrad" if classic else "tinygrad-popular"
        case "chainer":
            rule = chainer(rest.pop("threshold", 1e-2), odd_nesterov=config["inner"]["class"].endswith("NesterovAG"))
            rest |= {"trust_coefficient": 1.0, "eps": rest.get("eps", 1e-9)}
    return rule, decays, adapts, rest
