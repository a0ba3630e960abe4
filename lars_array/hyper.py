"""The hyper-parameters: their names and defaults, what is allowed, and how they reach a rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf, isfinite, isnan
from numbers import Integral, Real
from typing import Any, NamedTuple

import numpy as np
from array_api_compat import is_jax_array

from lars_array.arrays import asarray
from lars_array.dtypes import accumulation_dtype
from lars_array.registry import resolve

__all__ = [
    "BOOLEANS",
    "DEFAULTS",
    "GIVEN",
    "NONFINITE",
    "Hyper",
    "at_step",
    "check",
    "complete",
    "given",
    "needs_buffer",
    "vectors",
]

# What a parameter group holds beside its parameters. `lr` has no default. The values up to eps are flash's.
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

NONFINITE = ("raise", "skip", "propagate")

BOOLEANS = ("nesterov", "trust_clip", "always_adapt", "adapt", "maximize")


class Hyper(NamedTuple):
    """The hyper-parameters of one step, each an array of shape ``(layers,)``: a rule is written once for all layers.

    `trust_lower` and `trust_upper` are `trust_bounds`; `first` is true where the layer has no momentum buffer yet;
    `previous_lr` is the learning rate of the layer's last step, 0 before the first. `maximize`, `rescale_grad` and
    `max_grad_norm` have already acted on the sums that a rule is given.
    """

    lr: Any
    momentum: Any
    dampening: Any
    weight_decay: Any
    nesterov: Any
    trust_coefficient: Any
    eps: Any
    trust_clip: Any
    trust_lower: Any
    trust_upper: Any
    always_adapt: Any
    adapt: Any
    maximize: Any
    rescale_grad: Any
    max_grad_norm: Any
    first: Any
    previous_lr: Any


# The fields that a group's hyper-parameters fill; the last two say where a layer stands.
GIVEN = Hyper._fields[:-2]


def given(group: Mapping[str, Any]) -> list[Any]:
    """Return what a complete group has for each field in `GIVEN`."""
    lowest, highest = group["trust_bounds"] or resolve(group["rule"]).trust_bounds or (0.0, inf)
    most = inf if group["max_grad_norm"] is None else group["max_grad_norm"]
    known = {**group, "trust_lower": lowest, "trust_upper": highest, "max_grad_norm": most}
    return [known[name] for name in GIVEN]


def check(group: Mapping[str, Any]) -> None:
    """Refuse hyper-parameters that no step should be taken with.

    What a traced array will hold, or without waiting one on a GPU does, can't be asked: these are let through.

    Parameters
    ----------
    group : mapping
        A value for `lr` and for every key of `DEFAULTS`.

    Raises
    ------
    ValueError
        For a value out of range; the first four messages are flash's.
    TypeError
        For a value of the wrong kind.
    """
    numbers = {name: group[name] for name in ("lr", "momentum", "dampening", "weight_decay")}
    numbers |= {name: group[name] for name in ("trust_coefficient", "eps", "rescale_grad")}
    if group["max_grad_norm"] is not None:
        numbers["max_grad_norm"] = group["max_grad_norm"]
    for name, value in numbers.items():
        _check_number(name, value)
    known = {name: number for name, value in numbers.items() if (number := _known(value)) is not None}

    for name, label in (
        ("lr", "learning rate"),
        ("momentum", "momentum value"),
        ("weight_decay", "weight_decay value"),
    ):
        if not 0 <= known.get(name, 0) < inf:
            raise ValueError(f"Invalid {label}: {group[name]}")
    rule = resolve(group["rule"])
    damped = known.get("dampening", 0) != 0 and not rule.damped_nesterov
    if group["nesterov"] and (known.get("momentum", 1) <= 0 or damped):
        raise ValueError("Nesterov momentum requires a momentum and zero dampening")

    for name in ("trust_coefficient", "eps"):
        if not 0 <= known.get(name, 0) < inf:
            raise ValueError(f"{name} must be finite and at least 0; got {group[name]!r}")
    if not isfinite(known.get("dampening", 0)):
        raise ValueError(f"dampening must be finite; got {group['dampening']!r}")
    if not 0 < known.get("rescale_grad", 1) < inf:
        raise ValueError(f"rescale_grad must be finite and above 0; got {group['rescale_grad']!r}")
    if not known.get("max_grad_norm", 1) > 0:
        raise ValueError(f"max_grad_norm must be above 0, or None; got {group['max_grad_norm']!r}")
    for name in (*BOOLEANS, "master_weights"):
        if not isinstance(group[name], bool | np.bool_):
            raise TypeError(f"{name} must be True or False; got {group[name]!r}")
    if group["nonfinite"] not in NONFINITE:
        raise ValueError(f"nonfinite must be one of {', '.join(map(repr, NONFINITE))}; got {group['nonfinite']!r}")
    axes = group["layer_axes"]
    if isinstance(axes, bool) or not isinstance(axes, Integral):
        raise TypeError(f"layer_axes must be an integer; got {axes!r}")
    if axes < 0:
        raise ValueError(f"layer_axes must be at least 0; got {axes!r}")
    _check_bounds(group["trust_bounds"])


def _known(value: Any) -> float | None:
    if not (isinstance(value, Real | np.ndarray) or is_jax_array(value)):
        return None
    try:
        return float(value)
    except OverflowError:
        return inf
    except TypeError:  # traced
        return None


def _check_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not (isinstance(value, Real) or getattr(value, "shape", None) == ()):
        raise TypeError(f"{name} must be a number; got {value!r}")


def _check_bounds(bounds: Any) -> None:
    if bounds is None:
        return
    if not isinstance(bounds, Sequence) or len(bounds) != 2 or not all(isinstance(bound, Real) for bound in bounds):
        raise TypeError(f"trust_bounds must be None or a pair of numbers (lowest, highest); got {bounds!r}")
    lowest, highest = bounds
    if isnan(lowest) or isnan(highest) or not 0 <= lowest <= highest:
        raise ValueError(f"trust_bounds must hold 0 <= lowest <= highest; got {bounds!r}")


def complete(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return `group` with a default for every hyper-parameter that it lacks.

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
        For a name that is no hyper-parameter.
    """
    unknown = group.keys() - DEFAULTS.keys() - {"lr"}
    if unknown:
        raise ValueError(f"unknown hyper-parameter {min(unknown)!r}; known are lr, {', '.join(DEFAULTS)}")
    if "lr" not in group:
        raise ValueError("a parameter group must have the key 'lr'")
    return {"lr": group["lr"], **DEFAULTS, **group}


