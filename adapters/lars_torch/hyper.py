"""The hyper-parameters of a parameter group, as `lars_array` takes them."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch

from lars_array.hyper import DEFAULTS, check, complete

__all__ = ["NAMES", "check_group", "hyper_of"]

NAMES = ("lr", *DEFAULTS)


def check_group(group: Mapping[str, Any]) -> None:
    """Refuse hyper-parameters that no step should be taken with; what a device holds is not asked for.

    Parameters
    ----------
    group : mapping
        A value for each of `NAMES`; further keys are not looked at.

    Raises
    ------
    ValueError, TypeError
        As `lars_array.LARS` does.
    """
    for name in NAMES:
        value = group[name]
        if isinstance(value, torch.Tensor) and value.numel() != 1:
            raise ValueError(f"Tensor {name} must be 1-element; got shape {tuple(value.shape)!r}")
        if name == "lr" and not isinstance(value, (Real, torch.Tensor)):
            raise TypeError(f"lr must be a number or a tensor, see torch.optim.lr_scheduler; got {value!r}")
    check(complete({name: _known(group[name]) for name in NAMES}))


def hyper_of(
    group: Mapping[str, Any], grad_scale: Any, device: torch.device, *, recorded: bool = False
) -> dict[str, Any]:
    """Return what a step on `device` is taken with.

    Parameters
    ----------
    group : mapping
        A parameter group.
    grad_scale : number, tensor or None
        What gradients are divided by first.
    device : torch.device
        Numbers that lie on it stay there, unless it is the CPU; others are brought here, where they are waited for.
    recorded : bool
        Whether tensors stay what they are, since autograd is to look through them.

    Returns
    -------
    dict
        A number, or a tensor of shape () on `device`, for each hyper-parameter.
    """
    beside = _recorded if recorded else _beside
    hyper = {name: beside(group[name], device) for name in NAMES}
    if grad_scale is not None:
        hyper["rescale_grad"] = hyper["rescale_grad"] / beside(grad_scale, device)
    return hyper


def _known(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.item() if value.device.type == "cpu" else value.reshape(())
    return value


def _beside(value: Any, device: torch.device) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    if device.type == "cpu" or value.device != device:
        return value.item()
    return value.detach().reshape(())


def _recorded(value: Any, device: torch.device) -> Any:
    return value.to(device).reshape(()) if isinstance(value, torch.Tensor) else value
