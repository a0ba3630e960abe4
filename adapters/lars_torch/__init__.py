"""LARS for torch, a ``torch.optim.Optimizer``: the kernels of `lars_array` on the memory of tensors."""

from lars_torch.optimizer import LARS
from lars_torch.param_groups import param_groups

__all__ = ["LARS", "param_groups"]