def at_step(options: Mapping[str, Any], step: Any) -> dict[str, Any]:
    """Return complete and checked hyper-parameters, with the learning rate that a schedule has at `step`.

    Parameters
    ----------
    options : mapping
        A value for `lr`, which may be a function of the step, and for any of `DEFAULTS`.
    step : int or integer array of shape ()
        Steps taken before.

    Returns
    -------
    dict
        `lr` and every key of `DEFAULTS`.

    Raises
    ------
    ValueError, TypeError
        As `complete` and `check` do.
    """
    group = complete(options)
    if callable(group["lr"]):
        group["lr"] = group["lr"](step)
    check(group)
    return group


def needs_buffer(group: Mapping[str, Any]) -> bool:
    """Return whether a layer with these hyper-parameters keeps a momentum buffer; a traced momentum may be any."""
    return resolve(group["rule"]).keeps_buffer or not (isinstance(group["momentum"], Real) and group["momentum"] == 0)


def vectors(
    groups: Sequence[Mapping[str, Any]], group_of_layer: Any, first: Any, previous_lr: Any, *, like: Any, xp: Any
) -> Hyper:
    """Spread the hyper-parameters of groups over their layers.

    Parameters
    ----------
    groups : sequence of mappings
        Complete and checked hyper-parameters, one mapping a group.
    group_of_layer : integers, shape (layers,)
        The index of each layer's group.
    first : booleans, shape (layers,)
        True where the layer has no momentum buffer yet.
    previous_lr : numbers, shape (layers,)
        Learning rate of each layer's last step.
    like : array
        An array on the device where the vectors shall be.
    xp : Array API namespace
        Its namespace.

    Returns
    -------
    Hyper
        Arrays of shape (layers,), numbers in the type that sums are accumulated in.
    """
    columns = dict(zip(GIVEN, zip(*map(given, groups), strict=True), strict=True))
    dtype = accumulation_dtype(xp)
    index = asarray(group_of_layer, like=like, xp=xp)
    fields = {
        "first": asarray(first, xp.bool, like=like, xp=xp),
        "previous_lr": _vector(previous_lr, dtype, like, xp),
    }
    numbers = [name for name in Hyper._fields if name not in (*fields, *BOOLEANS)]
    for names, kind in ((numbers, dtype), (BOOLEANS, xp.bool)):
        # One table of all fields: making an array costs the same for one number or a hundred.
        table = _table([list(columns[name]) for name in names], kind, like, xp)
        spread = xp.take(table, index, axis=1)
        fields |= {name: spread[row, :] for row, name in enumerate(names)}
    return Hyper(**fields)


def _vector(values: Any, dtype: Any, like: Any, xp: Any) -> Any:
    return (
        _table([values], dtype, like, xp)[0, :]
        if isinstance(values, list)
        else asarray(values, dtype, like=like, xp=xp)
    )


def _table(rows: list[list[Any]], dtype: Any, like: Any, xp: Any) -> Any:
    if all(isinstance(value, Real) for row in rows for value in row):
        return asarray(rows, dtype, like=like, xp=xp)
    return xp.stack([xp.stack([asarray(value, dtype, like=like, xp=xp) for value in row]) for row in rows])
