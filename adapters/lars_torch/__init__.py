"""LARS for torch, a ``torch.optim.Optimizer``: the kernels of `lars_array` on the memory of tensors."""

try:
    from lars_torch.files import load, save
    from lars_torch.optimizer import LARS
    from lars_torch.param_groups import param_groups
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    message = "lars_torch needs torch, which is not installed: pip install 'lars-array[torch]'"
    raise ModuleNotFoundError(message, name=error.name) from error

__all__ = ["LARS", "load", "param_groups", "save"]
