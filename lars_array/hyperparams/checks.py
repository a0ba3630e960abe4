"""What the hyper-parameters of a group may be."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from math import inf, isfinite, isnan
from numbers import Integral, Real
from typing import Any

import numpy as np
from array_api_compat import is_jax_array

from lars_array._arrays import COMPUTE
from lars_array._messages import shown
from lars_array.core import BOOLEANS, resolve
from lars_array.hyperparams.names import NUMBERS
from lars_array.nonfinite import POLICIES

__all__ = ["MOST", "NUMBER_TYPES", "check", "check_layer_axes"]


MOST = sys.float_info.max
NUMBER_TYPES = float, int, Real  # the abstract class last: it takes far longer to ask


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
    if type(value) is float:  # the usual case
        return value
    if not (isinstance(value, Real | np.ndarray) or is_jax_array(value)):
        return None
    try:
        return float(value)
    except TypeError:  # traced
        return None


def _check_number(name: str, value: Any) -> None:
    if type(value) is float:
        return
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
    return isinstance(value, NUMBER_TYPES) and not isinstance(value, bool)


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
