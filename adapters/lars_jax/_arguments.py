"""The arguments that both optimizers have: numbers and schedules for all leaves, and options that differ by leaf."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any, NamedTuple

from lars_array._stepper import shown
from lars_jax._devices import check_has_values
from lars_jax._trees import Leaves, as_bool, as_count, spread

__all__ = ["LarsArguments", "check_rate", "is_schedule"]


class LarsArguments(NamedTuple):
    """The arguments of `lars`: hyper-parameters by the names of `lars_array`, and those that differ by leaf."""

    hyper: dict[str, Any]
    weight_decay_mask: Any
    trust_ratio_mask: Any
    layer_axes: Any

    def of_leaves(self, leaves: Leaves, optional: Sequence[bool] = ()) -> list[tuple[Any, Any, int]]:
        """Return whether each leaf is decayed, whether it is adapted, and its `layer_axes`."""
        booleans = "True or False", as_bool
        decayed = spread("weight_decay_mask", self.weight_decay_mask, leaves, *booleans, optional=optional)
        adapted = spread("trust_ratio_mask", self.trust_ratio_mask, leaves, *booleans, optional=optional)
        counts = "integers of at least 0", as_count
        axes = spread("layer_axes", self.layer_axes, leaves, *counts, optional=optional)
        given = zip(decayed, adapted, axes)
        return [(x is None or x, y is None or y, z or 0) for x, y, z in given]

    def scheduled(self, step: Any) -> dict[str, Any]:
        """Return the hyper-parameters with the values of schedules at a step."""
        return {name: x(step) if is_schedule(name, x) else x for name, x in self.hyper.items()}

    def groups(self, of_leaves: Sequence[tuple[Any, Any, int]]) -> tuple[list[dict[str, Any]], list[int]]:
        """Return groups of hyper-parameters, and the group of each leaf from `of_leaves`.

        Leaves that a mask excludes from decay are adapted by all rules, unless there is no decay at all.
        """
        for decays, adapts, _ in of_leaves:
            check_has_values("weight_decay_mask", decays)
            check_has_values("trust_ratio_mask", adapts)
        kinds = list(dict.fromkeys(of_leaves))
        decay = self.hyper["weight_decay"]
        excluded = {"weight_decay": 0.0} | ({"always_adapt": True} if callable(decay) or decay != 0 else {})
        groups = [
            {**self.hyper, "adapt": adapts, "layer_axes": axes, **({} if decays else excluded)}
            for decays, adapts, axes in kinds
        ]
        return groups, [kinds.index(kind) for kind in of_leaves]


def is_schedule(name: str, value: Any) -> bool:
    """Return whether a hyper-parameter is a function of the step."""
    return callable(value) and name != "rule"


def check_rate(name: str, value: Any, params: Any = None) -> None:
    """Raise TypeError for a learning rate that is neither a number nor a schedule, or stands where `params` should."""
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if is_number or callable(value) or getattr(value, "shape", None) == ():
        return
    if isinstance(params, Real) or callable(params):
        raise TypeError(f"params must come before {name}; got {shown(params)} and {shown(value)} in the other order")
    raise TypeError(f"{name} must be a number, an array of shape () or a schedule; got {shown(value)}")
