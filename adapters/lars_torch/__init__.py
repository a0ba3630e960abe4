"""LARS for torch: `lars_array` over DLPack, as a ``torch.optim.Optimizer``."""

from lars_torch.groups import param_groups
from lars_torch.optimizer import LARS

__all__ = ["LARS", "param_groups"]
