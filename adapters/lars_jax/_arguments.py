"""The arguments that both optimizers have: numbers and schedules for all leaves, and options that differ by leaf."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from numbers import Real
from typing import Any, NamedTuple

from lars_array._stepper import shown
from lars_array.hyperparams import complete
from lars_jax._devices import check_has_values
from lars_jax._trees import Leaves, as_bool, as_count

__all__ = ["LarsArguments", "check_rate"]


class LarsArguments(NamedTuple):
    """The arguments of `lars`: hyper-parameters by the names of `lars_array`, and those that differ by leaf."""

    hyper: dict[str, Any]
    weight_decay_mask: Any
    trust_ratio_mask: Any
    layer_axes: Any

    def of_leaves(self, leaves: Leaves, optional: Collection[str] = ()) -> list[tuple[Any, Any, int]]:
        """Return whether each leaf is decayed, whether it is adapted, and its `layer_axes`."""
        masks = {"weight_decay_mask": self.weight_decay_mask, "trust_ratio_mask": self.trust_ratio_mask}
        found = [leaves.spread(name, mask, "True or False", as_bool, optional) for name, mask in masks.items()]
        axes = leaves.spread("layer_axes", self.layer_axes, "integers of at least 0", as_count, optional)
        return [(x is None or x, y is None or y, z or 0) for x, y, z in zip(*found, axes)]

    def groups(self, names: Sequence[str], of_leaves: Sequence[tuple[Any, Any, int]]) -> list[dict[str, Any]]:
        """Return parameter groups with hyper-parameters and names, from those of the leaves and from `of_leaves`.

        Leaves that a mask excludes from decay are adapted by all rules, unless there is no decay at all.
        """
        for decays, adapts, _ in of_leaves:
            check_has_values("weight_decay_mask", decays)
            check_has_values("trust_ratio_mask", adapts)
        decay = self.hyper["weight_decay"]
        excluded = {"weight_decay": 0.0} | ({"always_adapt": True} if callable(decay) or decay != 0 else {})
        found: dict[Any, dict[str, Any]] = {}
        for name, kind in zip(names, of_leaves):
            decays, adapts, axes = kind
            options = self.hyper | {"adapt": adapts, "layer_axes": axes} | ({} if decays else excluded)
            found.setdefault(kind, complete(options) | {"names": []})["names"].append(name)
        return list(found.values())


def check_rate(name: str, value: Any, params: Any = None) -> None:
    """Raise TypeError for a learning rate that is neither a number nor a schedule, or stands where `params` should."""
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if is_number or callable(value) or getattr(value, "shape", None) == ():
        return
    if isinstance(params, Real) or callable(params):
        raise TypeError(f"params must come before {name}; got {shown(params)} and {shown(value)} in the other order")
    raise TypeError(f"{name} must be a number, an array of shape () or a schedule; got {shown(value)}")
