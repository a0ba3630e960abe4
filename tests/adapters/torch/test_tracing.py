"""Steps that are recorded by autograd, and steps in a compiled graph."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from lars_torch import LARS

OPTIONS: list[dict[str, Any]] = [
    {},
    {"momentum": 0.9, "weight_decay": 0.1},
    {"momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1, "always_adapt": True},
    {"momentum": 0.9, "weight_decay": 0.1, "nesterov": True, "rule": "optax"},
    {"momentum": 0.9, "weight_decay": 0.1, "rule": "simclr-popular", "max_grad_norm": 0.1},
    {"weight_decay": 0.1, "trust_clip": True, "maximize": True},
]


def drawn(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, dtype=torch.float64, requires_grad=True)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


# ------------------------------------------------------------------------------------------------------- differentiable


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("has_buffer", [False, True])
def test_gradients_of_a_step_are_those_of_its_equations(options: dict[str, Any], has_buffer: bool) -> None:
    def stepped(p: Any, g: Any, v: Any) -> Any:
        p = p.clone()
        p.grad = g
        optimizer = LARS([p], lr=0.9, differentiable=True, **options)
        if has_buffer:
            optimizer.state[p]["momentum_buffer"] = v.clone()
        optimizer.step()
        return p, *(x for x in optimizer.state.get(p, {}).values() if x.requires_grad)

    assert torch.autograd.gradcheck(stepped, (drawn(10), drawn(10), drawn(10)))


def test_gradients_with_respect_to_hyper_parameters() -> None:
    def stepped(p: Any, g: Any, lr: Any, weight_decay: Any, trust_coefficient: Any) -> Any:
        p = p.clone()
        p.grad = g
        options = {"lr": lr, "weight_decay": weight_decay, "trust_coefficient": trust_coefficient}
        optimizer = LARS([p], **options, momentum=0.9, differentiable=True)
        optimizer.step()
        p.grad = g * 2
        optimizer.step()
        return p

    numbers = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (0.5, 0.1, 0.01)]
    assert torch.autograd.gradcheck(stepped, (drawn(6), drawn(6), *numbers))


def test_a_recorded_step_is_the_step() -> None:
    rng = torch.Generator().manual_seed(1)
    for options in OPTIONS:
        start = [torch.randn(4, 3, generator=rng), torch.randn((), generator=rng)]
        ours, recorded = (copy.deepcopy(start) for _ in range(2))
        optimizers = LARS(ours, lr=0.5, **options), LARS(recorded, lr=0.5, differentiable=True, **options)
        for _ in range(3):
            for p, q in zip(ours, recorded, strict=True):
                p.grad = torch.randn(p.shape, generator=rng)
                q.grad = p.grad.clone()
            for optimizer in optimizers:
                optimizer.step()
        torch.testing.assert_close(recorded, ours)


# ------------------------------------------------------------------------------------------------------- torch.compile


def pair(**options: Any) -> tuple[Any, Any]:
    """Return two optimizers of equal parameters, the second to be compiled."""
    params = [torch.nn.Parameter(torch.randn(5, 4)), torch.nn.Parameter(torch.randn(3).bfloat16())]
    copies = copy.deepcopy(params)
    return LARS(params, lr=0.5, **options), LARS(copies, lr=0.5, **options)


def params_of(optimizer: Any) -> list[Any]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def give_gradients(*optimizers: Any) -> None:
    for same in zip(*map(params_of, optimizers), strict=True):
        g = torch.randn_like(same[0])
        for p in same:
            p.grad = g.clone()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_compiled_step_is_the_step(options: dict[str, Any]) -> None:
    eager, compiled = pair(**options)
    step = torch.compile(compiled.step, fullgraph=True, backend="aot_eager")
    for _ in range(4):
        give_gradients(eager, compiled)
        eager.step()
        step()
        assert all(map(torch.equal, params_of(eager), params_of(compiled)))
    for p, q in zip(params_of(eager), params_of(compiled), strict=True):
        assert eager.state.get(p, {}).keys() == compiled.state.get(q, {}).keys()
        assert all(torch.equal(eager.state[p][key], compiled.state[q][key]) for key in eager.state.get(p, {}))


def test_a_schedule_compiles_nothing_anew() -> None:
    eager, compiled = pair(momentum=0.9, weight_decay=0.1)
    graphs: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph

    step = torch.compile(compiled.step, fullgraph=True, backend=backend)
    for t in range(5):
        for optimizer in (eager, compiled):  # torch does not trace a step that one of its schedulers counts
            optimizer.param_groups[0].update(lr=0.5 / (t + 1), momentum=0.8 + 0.01 * t)
        give_gradients(eager, compiled)
        eager.step()
        step()
        assert all(map(torch.equal, params_of(eager), params_of(compiled)))
    assert len(graphs) == 1


def test_a_whole_training_step_compiles() -> None:
    eager, compiled = pair(momentum=0.9, weight_decay=0.1, trust_coefficient=0.1)

    def loss_of(optimizer: Any) -> Any:
        w, b = params_of(optimizer)
        return (w.sum(0)[:3] * b).square().sum()

    def train(optimizer: Any) -> Any:
        optimizer.zero_grad()
        loss = loss_of(optimizer)
        loss.backward()
        optimizer.step()
        return loss

    step = torch.compile(train, backend="aot_eager")
    for _ in range(4):
        torch.testing.assert_close(step(compiled), train(eager))
    torch.testing.assert_close(params_of(compiled), params_of(eager))
