"""Parameter groups of a model: which parameters are decayed, and which are adapted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

import lars_array
from lars_array import is_bias_or_norm
from lars_array._stepper import shown, warn

__all__ = ["NORMALIZATIONS", "param_groups"]

# Modules whose scales and shifts are not weights, whatever their axes: shrinking or adapting them says nothing about a
# direction.
NORMALIZATIONS: tuple[type[nn.Module], ...] = (
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.LayerNorm,
    *([nn.RMSNorm] if hasattr(nn, "RMSNorm") else []),
)

_REMOVED = {
    "decay_bias": "no_decay and no_adapt, such as lambda name, p: p.ndim <= 1 and not name.endswith('bias')",
    "adapt_excluded": "no_adapt=None, which adapts all parameters",
}


def param_groups(
    params: Any,
    weight_decay: float,
    *,
    no_decay: Any = is_bias_or_norm,
    no_adapt: Any = is_bias_or_norm,
    named: bool = False,
    **removed: Any,
) -> list[dict[str, Any]]:
    """Split parameters into groups as `lars_array.param_groups` does, excluding some from weight decay and adaptation.

    Parameters
    ----------
    params : nn.Module, iterable of Tensor, mapping of name to Tensor, or iterable of (name, Tensor)
        Of a module, its parameters that require a gradient, each once.
    weight_decay : float
        Weight decay of the parameters that are not excluded.
    no_decay : callable, iterable, or None
        Parameters without weight decay, as there. For a module also types of modules, all of whose own parameters are
        excluded, beside those that are by default. The default, `is_bias_or_norm`, means here parameters with at most
        one axis, biases, and the parameters of the modules in `NORMALIZATIONS`.
    no_adapt : callable, iterable, or None
        In the same form, the parameters that are not adapted and take SGD steps. If `no_decay` is types of modules, the
        same by default.
    named : bool
        Whether groups hold ``(name, parameter)``, so that messages and checkpoints name them. They do if `params` do.
    **removed
        Arguments of earlier versions, each refused with what replaces it.

    Returns
    -------
    list of dict
        Groups for `LARS`, none of them empty, as of `lars_array.param_groups`.

    Raises
    ------
    TypeError, ValueError
        As there; and if no parameter of a module requires a gradient.

    Warns
    -----
    UserWarning
        For a regular expression that no name matches, and for types of which the module has none.

    Examples
    --------
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 2))
    >>> for group in param_groups(model, 1e-4):
    ...     print([tuple(p.shape) for p in group.pop("params")], group)
    [(8, 3, 3, 3), (2, 8)] {'weight_decay': 0.0001}
    [(8,), (8,), (8,), (2,)] {'weight_decay': 0.0, 'adapt': False}
    """
    for name in removed:
        if name in _REMOVED:
            raise TypeError(f"param_groups takes no {name} any more; use {_REMOVED[name]}")
        raise TypeError(f"param_groups got an unexpected keyword argument {name!r}")
    owners: dict[str, nn.Module] = {}
    has_names = named
    if isinstance(params, nn.Module):
        params, owners = _of_module(params)
    elif not isinstance(params, Iterable):
        raise TypeError(f"params must be a module, or an iterable of tensors or of pairs; got {shown(params)}")
    elif not named:
        params = params if isinstance(params, Mapping) else list(params)
        has_names = isinstance(params, Mapping) or all(isinstance(x, tuple) for x in params)
    criteria = {"no_decay": _listed(no_decay), "no_adapt": _listed(no_adapt)}
    if no_adapt is is_bias_or_norm and _types(criteria["no_decay"]):
        criteria["no_adapt"] = criteria["no_decay"]
    criteria = {option: _without_types(option, own, owners) for option, own in criteria.items()}
    groups = lars_array.param_groups(params, weight_decay, **criteria)
    for group in groups:
        group["params"] = list(group["params"].items() if has_names else group["params"].values())
    return sorted(groups, key=len)  # those without an exclusion first


def _of_module(module: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, nn.Module]]:
    """Return the parameters of a module that require a gradient, each once, and the modules that they belong to."""
    params: dict[str, torch.Tensor] = {}
    owners: dict[str, nn.Module] = {}
    seen: set[torch.Tensor] = set()
    for prefix, owner in module.named_modules():
        for name, p in owner.named_parameters(prefix=prefix, recurse=False):
            if p.requires_grad and p not in seen:
                seen.add(p)
                params[name], owners[name] = p, owner
    if not params:
        raise ValueError(f"model must have parameters that require a gradient; {type(module).__name__} has none")
    return params, owners


def _listed(criteria: Any) -> Any:
    """Return criteria as a list; None and what is no criterion as it is."""
    if callable(criteria):
        return [criteria]
    return list(criteria) if isinstance(criteria, Iterable) and not isinstance(criteria, str) else criteria


def _types(criteria: Any) -> tuple[type[nn.Module], ...]:
    """Return the types of modules among criteria."""
    items = criteria if isinstance(criteria, list) else []
    return tuple(x for x in items if isinstance(x, type) and issubclass(x, nn.Module))


def _without_types(option: str, criteria: Any, owners: Mapping[str, nn.Module]) -> Any:
    """Return criteria with a predicate for types of modules, of which the default means some too."""
    types = _types(criteria)
    if not owners and types:
        raise TypeError(f"{option} can hold types of modules only if params is a module")
    if not owners or not isinstance(criteria, list):
        return criteria
    others = [x for x in criteria if x not in types] or [is_bias_or_norm]
    if types and not any(isinstance(owner, types) for owner in owners.values()):
        names = ", ".join(x.__name__ for x in types)
        warn(f"no parameter belongs to a module of the types {names} of {option}")
    if is_bias_or_norm in others:
        types += NORMALIZATIONS
    return [*others, lambda name, p: isinstance(owners[name], types)]
