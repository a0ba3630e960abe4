"""accelerate: mixed precision, accumulation, checkpoints, and what it says of skipped steps."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState
from common import assert_learned, assert_same, data, loss_of, network, optimizer_of
from torch.utils.data import DataLoader, TensorDataset

LIBRARIES = ("accelerate",)


def prepared(**options: Any) -> Any:
    AcceleratorState._reset_state(reset_partial_state=True)  # of the checks before
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, **options)
    model = network()
    optimizer = optimizer_of(model)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40)
    loader = DataLoader(TensorDataset(*data()), batch_size=16)
    return accelerator, *accelerator.prepare(model, optimizer, loader, schedule)


def train(accelerator: Any, model: Any, optimizer: Any, loader: Any, schedule: Any, epochs: int) -> None:
    for _ in range(epochs):
        for x, y in loader:
            with accelerator.accumulate(model):
                accelerator.backward(torch.nn.functional.cross_entropy(model(x), y))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()


def resumed(**options: Any) -> None:
    accelerator, *whole = prepared(**options)
    train(accelerator, *whole, epochs=6)
    with tempfile.TemporaryDirectory() as folder:
        accelerator.save_state(folder)
        train(accelerator, *whole, epochs=6)
        accelerator, *other = prepared(**options)
        accelerator.load_state(folder)
    train(accelerator, *other, epochs=6)
    model, again = (accelerator.unwrap_model(x[0], keep_fp32_wrapper=False) for x in (whole, other))
    assert_same(model, again)
    assert_learned(model)


def check_resumes_to_the_bit() -> None:
    resumed()


def check_bf16_resumes_to_the_bit() -> None:
    resumed(mixed_precision="bf16")


def check_a_skipped_step_is_seen() -> None:
    """With the scaler that fp16 has on a GPU."""
    Accelerator(cpu=True)
    model = network()
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    optimizer = AcceleratedOptimizer(optimizer_of(model), scaler=scaler)
    for factor, skipped in ((1.0, False), (float("inf"), True), (1.0, False)):
        optimizer.zero_grad()
        scaler.scale(loss_of(model) * factor).backward()
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.step()
        assert optimizer.step_was_skipped == skipped, f"skipped {skipped}, reported {optimizer.step_was_skipped}"
        assert all(map(torch.equal, before, model.parameters())) == skipped
