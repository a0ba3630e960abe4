"""Every trajectory of the original implementations, reproduced by the optimizer for torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden_cases import Call, Case, call_of
from golden_runs import NEGATIVE, POSITIVE, assert_reproduces, names

from lars_torch import LARS


def run(case: Case, call: Call, dtype: torch.dtype, **options: Any) -> tuple[list[Any], dict[str, Any]]:
    """Return the parameters after every step, and the momentum buffers."""
    layers = case.data["layers"]
    initial = [tensor(layer["initial"], layer, dtype) for layer in layers]
    params = [torch.nn.Parameter(p) for p in initial]
    if options.get("differentiable"):
        params = [p.detach().clone().requires_grad_().clone() for p in initial]
    groups = [{"params": [p]} | own for p, own in zip(params, call.options, strict=True)]
    optimizer = LARS(groups, lr=0.0, **options)
    trajectory = []
    for lr, grads in zip(case.data["lr"], case.data["grads"], strict=True):
        for group in optimizer.param_groups:
            group["lr"] = lr
        for p, layer, flat in zip(params, layers, grads, strict=True):
            if flat is None and call.missing_is_zero:
                flat = [0.0] * len(layer["initial"])
            p.retains_grad or p.is_leaf or p.retain_grad()
            p.grad = None if flat is None else tensor(flat, layer, dtype)
        optimizer.step()
        trajectory.append([p.detach().clone().numpy() for p in params])
    buffers = {}
    for p, layer in zip(params, layers, strict=True):
        v = optimizer.state.get(p, {}).get("momentum_buffer")
        buffers[layer["name"]] = None if v is None else v.detach().numpy()
    return trajectory, buffers


def tensor(flat: list[float], layer: dict[str, Any], dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor(flat, dtype=dtype).reshape(layer["shape"])


@pytest.mark.parametrize("case", POSITIVE, ids=names(POSITIVE))
def test_torch_reproduces_the_original(case: Case) -> None:
    call = call_of(case)
    assert_reproduces(case, call, *run(case, call, torch.float64), tolerance=1e-12)
    assert_reproduces(case, call, *run(case, call, torch.float32), tolerance=1e-5)


@pytest.mark.parametrize("case", POSITIVE[::6], ids=names(POSITIVE[::6]))
def test_a_step_under_autograd_reproduces_the_original(case: Case) -> None:
    call = call_of(case)
    assert_reproduces(case, call, *run(case, call, torch.float64, differentiable=True), tolerance=1e-12)


@pytest.mark.parametrize("case", NEGATIVE, ids=names(NEGATIVE))
def test_torch_does_not_reproduce_a_faulty_reference(case: Case) -> None:
    call = call_of(case)
    with pytest.raises(AssertionError, match="off by"):
        assert_reproduces(case, call, *run(case, call, torch.float64), tolerance=1e-6)
