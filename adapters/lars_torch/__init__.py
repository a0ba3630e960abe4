"""LARS for torch: `lars_array` over DLPack, as a ``torch.optim.Optimizer``."""

from lars_torch.optimizer import LARS
from lars_torch.param_groups import param_groups

__all__ = ["LARS", "param_groups"]
