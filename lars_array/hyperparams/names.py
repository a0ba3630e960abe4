"""The names of the hyper-parameters, their defaults, and what other implementations call them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any, TypeVar, cast

from lars_array._messages import near, shown
from lars_array.core import Hyper

__all__ = [
    "ALIASES",
    "DEFAULTS",
    "GROUP_FIELDS",
    "INSTEAD",
    "NUMBERS",
    "defaults_from",
    "named_options",
    "required",
    "unknown_option",
]


class _Required:
    """The default of a required argument, as in torch.optim at the time of flash."""

    def __repr__(self) -> str:
        return "<required parameter>"

    def __reduce__(self) -> str:
        return "required"  # copies and pickles are the same object


required = _Required()

# The keys of a parameter group beside its parameters. `lr` has no default. The values up to eps are flash's.
DEFAULTS: dict[str, Any] = {
    "momentum": 0,
    "dampening": 0,
    "weight_decay": 0,
    "nesterov": False,
    "trust_coefficient": 0.001,
    "eps": 1e-8,
    "rule": "flash",
    "trust_clip": False,
    "trust_bounds": None,
    "always_adapt": False,
    "adapt": True,
    "maximize": False,
    "rescale_grad": 1.0,
    "max_grad_norm": None,
    "nonfinite": "raise",
    "layer_axes": 0,
    "master_weights": False,
}


def defaults_from(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of the arguments of a function that are hyper-parameters: `lr` and the keys of `DEFAULTS`."""
    return {name: arguments[name] for name in ("lr", *DEFAULTS) if name in arguments}


# The names that other implementations of LARS and of SGD have for these, with the same values.
ALIASES = {
    **dict.fromkeys(("learning_rate", "lr_max", "base_lr"), "lr"),
    **dict.fromkeys(("mu", "beta", "momentum_decay"), "momentum"),
    **dict.fromkeys(("wd", "l2", "lars_weight_decay", "weight_decay_rate"), "weight_decay"),
    **dict.fromkeys(("trust_coef", "trust_coeff", "trust", "tcoef", "eta", "eeta", "lars_coef"), "trust_coefficient"),
    **dict.fromkeys(("lars_coeff", "lars_eta", "larc_trust_coefficient"), "trust_coefficient"),
    **dict.fromkeys(("epsilon", "lars_eps"), "eps"),
    **dict.fromkeys(("use_nesterov",), "nesterov"),
    **dict.fromkeys(("clip", "clip_lr", "larc_clip"), "trust_clip"),
    **dict.fromkeys(("layer_adaptation", "lars_adaptation", "use_lars"), "adapt"),
    **dict.fromkeys(("max_norm", "clip_norm", "clip_grad_norm", "gradient_clip_val", "max_grad"), "max_grad_norm"),
    **dict.fromkeys(("multi_precision", "multi_precisions", "master_params"), "master_weights"),
}

# What does here what their other options do.
INSTEAD = {
    **dict.fromkeys(("lars_exclude", "is_skipped", "skip_lars", "exclude"), "adapt=False"),
    **dict.fromkeys(
        ("weight_decay_filter", "exclude_from_weight_decay", "exclude_from_wt_decay", "weight_decay_mask", "skip_list"),
        "param_groups(..., no_decay=...)",
    ),
    **dict.fromkeys(
        ("lars_adaptation_filter", "exclude_from_layer_adaptation", "trust_ratio_mask", "ignore_1d_tensors"),
        "param_groups(..., no_adapt=...)",
    ),
    **dict.fromkeys(
        ("exclude_bias_n_norm", "exclude_bias_and_norm", "exclude_bias_and_bn", "no_weight_decay_list"),
        "param_groups(...), which excludes biases and norms",
    ),
    **dict.fromkeys(("classic_momentum", "classic"), "rule='simclr', or 'simclr-popular' for classic_momentum=False"),
    **dict.fromkeys(("betas", "amsgrad"), "momentum: LARS is SGD with trust ratios, not Adam"),
}


def unknown_option(name: Any, known: Sequence[str] = ("lr", *DEFAULTS)) -> str:
    """Return the message for a name that is not among the known options: what it is called here, or what is near."""
    start = f"unknown hyper-parameter {shown(name)}"
    meant = "lr" if name == "lr" else ALIASES.get(name) if isinstance(name, str) else None
    meant = "learning_rate" if meant == "lr" and "lr" not in known else meant
    if meant in known:
        return f"{start}; it is called {meant} here"
    if isinstance(name, str) and name in INSTEAD:
        instead = INSTEAD[name] if "adapt" in known else INSTEAD[name].replace("adapt=False", "trust_ratio_mask")
        return f"{start}; use {instead}"
    return start + (near(name, known) or f"; known are {', '.join(known)}")


F = TypeVar("F", bound=Callable[..., Any])


def named_options(function: F) -> F:
    """Return a function whose error for an unknown keyword says what that is called here."""
    code = function.__code__
    known = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]

    @wraps(function)
    def checked(*arguments: Any, **options: Any) -> Any:
        for name in options:
            if name not in known:
                raise TypeError(unknown_option(name, [other for other in known if other not in ("self", "params")]))
        return function(*arguments, **options)

    return cast(F, checked)


# Those that are numbers, each of which may be a function of the step.
NUMBERS = ("lr", "momentum", "dampening", "weight_decay", "trust_coefficient", "eps", "rescale_grad", "max_grad_norm")

# The fields of `Hyper` that come from a group's hyper-parameters.
GROUP_FIELDS = Hyper._fields[: Hyper._fields.index("first")]
