"""Parameter groups of a model: which parameters are decayed, and which are adapted."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

__all__ = ["NORMALIZATIONS", "param_groups"]

# Modules whose scales and shifts are not weights: shrinking or adapting them says nothing about a direction.
NORMALIZATIONS: tuple[type[nn.Module], ...] = (
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.LocalResponseNorm,
    nn.CrossMapLRN2d,
    *([nn.RMSNorm] if hasattr(nn, "RMSNorm") else []),
)


def param_groups(
    model: nn.Module,
    weight_decay: float,
    *,
    no_decay: Iterable[type[nn.Module]] = NORMALIZATIONS,
    decay_bias: bool = False,
    adapt_excluded: bool = False,
    named: bool = False,
) -> list[dict[str, Any]]:
    """Split the parameters of a model into those that are decayed and adapted, and those that are neither.

    Both are told by the module that a parameter belongs to: the parameter ``bias`` of any module and the biases of
    attention and of recurrent layers, and all parameters of normalisation layers.

    Parameters
    ----------
    model : nn.Module
        Its parameters that require a gradient are taken, each once.
    weight_decay : float
        Weight decay of those that are decayed.
    no_decay : iterable of module types
        Modules none of whose own parameters are decayed: normalisation layers.
    decay_bias : bool
        Whether biases are decayed and adapted like weights.
    adapt_excluded : bool
        Whether those that are not decayed are adapted all the same.
    named : bool
        Whether groups hold ``(name, parameter)``, so that messages and checkpoints name them.

    Returns
    -------
    list of dict
        One or two groups for `LARS`, none of them empty: those decayed, with "weight_decay"; and the others, with
        "weight_decay" 0 and "adapt" False, or "always_adapt" True.

    Raises
    ------
    TypeError
        If `model` is no module, or `no_decay` no iterable of module types.
    ValueError
        If no parameter requires a gradient.

    Examples
    --------
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 2))
    >>> for group in param_groups(model, 1e-4):
    ...     print([tuple(p.shape) for p in group.pop("params")], group)
    [(8, 3, 3, 3), (2, 8)] {'weight_decay': 0.0001}
    [(8,), (8,), (8,), (2,)] {'weight_decay': 0.0, 'adapt': False}
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {model!r}")
    types = tuple(no_decay)
    if not all(isinstance(kind, type) and issubclass(kind, nn.Module) for kind in types):
        raise TypeError(f"no_decay must hold types of modules; got {types!r}")
    decayed: list[Any] = []
    others: list[Any] = []
    seen: set[torch.Tensor] = set()
    for prefix, module in model.named_modules():
        for name, p in module.named_parameters(prefix=prefix, recurse=False):
            if p in seen or not p.requires_grad:
                continue
            seen.add(p)
            is_excluded_bias = not decay_bias and _is_bias(module, name.rpartition(".")[2])
            excluded = is_excluded_bias or isinstance(module, types)
            (others if excluded else decayed).append((name, p) if named else p)
    if not seen:
        raise ValueError(f"model must have parameters that require a gradient; {type(model).__name__} has none")
    groups = [{"params": decayed, "weight_decay": weight_decay}]
    # Some rules, flash's among them, adapt a layer without decay only if they are told to.
    adaptation = {"always_adapt": True} if adapt_excluded else {"adapt": False}
    groups.append({"params": others, "weight_decay": 0.0, **adaptation})
    return [group for group in groups if group["params"]]


def _is_bias(module: nn.Module, name: str) -> bool:
    has_several = isinstance(module, (nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase))
    return name == "bias" or (has_several and "bias" in name)
