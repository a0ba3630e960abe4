"""Groups that are plain SGD, since none of their layers is adapted, and the text of an optimizer, which says so."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

from lars_array._messages import warn
from lars_array.core import RULES
from lars_array.hyperparams.groups import options_of
from lars_array.hyperparams.names import DEFAULTS, required

__all__ = ["described", "is_sgd", "warn_of_sgd"]


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
