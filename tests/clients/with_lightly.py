"""lightly: its losses and schedule, and its own LARS beside ours."""

from __future__ import annotations

import copy
import importlib.util
import io
import sys
from typing import Any
from unittest.mock import MagicMock

import torch
from torch import nn

from lars_torch import LARS

# Its losses import operators of torchvision, which none of these use, and whose wheels are built for torch with CUDA.
if importlib.util.find_spec("torchvision") is None:
    sys.modules |= {name: MagicMock() for name in ("torchvision", "torchvision.ops")}

from lightly.loss import BarlowTwinsLoss, NTXentLoss, VICRegLoss
from lightly.utils import lars as their_lars
from lightly.utils.scheduler import CosineWarmupScheduler

LIBRARIES = ("lightly",)
OPTIONS: dict[str, Any] = {"lr": 0.3, "momentum": 0.9, "weight_decay": 1e-4}


def simclr() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 8), nn.BatchNorm1d(8))


def made(kind: Any, model: nn.Module, **options: Any) -> tuple[Any, Any]:
    decayed, others = ([p for p in model.parameters() if (p.ndim > 1) == wanted] for wanted in (True, False))
    optimizer = kind([{"params": decayed}, {"params": others, "weight_decay": 0.0}], **OPTIONS | options)
    return optimizer, CosineWarmupScheduler(optimizer, warmup_epochs=5, max_epochs=20)


def train(
    model: nn.Module, optimizer: Any, schedule: Any, steps: int, seed: int = 0, loss_of: Any = NTXentLoss
) -> list[float]:
    losses = []
    generator, criterion = torch.Generator().manual_seed(seed), loss_of()
    for _ in range(steps):
        x = torch.randn(32, 12, generator=generator)
        views = [model(x + 0.1 * torch.randn(x.shape, generator=generator)) for _ in range(2)]
        loss = criterion(*views)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def check_its_own_lars_takes_the_same_steps() -> None:
    ours, theirs = simclr(), simclr()
    train(ours, *made(LARS, ours), 20)
    train(theirs, *made(their_lars.LARS, theirs), 20)
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def check_barlow_twins_and_vicreg_train() -> None:
    for loss_of in (BarlowTwinsLoss, VICRegLoss):
        model = simclr()
        losses = train(model, *made(LARS, model, lr=0.02), 20, loss_of=loss_of)
        assert losses[-1] < losses[0], f"{loss_of.__name__}: {losses[0]:.3f} to {losses[-1]:.3f}"


def check_its_checkpoint_is_taken_over() -> None:
    theirs = simclr()
    optimizer, schedule = made(their_lars.LARS, theirs)
    train(theirs, optimizer, schedule, 5)
    ours = copy.deepcopy(theirs)
    own, its_schedule = made(LARS, ours)
    own.load_state_dict(optimizer.state_dict())
    its_schedule.load_state_dict(schedule.state_dict())
    train(ours, own, its_schedule, 5, seed=1)
    train(theirs, optimizer, schedule, 5, seed=1)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def check_resumes_to_the_bit() -> None:
    model = simclr()
    optimizer, schedule = made(LARS, model)
    losses = train(model, optimizer, schedule, 10)
    assert losses[-1] < losses[0]
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}, file)
    file.seek(0)
    other = copy.deepcopy(model)
    own, its_schedule = made(LARS, other)
    saved = torch.load(file, weights_only=True)
    own.load_state_dict(saved["optimizer"])
    its_schedule.load_state_dict(saved["schedule"])
    train(model, optimizer, schedule, 5, seed=1)
    train(other, own, its_schedule, 5, seed=1)
    assert all(map(torch.equal, model.parameters(), other.parameters()))
