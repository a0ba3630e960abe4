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
@pytest.mark.parametrize("fused", [False, True])
def test_a_scaled_loss_makes_the_same_steps(
    options: Any, unscaled_by_user: bool, differentiable: bool, fused: bool
) -> None:
    if differentiable and fused:
        pytest.skip("exclude each other")
    p, q, scaled, plain = pair(**options, fused=fused)
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


def scaled_gradients(*params: Any, overflow: bool = False) -> Any:
    """Return a scaler of 1024, as after a backward pass that gave gradients of 1 or of infinity."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    scaler.scale(torch.ones(()))
    for p in params:
        p.grad = torch.full_like(p, torch.inf if overflow else 1024.0)
    return scaler


@pytest.mark.parametrize("kind", [LARS, torch.optim.SGD])
@pytest.mark.parametrize("fused", [None, False, True])
def test_only_fused_takes_the_scale_as_with_sgd(kind: Any, fused: bool | None) -> None:
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = kind([p], lr=0.5, fused=fused)
    assert getattr(optimizer, "_step_supports_amp_scaling", False) is bool(fused)
    seen: list[float] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(float(p.grad[0])))
    scaler = scaled_gradients(p)
    scaler.step(optimizer)
    assert seen == [1024.0 if fused else 1.0] and torch.equal(p, torch.full((3,), 0.5))
    assert not hasattr(optimizer, "grad_scale") and not hasattr(optimizer, "found_inf")
    scaler = scaled_gradients(p, overflow=True)
    scaler.step(optimizer)
    scaler.update()
    assert len(seen) == 1 + bool(fused) and torch.equal(p, torch.full((3,), 0.5)) and scaler.get_scale() == 512.0


@pytest.mark.parametrize(
    "options", [{"fused": True, "differentiable": True}, {"fused": True, "foreach": True}], ids=str
)
def test_fused_excludes_what_it_excludes_in_sgd(options: Any) -> None:
    for kind in (LARS, torch.optim.SGD):
        with pytest.raises(RuntimeError, match="fused"):
            kind([torch.nn.Parameter(torch.ones(3))], lr=0.5, **options)


@pytest.mark.parametrize("reason", ["gradient", "parameter", "option"])
def test_a_step_that_is_rejected_leaves_no_scale_behind(reason: str) -> None:
    p, q = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = LARS([p, q], lr=0.5, fused=True, nonfinite="raise")
    scaler = scaled_gradients(p, q)
    if reason == "gradient":
        q.grad = torch.ones(3).to_sparse()
    elif reason == "parameter":
        q.data.fill_(torch.nan)
    else:
        optimizer.param_groups[0]["momentum"] = -1
    with pytest.raises((ValueError, TypeError)):
        scaler.step(optimizer)
    assert not hasattr(optimizer, "grad_scale") and not hasattr(optimizer, "found_inf")
    optimizer.param_groups[0]["momentum"] = 0
    q.data.fill_(1.0)
    scaler = scaled_gradients(p, q)
    scaler.step(optimizer)
    assert torch.equal(p, torch.full((3,), 0.5)) and torch.equal(q, p)


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


# ------------------------------------------------------------------------------------------- masters follow the owner


def copied(p: Any) -> None:
    with torch.no_grad():
        p.copy_(torch.full_like(p, 3.0))


def clamped(p: Any) -> None:
    with torch.no_grad():
        p.clamp_(-0.25, 0.25)


def loaded(p: Any) -> None:
    module = torch.nn.Module()
    module.register_parameter("p", p)
    module.load_state_dict({"p": torch.linspace(1, 2, p.numel()).to(p.dtype)})


def replaced(p: Any) -> None:
    p.data = torch.full_like(p, 3.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("write", [copied, clamped, loaded, replaced])
@pytest.mark.parametrize("backend", [None, "eager", "aot_eager"])
def test_a_master_is_made_anew_after_another_has_written(write: Any, dtype: torch.dtype, backend: Any) -> None:
    options: dict[str, Any] = {"lr": 2.0**-12, "master_weights": True}
    p = torch.nn.Parameter(torch.linspace(0.5, 1, 20).to(dtype))
    optimizer = LARS([p], **options)
    step = torch.compile(optimizer.step, backend=backend) if backend else optimizer.step
    p.grad = torch.ones_like(p)
    for _ in range(2):
        step()
    write(p)
    expected = p.detach().float() - 2.0**-12
    step()
    assert torch.equal(optimizer.state[p]["master"], expected) and torch.equal(p, expected.to(dtype))


@pytest.mark.parametrize("backend", [None, "eager", "aot_eager"])
def test_a_master_stays_after_our_own_writes_and_after_moves(backend: Any) -> None:
    torch._dynamo.reset()
    p = torch.nn.Parameter(torch.ones(20).bfloat16())
    optimizer = LARS([p], lr=2.0**-12, master_weights=True)
    step = torch.compile(optimizer.step, backend=backend) if backend else optimizer.step
    p.grad = torch.ones_like(p)
    for t in range(8):
        step()
        assert (optimizer.state[p]["master"] == 1 - (t + 1) * 2.0**-12).all()
        if t == 3:
            p.data = p.data.clone()
            torch.autograd.graph.increment_version(p)
        if t == 5:
            optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_master_with_a_nan_stays_after_moves(dtype: torch.dtype) -> None:
    p = torch.nn.Parameter(torch.ones(3).to(dtype))
    optimizer = LARS([p], lr=2.0**-12, master_weights=True)
    p.grad = torch.tensor([1.0, torch.nan, 1.0], dtype=dtype)
    optimizer.step()
    p.data = p.data.clone()
    p.grad = torch.ones_like(p)
    optimizer.step()
    expected = torch.tensor([1 - 2.0**-11, torch.nan, 1 - 2.0**-11])
    torch.testing.assert_close(optimizer.state[p]["master"], expected, rtol=0, atol=0, equal_nan=True)


def test_a_write_is_seen_however_late_the_parameter_is_stepped_again() -> None:
    p, q = (torch.nn.Parameter(torch.ones(3).bfloat16()) for _ in range(2))
    optimizer = LARS([p, q], lr=2.0**-12, master_weights=True, nonfinite="skip")
    p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
    optimizer.step()
    copied(p)
    p.grad = None
    optimizer.step()
    assert (optimizer.state[p]["master"] == 1 - 2.0**-12).all(), "a step without its gradient has changed its state"
    p.grad = torch.full_like(p, torch.nan)
    optimizer.step()
    assert (optimizer.state[p]["master"] == 1 - 2.0**-12).all(), "a skipped step has changed a state"
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert (optimizer.state[p]["master"] == 3 - 2.0**-12).all()
