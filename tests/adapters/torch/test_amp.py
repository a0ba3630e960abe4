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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_masters_take_the_steps_that_half_precision_would_lose(dtype: torch.dtype) -> None:
    start = torch.linspace(1, 2, 50)
    full, with_master, without = (torch.nn.Parameter(start.to(kind)) for kind in (torch.float32, dtype, dtype))
    with torch.no_grad():
        full.copy_(with_master)
    options: dict[str, Any] = {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.1, "trust_coefficient": 0.01}
    optimizers = [LARS([p], **options) for p in (full, with_master, without)]
    optimizers[1].param_groups[0]["master_weights"] = True
    for _ in range(100):
        for optimizer in optimizers:
            (p,) = optimizer.param_groups[0]["params"]
            p.grad = torch.ones_like(p)
            optimizer.step()
    master = optimizers[1].state[with_master]["master"]
    assert master.dtype == torch.float32
    torch.testing.assert_close(master, full.detach(), rtol=1e-6, atol=0)
    assert torch.equal(with_master, master.to(dtype))
    lost = (without.float() - full).abs().mean()
    assert lost > 4 * (with_master.float() - full).abs().mean()


def test_masters_go_and_come_with_the_option() -> None:
    p = torch.nn.Parameter(torch.ones(4).bfloat16())
    optimizer = LARS([p], lr=2.0**-12, master_weights=True)
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert (optimizer.state[p]["master"] == 1 - 2.0**-12).all() and (p == 1).all()
    optimizer.param_groups[0]["master_weights"] = False
    optimizer.step()
    assert not optimizer.state[p]
    optimizer.param_groups[0]["master_weights"] = True
    optimizer.step()
    assert (optimizer.state[p]["master"] == 1 - 2.0**-12).all()


def test_a_recorded_step_has_no_masters() -> None:
    with pytest.raises(ValueError, match="differentiable and master_weights exclude each other"):
        LARS([torch.zeros(2)], lr=0.1, differentiable=True, master_weights=True)


def test_a_step_without_gradients_is_checked_and_can_be_skipped() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = LARS([p], lr=0.1)
    p.grad = torch.ones(3)
    optimizer.step()
    optimizer.zero_grad()
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    assert optimizer.skipped_steps == 1
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    assert optimizer.skipped_steps == 1
    optimizer.param_groups[0]["lr"] = -1.0
    with pytest.raises(ValueError, match="Invalid learning rate"):
        optimizer.step()
