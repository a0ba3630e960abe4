"""Derivatives of torch through a step are finite where norms are zero."""

from __future__ import annotations

import pytest
import torch
from ways import NAMES

from lars_array import lars_step
from lars_torch import LARS


@pytest.mark.parametrize("rule", NAMES)
def test_derivatives_of_a_step_of_zeros(rule: str) -> None:
    zero, ones, lr = (x.requires_grad_() for x in (torch.zeros(3), torch.ones(3), torch.tensor(0.1)))
    for p, g in ((zero, ones), (ones, zero), (zero, zero)):
        new, _ = lars_step(p, g, lr=lr, momentum=0.9, weight_decay=1e-3, rule=rule, max_grad_norm=1.0)
        for x in torch.autograd.grad(new.sum(), (p, g, lr), allow_unused=True):
            assert x is None or torch.isfinite(x).all()


def test_derivatives_through_a_differentiable_optimizer() -> None:
    model = torch.nn.Linear(3, 2)
    torch.nn.init.zeros_(model.bias)
    lr = torch.tensor(0.1, requires_grad=True)
    weight, bias = (p.detach().clone().requires_grad_() for p in model.parameters())
    moved = [weight.clone(), bias.clone()]
    for p in moved:
        p.retain_grad()
        p.grad = torch.ones_like(p)
    LARS(moved, lr=lr, weight_decay=1e-3, differentiable=True).step()
    for x in torch.autograd.grad(sum(p.sum() for p in moved), (weight, bias, lr)):
        assert torch.isfinite(x).all()
