"""LARS for torch: `lars_array` over DLPack, as a ``torch.optim.Optimizer``."""
