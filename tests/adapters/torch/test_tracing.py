"""Steps that are recorded by autograd, and steps in a compiled graph."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

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


@pytest.fixture(autouse=True)
def nothing_compiled() -> None:
    """Have dynamo forget the steps of other tests: it compiles each function a limited number of times."""
    torch._dynamo.reset()


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


# --------------------------------------------------------------------------- modes and transformations that see a step


def network() -> tuple[torch.nn.Module, Any]:
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
    return model, LARS(model.parameters(), lr=0.5, momentum=0.9, weight_decay=0.1, trust_coefficient=0.1)


@pytest.mark.parametrize("outside", [False, True])
def test_fake_tensors_step(outside: bool) -> None:
    with FakeTensorMode():
        model, optimizer = network()
        model(torch.ones(2, 4)).sum().backward()
        if not outside:
            optimizer.step()
    optimizer.step()
    for p in model.parameters():
        buffer = optimizer.state[p]["momentum_buffer"]
        assert isinstance(buffer, FakeTensor) and (buffer.shape, buffer.dtype) == (p.shape, torch.float32)


def test_an_estimator_of_memory_sees_the_state() -> None:
    mem_tracker = pytest.importorskip("torch.distributed._tools.mem_tracker")

    def size_of_state(kind: Any) -> int:
        with FakeTensorMode():
            model = torch.nn.Linear(100, 100)
            optimizer = kind(model.parameters(), lr=0.1, momentum=0.9)
            tracker = mem_tracker.MemTracker()
            tracker.track_external(model, optimizer)
            with tracker:
                model(torch.ones(2, 100)).sum().backward()
                optimizer.step()
            (snapshot,) = tracker.get_tracker_snapshot("current").values()
        return next(int(size) for kind, size in snapshot.items() if str(kind).endswith("OPT"))

    assert size_of_state(LARS) == size_of_state(torch.optim.SGD) == 4 * 100 * 101


def test_fake_tensors_and_others_are_not_mixed() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    q = FakeTensorMode().from_tensor(torch.nn.Parameter(torch.ones(3)))
    optimizer = LARS([p, q], lr=0.1)
    p.grad, q.grad = torch.ones(3), torch.ones_like(q)
    with pytest.raises(TypeError, match="parameter '1' must be a plain tensor"):
        optimizer.step()
    assert torch.equal(p, torch.ones(3))


def fx_step(optimizer: Any, model: torch.nn.Module, mode: Any) -> Any:
    """Return the graph of a step by make_fx, from parameters and state to new ones, as torch's own example has it."""
    stateless = pytest.importorskip("torch.optim._stateless")

    def step(params: dict[str, Any], state_dict: Any) -> Any:
        for p in params.values():
            p.grad = torch.ones_like(p)
        with stateless.swap_in_optimizer_params_and_state(optimizer, params, state_dict):
            optimizer.step()
        return params, state_dict["state"]

    with mode:
        params = {name: mode.from_tensor(p) for name, p in model.named_parameters()}
        state = torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, optimizer.state_dict())
    return make_fx(step)(params, state)


@pytest.mark.parametrize("rule", ["flash", "optax", "nvidia", "simclr-popular"])
def test_a_graph_by_make_fx_makes_the_step(rule: str) -> None:
    model, optimizer = network()
    optimizer.param_groups[0]["rule"] = rule
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    graph = fx_step(optimizer, model, FakeTensorMode(allow_non_fake_inputs=True))
    params = {name: p.detach().clone() for name, p in model.named_parameters()}
    state = copy.deepcopy(optimizer.state_dict())
    graph(params, state)
    optimizer.step()
    torch.testing.assert_close(list(params.values()), [p.detach() for p in model.parameters()])
    for i, p in enumerate(model.parameters()):
        torch.testing.assert_close(state["state"][i]["momentum_buffer"], optimizer.state[p]["momentum_buffer"])


def test_a_traced_step_does_not_check_what_is_finite() -> None:
    model, optimizer = network()
    optimizer.param_groups[0]["nonfinite"] = "skip"
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    with pytest.raises(ValueError, match="nonfinite must be 'propagate' in a step that is traced; got 'skip'"):
        fx_step(optimizer, model, FakeTensorMode(allow_non_fake_inputs=True))


def test_master_weights_by_a_mode_are_those_of_a_step() -> None:
    eager, watched = pair(momentum=0.9, weight_decay=0.1, master_weights=True)
    for _ in range(3):
        give_gradients(eager, watched)
        eager.step()
        with FlopCounterMode(display=False):
            watched.step()
    torch.testing.assert_close(params_of(watched), params_of(eager))
    (_, p), (_, q) = params_of(eager), params_of(watched)
    torch.testing.assert_close(watched.state[q]["master"], eager.state[p]["master"])


@pytest.mark.parametrize("transformed", ["grad", "vmap"])
def test_steps_within_torch_func_are_those_of_sgd(transformed: str) -> None:
    def result(kind: Any, **options: Any) -> Any:
        def loss(x: Any) -> Any:
            p = x.clone()
            optimizer = kind([p], lr=0.1, weight_decay=0.1, **options)
            for _ in range(2):
                p.grad = 2 * x
                optimizer.step()
            return (p * p).sum()

        return getattr(torch.func, transformed)(loss)(torch.linspace(1, 2, 6).reshape(2, 3))

    options = {"differentiable": True} if transformed == "grad" else {}
    torch.testing.assert_close(result(LARS, adapt=False, **options), result(torch.optim.SGD, **options))


@pytest.mark.skipif(torch.__version__ < (2, 6), reason="torch 2.5 refuses it in words of its own")
@pytest.mark.parametrize("strict", [False, True])
def test_a_step_is_not_exported(strict: bool) -> None:
    model, optimizer = network()

    class Step(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            optimizer.step()
            return x

    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(Exception, match=r"a step of lars_torch\.LARS can't be exported"):
        torch.export.export(Step(), (torch.ones(2),), strict=strict)
    assert all(map(torch.equal, model.parameters(), before))
