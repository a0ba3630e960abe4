"""The keys of parameter groups: those of this optimizer, of schedulers and of wrappers; others are refused."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from difflib import get_close_matches
from numbers import Integral, Real
from typing import Any

import numpy as np

from lars_array.hyperparams import ALIASES, DEFAULTS, INSTEAD, unknown_option

__all__ = [
    "FIXED",
    "NAMES",
    "PROCESSES",
    "check_keys",
    "foreign_keys",
    "plain",
    "plain_group",
    "resembles",
    "translated",
]

NAMES = ("lr", *DEFAULTS)
PROCESSES = ("shard_group", "norm_group")  # which a checkpoint does not hold
# Those that a step reads, and torch writes.
FIXED = {"params", "param_names", "differentiable", "foreach", "fused", "capturable", *PROCESSES, *NAMES}

# What schedulers and training frameworks note in groups: torch's, timm's, Lightning's, and common training scripts'.
SCHEDULED = {"max_lr", "min_lr", "base_lr", "swa_lr", "lr_scale", "lr_mult", "fix_lr", "warmup_lr"}
SCHEDULED |= {"base_momentum", "max_momentum", "min_momentum", "name", "group_name", "layer_id"}
# The options of optimizers that pass their own groups on to the one they wrap: SAM and Lookahead.
WRAPPED = {"rho", "adaptive", "lookahead_alpha", "lookahead_k", "lookahead_step", "counter"}

# Of the keys of other LARS, those that mean adapt=False, and exclusions by the number of axes or by name.
EXCLUDED = {key for key, advice in INSTEAD.items() if advice == "adapt=False"}
BY_SHAPE = {key for key, advice in INSTEAD.items() if advice.startswith("param_groups")}


def check_keys(group: Iterable[Any], number: int) -> None:
    """Raise ValueError for a key that means nothing here, naming the one that may be meant."""
    unknown = foreign_keys(group, WRAPPED)
    if unknown:
        raise ValueError(f"{unknown_option(unknown[0])} (parameter group {number})")


def foreign_keys(group: Iterable[Any], known: Collection[Any] = ()) -> list[Any]:
    """Return the keys of a group that neither this optimizer nor schedulers write."""
    expected = FIXED | SCHEDULED | set(known)
    return [key for key in group if key not in expected and not str(key).startswith("initial_")]


def resembles(key: Any) -> bool:
    """Return whether a key is another spelling of a hyper-parameter."""
    is_near = get_close_matches(str(key), [name for name in NAMES if len(name) > 3], 1, 0.8)
    return key not in NAMES and (key in ALIASES or key in INSTEAD or bool(is_near))


def translated(group: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return a group of another LARS's checkpoint with this library's names; its own names take precedence."""
    found = {}
    for key, value in group.items():
        if key in EXCLUDED:
            found["adapt"] = not value
        elif key in ALIASES:
            found[ALIASES[key]] = value
    skipped = {*ALIASES, *EXCLUDED, *(key for key in BY_SHAPE if not group.get(key))}
    return found | {key: value for key, value in group.items() if key not in skipped}


def plain(value: Any) -> Any:
    """Return a value as torch.load reads it without running pickled code.

    Numbers of NumPy become Python's, and lists of other libraries, such as OmegaConf, become lists.
    """
    if type(value) in (bool, int, float, str, list, tuple) or value is None:
        return value
    if isinstance(value, np.ndarray | np.generic) and value.shape == ():
        return plain(value.item())
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    if isinstance(value, str):
        return str(value)
    is_list = hasattr(value, "__len__") and hasattr(value, "__getitem__")
    is_list = is_list and not (isinstance(value, Mapping | tuple) or hasattr(value, "shape"))  # a Rule is a tuple
    return [plain(x) for x in value] if is_list else value


def plain_group(group: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return a group with plain values, its parameters and their names as they are."""
    found = {key: value if key in ("params", "param_names") else plain(value) for key, value in group.items()}
    bounds = found.get("trust_bounds")
    if isinstance(bounds, list | tuple):
        found["trust_bounds"] = tuple(float(x) if isinstance(x, Real) else x for x in map(plain, bounds))
    return found
