"""torch's optimizer on a CUDA device: as on the CPU, on torch's stream, and waiting for nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lars_torch import LARS
from lars_torch._arrays import view

pytestmark = pytest.mark.gpu

OPTIONS: list[dict[str, Any]] = [
    {},
    {"momentum": 0.9, "weight_decay": 0.1},
    {"momentum": 0.9, "weight_decay": 0.1, "nesterov": True, "rule": "optax"},
    {"momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1, "max_grad_norm": 0.5},
    {"momentum": 0.9, "weight_decay": 0.1, "nonfinite": "skip"},
    {"momentum": 0.9, "weight_decay": 0.1, "rule": "mxnet"},
]
SHAPES = [(64, 32, 3, 3), (64,), (1000, 64), (), (0, 3), (17,)]


def parameters(device: str, dtype: torch.dtype = torch.float32) -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.nn.Parameter(torch.randn(shape, generator=generator).to(device=device, dtype=dtype)) for shape in SHAPES
    ]


def give_gradients(number: int, *models: list[Any]) -> None:
    generator = torch.Generator().manual_seed(100 + number)
    for same in zip(*models, strict=True):
        g = torch.randn(same[0].shape, generator=generator)
        for p in same:
            p.grad = g.to(device=p.device, dtype=p.dtype)


def assert_alike(far: list[Any], near: list[Any], dtype: torch.dtype) -> None:
    bounds = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
    for p, q in zip(far, near, strict=True):
        torch.testing.assert_close(p.detach().cpu(), q.detach(), rtol=bounds[dtype], atol=bounds[dtype])


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_steps_are_those_of_the_cpu(options: dict[str, Any], dtype: torch.dtype) -> None:
    far, near = parameters("cuda", dtype), parameters("cpu", dtype)
    optimizers = LARS(far, lr=0.5, **options), LARS(near, lr=0.5, **options)
    for t in range(6):
        give_gradients(t, far, near)
        if t == 3:
            far[1].grad = near[1].grad = None
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = 0.5 / (t + 1)
            optimizer.step()
    assert_alike(far, near, dtype)
    for p, q in zip(far, near, strict=True):
        ours, theirs = (optimizer.state.get(x, {}) for optimizer, x in zip(optimizers, (p, q), strict=True))
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert ours[key].is_cuda and ours[key].dtype == theirs[key].dtype


def test_views_lie_where_their_tensors_do() -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        tensor = torch.ones(3, 5, device="cuda", dtype=dtype)
        assert view(tensor).data.ptr == tensor.data_ptr()


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_step_waits_for_nothing_and_allocates_nothing(options: dict[str, Any]) -> None:
    import cupy

    params = parameters("cuda")
    optimizer = LARS(params, lr=0.5, **options)
    give_gradients(0, params)
    for _ in range(3):
        optimizer.step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"], cupy.get_default_memory_pool().used_bytes()
    try:
        torch.cuda.set_sync_debug_mode("error")
        for t in range(3):
            optimizer.param_groups[0]["lr"] = 0.1 * (t + 1)
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    after = torch.cuda.memory_stats()["allocation.all.allocated"], cupy.get_default_memory_pool().used_bytes()
    assert after == before


def test_steps_are_done_on_torchs_current_stream() -> None:
    far, near = parameters("cuda"), parameters("cpu")
    options: dict[str, Any] = {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.1}
    optimizers = LARS(far, **options), LARS(near, **options)
    stream = torch.cuda.Stream()
    give_gradients(0, far, near)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for _ in range(20):
            torch.cuda._sleep(1_000_000)  # a step that did not wait for this would see old gradients
            for p in far:
                p.grad.mul_(0.5)
            optimizers[0].step()
    stream.synchronize()
    for _ in range(20):
        for p in near:
            p.grad.mul_(0.5)
        optimizers[1].step()
    assert_alike(far, near, torch.float32)


def test_a_captured_step_reads_the_learning_rate_when_it_is_replayed() -> None:
    far, near = parameters("cuda"), parameters("cpu")
    lr = torch.tensor(0.5, device="cuda")
    options: dict[str, Any] = {"momentum": 0.9, "weight_decay": 0.1}
    optimizers = LARS(far, lr=lr, **options), LARS(near, lr=0.5, **options)
    give_gradients(0, far, near)
    for optimizer in optimizers:
        optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizers[0].step()
    for t in range(1, 5):
        lr.fill_(0.5 / (t + 1))
        optimizers[1].param_groups[0]["lr"] = 0.5 / (t + 1)
        for p, q in zip(far, near, strict=True):
            q.grad.mul_(0.9)
            p.grad.copy_(q.grad)
        graph.replay()
        optimizers[1].step()
    torch.cuda.synchronize()
    assert_alike(far, near, torch.float32)


def test_a_loss_scale_is_read_on_the_device() -> None:
    far, near = parameters("cuda"), parameters("cpu")
    options: dict[str, Any] = {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.1}
    scaled, plain = LARS(far, **options), LARS(near, **options)
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
    for t in range(5):
        give_gradients(t, far, near)
        overflows = t in (0, 2)
        factor = scaler.scale(torch.ones((), device="cuda"))
        for p in far:
            p.grad.mul_(factor * (torch.inf if overflows else 1.0))
        scaler.step(scaled)
        scaler.update()
        if not overflows:
            plain.step()
    assert_alike(far, near, torch.float32)
    scaled.synchronize()
    assert scaled.skipped_steps == 2


def test_parameters_of_two_kinds_of_devices() -> None:
    far, near = parameters("cuda"), parameters("cpu")
    optimizer = LARS([*far, *near], lr=0.5, momentum=0.9, weight_decay=0.1)
    for t in range(3):
        give_gradients(t, far, near)
        optimizer.step()
    assert_alike(far, near, torch.float32)
    optimizer.param_groups[0]["max_grad_norm"] = 1.0
    with pytest.raises(ValueError, match="max_grad_norm needs all parameters on one device"):
        optimizer.step()
