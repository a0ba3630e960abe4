"""The hyper-parameters of a parameter group, as `lars_array` takes them."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch

from lars_array._stepper import shown
from lars_array.hyperparams import NUMBERS, PLAIN, check, complete
from lars_torch._keys import NAMES

__all__ = ["check_group", "numbers_of", "tensors_in"]


def check_group(group: Mapping[str, Any]) -> None:
    """Raise for invalid hyper-parameters, as `lars_array.LARS` does.

    Values on a device, which the host would have to wait for, and keys that are no hyper-parameters are not checked.
    """
    check(complete(numbers_of(group)))


def numbers_of(
    group: Mapping[str, Any], device: torch.device | None = None, grad_scale: Any = None, *, recorded: bool = False
) -> dict[str, Any]:
    """Return the hyper-parameters of a group.

    Parameters
    ----------
    group : mapping
        A parameter group.
    device : torch.device, optional
        Tensors on it stay there, unless it is the CPU; the host waits for others. None: all stay where they are.
    grad_scale : number, tensor or None
        What gradients are divided by first.
    recorded : bool
        Whether tensors stay tensors of autograd's graph, on `device`.

    Returns
    -------
    dict
        A number, or a tensor of shape () on `device`, for each hyper-parameter.
    """
    for name in NUMBERS:
        value = group[name]
        if type(value) is float:
            continue
        if callable(value) or (name == "lr" and not isinstance(value, Real | torch.Tensor)):
            rule = f"{name} must be a number or a tensor, see torch.optim.lr_scheduler"
            raise TypeError(f"{rule}; got {shown(value)}")
    found = {name: group[name] for name in NAMES}
    for name in tensors_in(found):
        found[name] = _number(name, found[name], device, recorded)
    if grad_scale is not None:
        if isinstance(grad_scale, torch.Tensor):
            grad_scale = _number("grad_scale", grad_scale, device, recorded)
        found["rescale_grad"] = found["rescale_grad"] / grad_scale
    return found


def tensors_in(options: Mapping[str, Any]) -> list[str]:
    """Return the names of the hyper-parameters that are tensors."""
    return [name for name, x in options.items() if type(x) not in PLAIN and isinstance(x, torch.Tensor)]


def _number(name: str, value: torch.Tensor, device: torch.device | None, recorded: bool) -> Any:
    if value.numel() != 1:
        raise ValueError(f"Tensor {name} must be 1-element; got shape {tuple(value.shape)!r}")
    if recorded:
        return value.to(device).reshape(())
    if value.device.type == "cpu" or device not in (None, value.device):
        return value.item()
    return value.detach().reshape(())
