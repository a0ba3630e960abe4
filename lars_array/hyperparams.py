"""The hyper-parameters: names, defaults, checks, evaluation of schedules, and one vector of values per layer."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from itertools import chain
from math import inf, isfinite, isnan
from numbers import Integral, Real
from operator import is_
from types import NoneType
from typing import Any, TypeVar, cast

import numpy as np
from array_api_compat import is_jax_array

from lars_array._arrays import COMPUTE, accumulation_dtype, asarray, is_array, is_on_accelerator
from lars_array._messages import located, near, shown, warn
from lars_array.core import BOOLEANS, RULES, Hyper, RuleInputs, resolve, rule_inputs, with_max_ratio
from lars_array.nonfinite import POLICIES

__all__ = [
    "ALIASES",
    "DEFAULTS",
    "GROUP_FIELDS",
    "INSTEAD",
    "NUMBERS",
    "Hyperparams",
    "at_step",
    "can_be_read",
    "check",
    "check_layer_axes",
    "complete",
    "defaults_from",
    "described",
    "inputs_of",
    "is_sgd",
    "named_options",
    "needs_buffer",
    "options_of",
    "readable",
    "required",
    "row_values",
    "unknown_option",
    "warn_of_sgd",
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

MOST = sys.float_info.max


# ------------------------------------------------------------------------------------------------------------ checks


def check(group: Mapping[str, Any]) -> None:
    """Raise for invalid hyper-parameters.

    Traced arrays and arrays on a GPU cannot be read without waiting and are not checked.

    Parameters
    ----------
    group : mapping
        A value for `lr` and for every key of `DEFAULTS`.

    Raises
    ------
    ValueError
        For a value out of range; the first four messages are flash's.
    TypeError
        For a value of the wrong type.
    """
    numbers = {name: group[name] for name in NUMBERS if name != "max_grad_norm" or group[name] is not None}
    for name, value in numbers.items():
        _check_number(name, value)
    known = {name: number for name, value in numbers.items() if (number := _known(value)) is not None}

    for name, label in (
        ("lr", "learning rate"),
        ("momentum", "momentum value"),
        ("weight_decay", "weight_decay value"),
    ):
        if not 0 <= known.get(name, 0) < inf:
            value = group[name]
            raise ValueError(f"Invalid {label}: {shown(value.item() if hasattr(value, 'item') else value)}")
    rule = resolve(group["rule"])
    for name in (*BOOLEANS, "master_weights"):
        if not isinstance(group[name], bool | np.bool_):
            raise TypeError(f"{name} must be True or False; got {shown(group[name])}")
    damped = known.get("dampening", 0) != 0 and not rule.damped_nesterov
    if group["nesterov"] and (known.get("momentum", 1) <= 0 or damped):
        raise ValueError("Nesterov momentum requires a momentum and zero dampening")

    for name in ("trust_coefficient", "eps"):
        if not 0 <= known.get(name, 0) < inf:
            raise ValueError(f"{name} must be finite and at least 0; got {shown(group[name])}")
    if not isfinite(known.get("dampening", 0)):
        raise ValueError(f"dampening must be finite; got {shown(group['dampening'])}")
    if not 0 < known.get("rescale_grad", 1) < inf:
        raise ValueError(f"rescale_grad must be finite and above 0; got {shown(group['rescale_grad'])}")
    if not known.get("max_grad_norm", 1) > 0:
        raise ValueError(f"max_grad_norm must be above 0, or None; got {shown(group['max_grad_norm'])}")
    if group["nonfinite"] not in POLICIES:
        raise ValueError(f"nonfinite must be one of {', '.join(map(repr, POLICIES))}; got {shown(group['nonfinite'])}")
    axes = group["layer_axes"]
    if isinstance(axes, bool) or not isinstance(axes, Integral):
        raise TypeError(f"layer_axes must be an integer; got {shown(axes)}")
    if axes < 0:
        raise ValueError(f"layer_axes must be at least 0; got {shown(axes)}")
    _check_bounds(group["trust_bounds"])


def _known(value: Any) -> float | None:
    """Return the value of a number or array, or None if it cannot be read without waiting."""
    if not (isinstance(value, Real | np.ndarray) or is_jax_array(value)):
        return None
    try:
        return float(value)
    except TypeError:  # traced
        return None


def _check_number(name: str, value: Any) -> None:
    is_scalar = getattr(value, "shape", None) == ()  # perhaps traced, or on a device: its value is not read
    if isinstance(value, np.ndarray | np.generic):
        is_scalar = is_scalar and (value.dtype.kind in "iuf" or COMPUTE.get(value.dtype.name) == "float32")
    if not (is_scalar or _is_real(value)):
        raise TypeError(f"{name} must be a number; got {shown(value)}")
    if _is_real(value) and _is_too_large(value):
        raise ValueError(f"{name} must be at most {MOST:.2g}; got {shown(value)}")


def _is_too_large(value: Any) -> bool:
    """Return whether a number is larger than any float; infinity isn't."""
    try:
        float(value)
    except OverflowError:
        return True
    return False


