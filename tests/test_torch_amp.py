"""Half precision, loss scaling, and what is not finite."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lars_array import NonFiniteError
from lars_torch import LARS

OPTIONS: dict[str, Any] = {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.1, "trust_coefficient": 0.1}


def pair(**options: Any) -> tuple[Any, Any, Any, Any]:
    generator = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter(torch.randn(8, 3, generator=generator))
    q = torch.nn.Parameter(p.detach().clone())
    return p, q, LARS([p], **OPTIONS | options), LARS([q], **OPTIONS | options)


@pytest.mark.parametrize("options", [{}, {"rule": "optax"}, {"max_grad_norm": 0.5}, {"dampening": 0.5}], ids=str)
@pytest.mark.parametrize("unscaled_by_user", [False, True])
@pytest.mark.parametrize("differentiable", [False, True])
def test_a_scaled_loss_makes_the_same_steps(options: Any, unscaled_by_user: bool, differentiable: bool) -> None:
    p, q, scaled, plain = pair(**options)
    if differentiable:
        p = p.detach().clone().requires_grad_().clone()
        p.retain_grad()
        scaled = LARS([p], **OPTIONS | options, differentiable=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for t in range(6):
        overflows = t in (0, 3)
        p.grad = None
        factor = scaler.scale(torch.ones(()))
        p.grad = 2 * (p.detach() - 1) * factor * (torch.inf if overflows else 1)
        if unscaled_by_user:
            scaler.unscale_(scaled)
        scaler.step(scaled)
        scaler.update()
        if not overflows:
            q.grad = 2 * (q.detach() - 1)  # not along q, or no scale would show
            plain.step()
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-6, atol=1e-7)
    assert scaler.get_scale() == 256.0


def test_a_step_with_a_scale_leaves_gradients_alone() -> None:
    p, _, optimizer, _ = pair()
    p.grad = torch.full_like(p, 512.0)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor([1024.0]), torch.zeros(())
    optimizer.step()
    assert (p.grad == 512.0).all()
    before = p.detach().clone()
    optimizer.found_inf = torch.ones(1)
    optimizer.step()
    assert torch.equal(p, before) and optimizer.skipped_steps == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_norms_that_half_precision_can_not_hold(dtype: torch.dtype) -> None:
    p = torch.nn.Parameter(torch.full((70_000,), 300.0).to(dtype))
    optimizer = LARS([p], **OPTIONS)
    p.grad = torch.full((70_000,), 2000.0).to(dtype)
    optimizer.step()
    norms = optimizer.norms()["0"]
    assert norms.parameter == pytest.approx(float(torch.tensor(300.0).to(dtype)) * 70_000**0.5, rel=1e-12)
    assert norms.gradient == pytest.approx(float(torch.tensor(2000.0).to(dtype)) * 70_000**0.5, rel=1e-12)
    assert optimizer.state[p]["momentum_buffer"].dtype == torch.float32
    assert torch.isfinite(p).all()


def test_what_is_not_finite_goes_through_by_default() -> None:
    p, _, optimizer, _ = pair()
    p.grad = torch.full_like(p, torch.nan)
    optimizer.step()
    assert p.isnan().all()


def test_what_is_not_finite_is_refused_or_skipped_if_asked() -> None:
    for nonfinite in ("raise", "skip"):
        p, q, optimizer, _ = pair(nonfinite=nonfinite)
        p.grad = torch.full_like(p, torch.nan)
        if nonfinite == "raise":
            with pytest.raises(NonFiniteError, match="the gradient of '0' has 24 non-finite entries of 24"):
                optimizer.step()
        else:
            optimizer.step()
        assert torch.equal(p, q) and p not in optimizer.state
        assert optimizer.skipped_steps == (nonfinite == "skip")
