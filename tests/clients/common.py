"""What the clients train: a small network on separable data, and what they are compared by."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lars_torch import LARS, param_groups

OPTIONS: dict[str, Any] = {"lr": 0.5, "momentum": 0.9, "trust_coefficient": 0.1}


def network() -> nn.Module:
    """Return a network whose weights are the same each time."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 2))


def data(size: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Return inputs and their classes."""
    x = torch.randn(size, 8, generator=torch.Generator().manual_seed(1))
    return x, (x[:, 0] > 0).long()


def optimizer_of(model: nn.Module, **options: Any) -> LARS:
    """Return the optimizer as a user makes it."""
    return LARS(param_groups(model, weight_decay=1e-4), **OPTIONS | options)


def loss_of(model: nn.Module) -> torch.Tensor:
    """Return the loss on all data."""
    x, y = data()
    return nn.functional.cross_entropy(model(x), y)


def assert_same(ours: nn.Module, theirs: nn.Module) -> None:
    """Two networks have the same weights, to the bit."""
    for (name, p), q in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert torch.equal(p, q), f"{name}: off by {(p - q).abs().max().item():.3g}"


def assert_learned(model: nn.Module) -> None:
    """A network fits the data better than it did when it was made."""
    before, after = loss_of(network()).item(), loss_of(model).item()
    assert after < 0.8 * before, f"the loss was {before:.3f} and is {after:.3f}"
