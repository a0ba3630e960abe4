"""What is a layer to `lars_torch.LARS`: slices of stacked parameters, several parameters together."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from lars_torch import LARS

OPTIONS: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "trust_coefficient": 0.1}


def parameter(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype))


@pytest.mark.parametrize("kernel", ["compiled", "portable"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_slices_and_parts_are_what_they_would_be_apart_and_together(kernel: str, dtype: torch.dtype) -> None:
    q, k, w = (parameter(i, *shape, dtype=dtype) for i, shape in enumerate([(4, 3), (4, 3), (3, 4, 2)]))
    whole = torch.nn.Parameter(torch.stack([q.detach(), k.detach()]))
    apart = [torch.nn.Parameter(part.clone()) for part in w.detach()]
    options = OPTIONS | {"kernel": kernel}
    groups: Any = [{"params": [("q", q), ("k", k)]}, {"params": [("w", w)], "layer_axes": 1}]
    ours = LARS(groups, layer_of={"q": "attention", "k": "attention"}, **options)
    theirs = LARS([whole, *apart], **options)
    for t in range(4):
        for i, p in enumerate((q, k, w)):
            p.grad = parameter(10 * (t + 1) + i, *p.shape, dtype=dtype).detach()
        whole.grad = torch.stack([q.grad, k.grad])
        for p, g in zip(apart, w.grad, strict=True):
            p.grad = g.clone()
        ours.step()
        theirs.step()
        if t == 1:
            ours = copy.deepcopy(ours)
            (q, k), (w,) = (group["params"] for group in ours.param_groups)
            ours.load_state_dict(ours.state_dict())
    for p, expected in ((q, whole[0]), (k, whole[1]), *zip(w, apart, strict=True)):
        torch.testing.assert_close(p.detach(), expected.detach())
    assert ours.state[w]["momentum_buffer"].shape == w.shape


def test_differentiable_steps_know_layers_too() -> None:
    both, grads = parameter(0, 2, 4), parameter(1, 2, 4).detach()
    q, k = both[0].clone(), both[1].clone()
    whole = both.clone()
    q.grad, k.grad, whole.grad = grads[0], grads[1], grads
    LARS([("q", q), ("k", k)], layer_of=lambda name: "both", differentiable=True, **OPTIONS).step()
    LARS([whole], differentiable=True, **OPTIONS).step()
    torch.testing.assert_close(torch.stack([q, k]), whole)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="layer_of must hold names of parameters; got 'z'"):
        LARS([("q", parameter(0, 2))], lr=0.1, layer_of={"z": 1})
    with pytest.raises(TypeError, match="layer_of must be a mapping or a function"):
        LARS([parameter(0, 2)], lr=0.1, layer_of=3)  # type: ignore[arg-type]
    optimizer = LARS([parameter(0, 2)], lr=0.1, layer_axes=2)
    optimizer.param_groups[0]["params"][0].grad = torch.ones(2)
    with pytest.raises(ValueError, match="layer_axes must be at most the 1 axes of '0'; got 2"):
        optimizer.step()


def test_layer_axes_must_stay_what_they_were() -> None:
    p = torch.nn.Parameter(torch.ones(3, 4))
    optimizer = LARS([p], lr=0.1)
    p.grad = torch.ones(3, 4)
    optimizer.step()
    before = p.detach().clone()
    optimizer.param_groups[0]["layer_axes"] = 1
    for number in (2, 3):  # again, too
        message = rf"^layer_axes of parameter group 0 must stay what it was, 0; got 1 \(step {number}\)$"
        with pytest.raises(ValueError, match=message):
            optimizer.step()
    assert torch.equal(p, before)
    optimizer.param_groups[0]["layer_axes"] = 0
    optimizer.step()
    assert not torch.equal(p, before)
