"""Values of hyper-parameters and of metadata as JSON, from which the same values are made again."""

from __future__ import annotations

from collections.abc import Mapping
from math import inf, isfinite, nan
from typing import Any

import numpy as np

from lars_array._arrays import is_array
from lars_array._messages import shown
from lars_array.core import RULES, resolve
from lars_array.files._host import dtype_of, to_host
from lars_array.schedules import warmup_cosine, warmup_polynomial

__all__ = ["NotStorableError", "read_value", "stored_rule", "stored_value"]

SCHEDULES: dict[str, Any] = {schedule.__name__: schedule for schedule in (warmup_cosine, warmup_polynomial)}
NOT_FINITE = {"inf": inf, "-inf": -inf, "nan": nan}
NUMBERS = "biuf"  # the kinds of NumPy types that a number may have


class NotStorableError(TypeError):
    """A value that has no form in JSON from which the same value could be made."""


def stored_rule(rule: Any) -> str:
    """Return the name under which a rule is registered."""
    if isinstance(rule, str):
        return rule
    found = next((name for name, known in RULES.items() if known == resolve(rule)), None)
    if found is None:
        raise NotStorableError(shown(rule))
    return found


def stored_value(x: Any) -> Any:
    """Return a value in a form that JSON has, floats bit for bit; what JSON has not, as an object with one key.

    Raises
    ------
    NotStorableError
        For anything but None, numbers, strings, schedules of `lars_array.schedules`, arrays of shape (), and lists,
        tuples and dicts of these.
    """
    if x is None or type(x) in (bool, int, str):
        return x
    if type(x) is float:
        return x if isfinite(x) else {"float": "nan" if x != x else str(x)}
    if type(x) is list:
        return [stored_value(y) for y in x]
    if type(x) is tuple:
        return {"tuple": [stored_value(y) for y in x]}
    if isinstance(x, dict) and all(type(key) is str for key in x):
        return {"dict": {key: stored_value(y) for key, y in x.items()}}
    if type(x) in SCHEDULES.values():
        return {"schedule": type(x).__name__, **vars(x)}
    if isinstance(x, np.generic) or (is_array(x) and tuple(x.shape) == ()):
        number = to_host(x)
        if type(number.item()) in (bool, int, float):  # not of longdouble
            kind = "scalar" if isinstance(x, np.generic) else "array"
            return {kind: stored_value(number.item()), "dtype": number.dtype.name}
    raise NotStorableError(shown(x))


def read_value(x: Any) -> Any:
    """Return the value that `stored_value` has stored; raise ValueError or TypeError for anything else."""
    if isinstance(x, list):
        return [read_value(y) for y in x]
    if not isinstance(x, dict):
        return x
    if "schedule" in x:
        name, fields = x["schedule"], {key: y for key, y in x.items() if key != "schedule"}
        if not isinstance(name, str) or name not in SCHEDULES:
            raise ValueError(f"the schedule {shown(name)} is unknown; known are {', '.join(SCHEDULES)}")
        return SCHEDULES[name](**fields)
    if x.keys() == {"float"} and isinstance(x["float"], str) and x["float"] in NOT_FINITE:
        return NOT_FINITE[x["float"]]
    if x.keys() == {"tuple"} and isinstance(x["tuple"], list):
        return tuple(read_value(y) for y in x["tuple"])
    if x.keys() == {"dict"} and isinstance(x["dict"], Mapping):
        return {key: read_value(y) for key, y in x["dict"].items()}
    kind = next((kind for kind in ("scalar", "array") if x.keys() == {kind, "dtype"}), None)
    if kind is None or type(number := read_value(x[kind])) not in (bool, int, float):
        raise ValueError(f"a value must be a number, a string, a list or an object that is known; got {shown(x)}")
    dtype = dtype_of(x["dtype"])
    if dtype.kind not in NUMBERS and dtype.name != "bfloat16":
        raise ValueError(f"the type of a number must be one of numbers; got {shown(x['dtype'])}")
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            array = np.array(number, dtype)
    except (OverflowError, ValueError) as error:
        raise ValueError(f"{shown(number)} can't be represented in {dtype.name}") from error
    if array.item() != number and number == number:
        raise ValueError(f"{shown(number)} can't be represented in {dtype.name}")
    return array if kind == "array" else array[()]