def _is_real(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _check_bounds(bounds: Any) -> None:
    if bounds is None:
        return
    if not isinstance(bounds, Sequence) or len(bounds) != 2 or not all(isinstance(bound, Real) for bound in bounds):
        raise TypeError(f"trust_bounds must be None or a pair of numbers (lowest, highest); got {shown(bounds)}")
    lowest, highest = bounds
    if any(map(_is_too_large, bounds)):
        raise ValueError(f"trust_bounds must be at most {MOST:.2g}; got {shown(bounds)}")
    if isnan(lowest) or isnan(highest) or not 0 <= lowest <= highest:
        raise ValueError(f"trust_bounds must hold 0 <= lowest <= highest; got {shown(bounds)}")


def complete(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return `group` with defaults for all missing hyper-parameters.

    Parameters
    ----------
    group : mapping
        A value for `lr`, and for any of `DEFAULTS`.

    Returns
    -------
    dict
        `lr` and every key of `DEFAULTS`.

    Raises
    ------
    ValueError
        For an unknown hyper-parameter, or if `lr` is missing.
    """
    if not group.keys() <= {"lr", *DEFAULTS}:
        raise ValueError(unknown_option(next(name for name in group if name not in DEFAULTS and name != "lr")))
    if "lr" not in group:
        raise ValueError("a parameter group must have the key 'lr'")
    return {"lr": group["lr"], **DEFAULTS, **group}


def options_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return the hyper-parameters of a parameter group."""
    return {key: value for key, value in group.items() if key not in ("params", "names")}


def at_step(options: Mapping[str, Any], step: Any) -> dict[str, Any]:
    """Return complete and checked hyper-parameters, with the values of schedules at `step`.

    Parameters
    ----------
    options : mapping
        A value for `lr` and for any of `DEFAULTS`; numbers may be functions of the step.
    step : int or integer array of shape ()
        Number of steps taken before.

    Returns
    -------
    dict
        `lr` and every key of `DEFAULTS`.

    Raises
    ------
    ValueError, TypeError
        As `complete` and `check` do.
    """
    group = complete(scheduled(options, step))
    check(group)
    return group


def scheduled(options: Mapping[str, Any], step: Any) -> dict[str, Any]:
    """Return the options with schedules evaluated at `step`."""
    group = dict(options)
    for name in NUMBERS:
        for _ in range(2):  # a schedule may return another
            if not callable(group.get(name)):
                break
            group[name] = group[name](step)
    return group


def readable(options: Mapping[str, Any], step: int) -> dict[str, Any]:
    """Return `at_step`, with arrays of shape () replaced by numbers where they can be read without waiting."""
    group = complete(scheduled(options, step))
    group = {key: x.item() if can_be_read(x) else x for key, x in group.items()}
    check(group)
    return group


def can_be_read(x: Any) -> bool:
    """Return whether `x` is an array of shape () that is read without waiting."""
    return getattr(x, "shape", None) == () and not (is_array(x) and is_on_accelerator(x))


def check_layer_axes(groups: Sequence[Mapping[str, Any]], known: Sequence[int]) -> None:
    """Raise ValueError for other groups than were added, or other `layer_axes` than these had then."""
    if [group["layer_axes"] for group in groups] == list(known):
        return
    if len(groups) != len(known):
        counts = f"got {len(groups)} groups, not {len(known)}"
        raise ValueError(f"parameter groups must be added by add_param_group, and not be removed; {counts}")
    for number, (group, axes) in enumerate(zip(groups, known, strict=True)):
        if group["layer_axes"] != axes:
            rule = f"layer_axes of parameter group {number} must stay what it was, {shown(axes)}"
            raise ValueError(f"{rule}; got {shown(group['layer_axes'])}")


def needs_buffer(group: Mapping[str, Any]) -> bool:
    """Return whether layers with these hyper-parameters keep a momentum buffer; true for traced momentum."""
    return resolve(group["rule"]).keeps_buffer or not (isinstance(group["momentum"], Real) and group["momentum"] == 0)


# ------------------------------------------------------------------------------------------- groups that are plain SGD


def warn_of_sgd(groups: Iterable[Mapping[str, Any]]) -> None:
    """Warn if no layer is adapted, and not because of `adapt=False`: an optimizer calls this before its first step."""
    groups = list(groups)
    if groups and all(is_sgd(group) and group["adapt"] for group in groups):
        warn(
            "no layer is adapted: with weight_decay=0 and the rule of flash, the default, LARS is plain SGD. Give a "
            "weight_decay, always_adapt=True or another rule; or adapt=False, if SGD is what you want"
        )


def is_sgd(group: Mapping[str, Any]) -> bool:
    """Return whether the layers of a complete group are certain not to be adapted."""
    if not group["adapt"]:
        return True
    decay, rule = group["weight_decay"], group["rule"]
    has_none = isinstance(decay, Real) and decay == 0
    return has_none and not group["always_adapt"] and isinstance(rule, str) and RULES.get(rule) is RULES["flash"]


def described(name: str, groups: Iterable[Mapping[str, Any]]) -> str:
    """Return the representation of an optimizer: of each group its size, what differs from the defaults, and SGD."""
    lines = []
    for number, group in enumerate(groups):
        changed = {key: value for key, value in options_of(group).items() if value != DEFAULTS.get(key, required)}
        options = ", ".join(f"{key}={value!r}" for key, value in changed.items())
        note = " (SGD: its layers are not adapted)" if is_sgd(group) else ""
        lines.append(f"  group {number}: {len(group['names'])} parameters, {options}{note}")
    return "\n".join([f"{name}(", *lines, ")"])


# ----------------------------------------------------------------------------------------- from groups to each layer

# For these types, equal values of equal type are the same: True == 1, but True is not a valid momentum.
PLAIN = frozenset({bool, int, float, str, NoneType})


class Hyperparams:
    """The hyper-parameters of parameter groups, which are checked again only after a possible change."""

    def __init__(self) -> None:
        self._last: tuple[list[Any], Sequence[Mapping[str, Any]]] = [], []
        self._objects: list[Any] | None = None  # of which groups consisted that were read last; None: not all tell

    def __reduce__(self) -> tuple[Any, ...]:
        return Hyperparams, ()

    def read(
        self,
        param_groups: Sequence[Mapping[str, Any]],
        step: int,
        evaluated: Sequence[Mapping[str, Any]] | None = None,
    ) -> Sequence[Mapping[str, Any]]:
        """Return complete and checked hyper-parameters, one mapping per group.

        Parameters
        ----------
        param_groups : sequence of mappings
            The parameter groups.
        step : int
            Number of steps taken before.
        evaluated : sequence of mappings, optional
            Their hyper-parameters with schedules evaluated, if the caller has done that.

        Returns
        -------
        sequence of mappings
            Not to be modified. It is the same object as before if nothing has changed, so callers may compare identity.

        Raises
        ------
        ValueError, TypeError
            As `at_step` does.
        """
        if evaluated is None and self.are_unchanged(param_groups):
            return self.last
        objects, self._objects = _objects_in(param_groups), None
        all_options = evaluated or [scheduled(options_of(group), step) for group in param_groups]
        seen = [_comparable(options) for options in all_options]
        before, groups = self._last
        if not (seen and len(seen) == len(before) and all(map(_is_same, seen, before))):
            groups = []
            for number, (group, options) in enumerate(zip(param_groups, all_options)):
                place = [f"parameter group {number}"] if len(all_options) > 1 else []
                place += [f"step {step}"] if any(callable(group.get(name)) for name in NUMBERS) else []
                with located(", ".join(place)):
                    if missing := {"lr", *DEFAULTS} - options.keys():
                        raise ValueError(f"a parameter group must have the key {shown(min(missing))}")
                    groups.append(readable(options, step))
            self._last = seen, groups  # in one assignment, for interrupts
        pairs = zip(param_groups, all_options, strict=True)
        are_own = all(x is group.get(name) for group, options in pairs for name, x in options.items())
        if are_own and None not in seen:
            self._objects = objects
        return groups

    def are_unchanged(self, param_groups: Sequence[Mapping[str, Any]]) -> bool:
        """Return whether all keys and values of groups are the objects that were read last, which can't change."""
        objects, known = _objects_in(param_groups), self._objects
        return known is not None and len(objects) == len(known) and all(map(is_, objects, known))

    @property
    def last(self) -> Sequence[Mapping[str, Any]]:
        """What `read` has returned last."""
        return self._last[1]


def _objects_in(param_groups: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Return the keys and values of groups, and what the names of rules stand for."""
    objects = list(chain(*param_groups, *[group.values() for group in param_groups]))
    return objects + [RULES.get(rule) for group in param_groups if type(rule := group.get("rule")) is str]


def _comparable(options: Mapping[str, Any]) -> Any:
    """Return names, types and values, rule and bounds; None if a value is a mutable object."""
    options = dict(options)
    rule, bounds = options.pop("rule", None), options.pop("trust_bounds", None)
    kinds = list(map(type, options.values()))
    if not PLAIN.issuperset(kinds) or not (bounds is None or type(bounds) is tuple):
        return None
    rule = RULES.get(rule) if type(rule) is str else rule
    return list(options), kinds, list(options.values()), rule, bounds


def _is_same(now: Any, before: Any) -> bool:
    """Return whether two results of `_comparable` are the same; custom objects may define their own equality."""
    if now is None or before is None or now[:3] != before[:3]:
        return False
    return now[3] is before[3] and now[4] is before[4]


def row_values(group: Mapping[str, Any]) -> list[Any]:
    """Return the values of a complete group in the order of `GROUP_FIELDS`."""
    lowest, highest = group["trust_bounds"] or resolve(group["rule"]).trust_bounds or (0.0, inf)
    most = inf if group["max_grad_norm"] is None else group["max_grad_norm"]
    known = {**group, "trust_lower": lowest, "trust_upper": highest, "max_grad_norm": most}
    return [known[name] for name in GROUP_FIELDS]


def inputs_of(
    groups: Sequence[Mapping[str, Any]],
    group_of: Sequence[int],
    first: Any,
    previous_lr: Any,
    limit: Any = MOST,
    *,
    like: Any,
    xp: Any,
) -> RuleInputs:
    """Return the inputs of a step, with the hyper-parameters of the groups spread over rows.

    Parameters
    ----------
    groups : sequence of mappings
        Complete and checked hyper-parameters, one mapping per group.
    group_of : sequence of int
        The group of each row.
    first : booleans, shape (rows,)
        True where the layer has no momentum buffer yet.
    previous_lr : numbers, shape (rows,)
        Learning rate of each layer's last step.
    limit : array of shape (rows,)
        The largest number of each layer's compute dtype, see `nonfinite.max_finite`.
    like : array
        An array on the device of the result.
    xp : Array API namespace
        Its namespace.

    Returns
    -------
    RuleInputs
        Arrays of shape (rows,); numbers have the type in which sums are accumulated.
    """
    columns = dict(zip(GROUP_FIELDS, zip(*map(row_values, groups), strict=True), strict=True))
    dtype = accumulation_dtype(xp)
    index = asarray(group_of, like=like, xp=xp)
    fields = {"first": asarray(first, xp.bool, like=like, xp=xp)}
    if isinstance(previous_lr, list):
        fields["previous_lr"] = _table([previous_lr], dtype, like, xp)[0, :]
    else:
        fields["previous_lr"] = asarray(previous_lr, dtype, like=like, xp=xp)
    numbers = [name for name in GROUP_FIELDS if name not in BOOLEANS]
    for names, kind in ((numbers, dtype), (BOOLEANS, xp.bool)):
        # One table for all fields: creating an array costs the same for one number as for a hundred.
        table = _table([list(columns[name]) for name in names], kind, like, xp)
        spread = xp.take(table, index, axis=1)
        fields |= {name: spread[row, :] for row, name in enumerate(names)}
    return with_rules(with_max_ratio(Hyper(**fields), limit, xp=xp), groups, group_of, xp=xp)


def with_rules(hyper: Hyper, groups: Sequence[Mapping[str, Any]], group_of: Sequence[int], *, xp: Any) -> RuleInputs:
    """Return the inputs of a step from hyper-parameters that are already spread over rows."""
    rules = [resolve(group["rule"]) for group in groups]
    clips = any(group["max_grad_norm"] is not None for group in groups)
    return rule_inputs(hyper, [rules[k] for k in group_of], clips=clips, xp=xp)


def _table(rows: list[list[Any]], dtype: Any, like: Any, xp: Any) -> Any:
    if all(isinstance(value, Real) for row in rows for value in row):
        return asarray(rows, dtype, like=like, xp=xp)
    return xp.stack([xp.stack([asarray(value, dtype, like=like, xp=xp) for value in row]) for row in rows])
