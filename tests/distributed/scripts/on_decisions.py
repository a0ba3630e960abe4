"""Run by test_decisions_torch on 2 ranks: steps that one of them refuses or skips."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import engines
import torch
from ranks import serve
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor

from lars_torch import LARS


def is_odd() -> bool:
    return distributed.get_rank() == 1


def tried(step: Callable[[], Any]) -> str:
    """Return what a step raises, or "stepped"."""
    try:
        step()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "stepped"


def memory_of(model: nn.Module, optimizer: LARS) -> list[torch.Tensor]:
    """Return copies of everything that a step writes to."""
    kept = [x for p in model.parameters() for x in (p, *optimizer.state[p].values())]
    return [(x._local_tensor if isinstance(x, DTensor) else x).detach().clone() for x in kept]


def decided(spoil: Callable[[nn.Module, LARS], Any], mend: Callable[[LARS], None] | None = None, **options: Any) -> Any:
    """Spoil a step on one rank; say what each rank saw, whether anything changed, and whether the next step works."""
    model, optimizer = engines.spread(**options)
    engines.train(model, optimizer, 2)
    engines.backward(model, optimizer, 2)
    before, skipped = memory_of(model, optimizer), optimizer.skipped_steps
    closure = spoil(model, optimizer) if is_odd() else None
    seen = tried(lambda: optimizer.step(closure))
    after = memory_of(model, optimizer)
    if mend is not None:
        mend(optimizer)
    count = optimizer.skipped_steps - skipped
    following = tried(lambda: engines.train(model, optimizer, 1, start=3))
    return {"seen": seen, "unchanged": all(map(torch.equal, before, after)), "skipped": count, "next": following}


def put_nan(model: nn.Module, _: LARS) -> None:
    model[0].weight.grad._local_tensor[0, 0] = float("nan")  # type: ignore[index, union-attr]


def put_lr(value: float) -> Callable[[nn.Module, LARS], None]:
    return lambda _, optimizer: optimizer.param_groups[0].update(lr=value)


def take_back(optimizer: LARS) -> None:
    optimizer.param_groups[0]["lr"] = engines.OPTIONS["lr"]


def failing_closure(*_: Any) -> Callable[[], Any]:
    def closure() -> float:
        raise RuntimeError("no loss")

    return closure


def cut_gradient(model: nn.Module, _: LARS) -> None:
    weight = model[0].weight  # type: ignore[index, union-attr]
    weight.grad._local_tensor = weight.grad._local_tensor[:, :1]


def set_found_inf(_: nn.Module, optimizer: LARS) -> None:
    optimizer.found_inf = torch.tensor(1.0)


def scaler_disagrees() -> Any:
    """A scaler that sees an infinity on one rank only, as torch's does where the first gradient is not spread."""
    model, optimizer = engines.spread(fused=True)
    scaler = ShardedGradScaler("cpu", init_scale=4.0)
    seen = []
    for k in range(3):
        generator = torch.Generator().manual_seed(k)
        x, y = (torch.randn(8, width, generator=generator, dtype=torch.float64) for width in (7, 3))
        optimizer.zero_grad()
        scaler.scale((model(x) - y).square().mean()).backward()
        if k == 1 and is_odd():
            model[4].bias.grad._local_tensor[...] = float("inf")  # type: ignore[index, union-attr]
        before = [p._local_tensor.detach().clone() for p in model.parameters()]
        scaler.step(optimizer)
        scaler.update()
        stays = all(torch.equal(a, p._local_tensor) for a, p in zip(before, model.parameters(), strict=True))
        seen.append([stays, scaler.get_scale()])
    return seen


def pieces(**options: Any) -> tuple[list[nn.Parameter], LARS]:
    """Return plain pieces of two layers, and their optimizer."""
    torch.manual_seed(0)
    wholes = [torch.randn(6, 3, dtype=torch.float64), torch.randn(5, dtype=torch.float64)]
    params = [nn.Parameter(x.chunk(2)[distributed.get_rank()].clone()) for x in wholes]
    for p in params:
        p.grad = torch.ones_like(p)
    named = list(zip("ab", params, strict=True))
    return params, LARS(named, **engines.OPTIONS | options, shard_group=distributed.group.WORLD)


def missing_gradient() -> Any:
    params, optimizer = pieces()
    optimizer.step()
    before = [p.detach().clone() for p in params]
    if is_odd():
        params[1].grad = None
    seen = tried(optimizer.step)
    params[1].grad = torch.ones_like(params[1])
    return {"seen": seen, "unchanged": all(map(torch.equal, before, params)), "next": tried(optimizer.step)}


def missing_on_all() -> Any:
    params, optimizer = pieces()
    optimizer.step()
    params[1].grad = None
    before = params[1].detach().clone()
    seen = tried(optimizer.step)
    params[0].grad = None
    return {"seen": seen, "unchanged": torch.equal(before, params[1]), "next": tried(optimizer.step)}


def other_layers() -> Any:
    """Ranks whose layers differ in number, which gloo alone would not survive."""
    params, _ = pieces()
    mine = [("a", params[0])] if is_odd() else [("a", params[0]), ("b", params[1])]
    optimizer = LARS(mine, **engines.OPTIONS, shard_group=distributed.group.WORLD)
    return {"seen": tried(optimizer.step)}


def other_order() -> Any:
    params, _ = pieces()
    named = list(zip("ab", params, strict=True))
    optimizer = LARS(named[::-1] if is_odd() else named, **engines.OPTIONS, shard_group=distributed.group.WORLD)
    return {"seen": tried(optimizer.step)}


def first_step_is_refused() -> Any:
    _, optimizer = pieces()
    if is_odd():
        optimizer.param_groups[0]["lr"] = -1.0
    seen = tried(optimizer.step)
    take_back(optimizer)
    return {"seen": seen, "next": tried(optimizer.step)}


def group_is_added() -> Any:
    _, optimizer = pieces()
    optimizer.step()
    more = nn.Parameter(torch.ones(2, dtype=torch.float64))
    more.grad = torch.ones_like(more)
    optimizer.add_param_group({"params": [("c", more)]})
    return {"seen": tried(optimizer.step), "norm": optimizer.norms()["c"].parameter}


def two_optimizers() -> Any:
    """Steps of two optimizers in turn on one group."""
    (a, first), (b, second) = pieces(), pieces(momentum=0)
    for _ in range(3):
        first.step()
        second.step()
    return {"seen": tried(first.step), "norms": [len(first.norms()), len(second.norms())], "params": len(a) + len(b)}


def partial_parameter() -> Any:
    mesh = init_device_mesh("cpu", (2,))
    p = nn.Parameter(DTensor.from_local(torch.ones(3), mesh, [Partial()]))
    return {"seen": tried(lambda: LARS([p], lr=0.1))}


def other_placement_of_gradient() -> Any:
    """A gradient whose mesh is another one with the same ranks is taken; a plain one is refused."""
    mesh = init_device_mesh("cpu", (2,))
    p = nn.Parameter(distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)], src_data_rank=None))
    optimizer = LARS([p], lr=0.1, weight_decay=0.1)
    p.grad = distribute_tensor(torch.ones(4, 3), mesh, [Shard(1)], src_data_rank=None)
    return {"seen": tried(optimizer.step)}


def gradient_on_another_mesh() -> Any:
    """Meshes with the ranks in another order are others, though of the same processes."""
    p = nn.Parameter(distribute_tensor(torch.ones(4, 3), DeviceMesh("cpu", [0, 1]), [Shard(0)], src_data_rank=None))
    optimizer = LARS([p], lr=0.1, weight_decay=0.1)
    p.grad = distribute_tensor(torch.ones(4, 3), DeviceMesh("cpu", [1, 0]), [Shard(0)], src_data_rank=None)
    return {"seen": tried(optimizer.step)}


def outside_of_a_mesh() -> Any:
    """A DTensor that only the first rank holds anything of, beside one on both."""
    both = distribute_tensor(torch.ones(4, 3), DeviceMesh("cpu", [0, 1]), [Shard(0)], src_data_rank=None)
    alone = distribute_tensor(torch.ones(3), DeviceMesh("cpu", [0]), [Shard(0)], src_data_rank=None)
    params = [nn.Parameter(x) for x in (both, alone)]
    optimizer = LARS([("both", params[0]), ("alone", params[1])], **engines.OPTIONS)
    for p in params:
        p.grad = torch.ones_like(p)
    return {"seen": tried(optimizer.step), "norm": optimizer.norms()["both"].parameter}


def spread_twice(rows: int) -> list[Any]:
    """Return two parameters with the same numbers, cut in the same way."""
    torch.manual_seed(0)
    start, mesh = torch.randn(rows, 3), DeviceMesh("cpu", [0, 1])
    return [nn.Parameter(distribute_tensor(start, mesh, [Shard(0)], src_data_rank=None)) for _ in range(2)]


def gradient_that_is_still_added() -> Any:
    """The local tensor of a gradient is what a collective returns before it is done."""
    params = spread_twice(4)
    for p, is_late in zip(params, (False, True), strict=True):
        p.grad = torch.ones_like(p)
        if is_late:
            own = torch.ones(2, 3) / 2
            p.grad._local_tensor = torch.distributed._functional_collectives.all_reduce(own, "sum", p.device_mesh)
        LARS([p], **engines.OPTIONS).step()
    return torch.equal(params[0]._local_tensor, params[1]._local_tensor)


def moved() -> Any:
    """The memory of a piece is replaced between steps."""
    params = spread_twice(5)
    optimizers = [LARS([p], **engines.OPTIONS) for p in params]
    for _ in range(4):
        params[1]._local_tensor.data = params[1]._local_tensor.data.clone()
        for p, optimizer in zip(params, optimizers, strict=True):
            p.grad = torch.ones_like(p)
            optimizer.step()
    return torch.equal(params[0]._local_tensor, params[1]._local_tensor)


def one_rank_begins_anew() -> Any:
    """A rank that has to look at its tensors again, here because its list is another, asks no other rank."""
    params, optimizer = pieces()
    optimizer.step()
    if is_odd():
        optimizer.param_groups[0]["params"] = list(params)
        optimizer._lists = []
    return {"seen": tried(optimizer.step), "next": tried(optimizer.step)}


def compiled_with_partial_gradients() -> Any:
    """A gradient that is still to be added is reduced within the graph."""
    params = spread_twice(4)
    mesh = params[0].device_mesh
    optimizers = [LARS([p], **engines.OPTIONS) for p in params]
    step = torch.compile(lambda: optimizers[1].step(), fullgraph=True, backend="eager")
    for _ in range(2):
        own = torch.full((4, 3), 1.0 + distributed.get_rank())
        for p in params:
            p.grad = DTensor.from_local(own.clone(), mesh, [Partial()])
        optimizers[0].step()
        step()
    return torch.equal(params[0]._local_tensor, params[1]._local_tensor)


def group_of_a_parameter_group() -> Any:
    """`shard_group` of a parameter group stays what it was when a checkpoint is loaded, which does not hold it."""
    params, _ = pieces()
    named = list(zip("ab", params, strict=True))
    groups = [{"params": named, "shard_group": distributed.group.WORLD}]
    optimizer = LARS(groups, **engines.OPTIONS)
    optimizer.step()
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)
    kept = optimizer.param_groups[0]["shard_group"] is distributed.group.WORLD
    return {"saved": "shard_group" in saved["param_groups"][0], "kept": kept, "seen": tried(optimizer.step)}


def refused_after_a_change() -> Any:
    """Tensors of another type on all ranks, and a step that is refused then: no rank sends more than the others."""
    params, optimizer = pieces(nonfinite="raise")
    optimizer.step()
    for p in params:
        p.data = p.data.float()
        p.grad = torch.ones_like(p)
    optimizer.state.clear()
    if is_odd():
        params[0].grad[...] = float("nan")
    seen = tried(optimizer.step)
    params[0].grad = torch.ones_like(params[0])
    return {"seen": seen.split(":")[0], "next": [tried(optimizer.step) for _ in range(2)]}


def versions() -> Any:
    """Autograd must notice that a step has written to the tensor, and to the piece of it that is here."""
    model, optimizer = engines.spread()
    engines.train(model, optimizer, 1)
    p = model[0].weight  # type: ignore[index, union-attr]
    engines.backward(model, optimizer, 1)
    before = p._version, p._local_tensor._version
    optimizer.step()
    return [p._version - before[0] > 0, p._local_tensor._version - before[1] > 0]


def compiled() -> Any:
    """A compiled step with another learning rate each time is compiled once."""
    from torch._dynamo.testing import CompileCounter

    model, optimizer = engines.spread()
    other, plain = engines.spread()
    counter = CompileCounter()

    @torch.compile(fullgraph=True, backend=counter)
    def step() -> None:
        optimizer.step()

    for k in range(4):
        for each in (optimizer, plain):
            for group in each.param_groups:
                group["lr"] = 0.1 / (k + 1)
        engines.backward(model, optimizer, k)
        engines.backward(other, plain, k)
        step()
        plain.step()
    return {"distance": engines.distance(other, model), "frames": counter.frame_count}


CASES: dict[str, Callable[[], Any]] = {
    "nan, raise": lambda: decided(put_nan, nonfinite="raise"),
    "nan, skip": lambda: decided(put_nan, nonfinite="skip"),
    "nan, propagate": lambda: decided(put_nan),
    "learning rate out of range": lambda: decided(put_lr(-1.0), take_back),
    "learning rate differs": lambda: decided(put_lr(0.05), take_back),
    "closure raises": lambda: decided(failing_closure),
    "gradient of another shape": lambda: decided(cut_gradient),
    "found_inf": lambda: decided(set_found_inf, lambda optimizer: optimizer.__dict__.pop("found_inf", None)),
    "scaler": scaler_disagrees,
    "missing gradient": missing_gradient,
    "missing on all": missing_on_all,
    "other layers": other_layers,
    "other order": other_order,
    "first step is refused": first_step_is_refused,
    "group is added": group_is_added,
    "two optimizers": two_optimizers,
    "partial parameter": partial_parameter,
    "gradient cut in another way": other_placement_of_gradient,
    "gradient on another mesh": gradient_on_another_mesh,
    "outside of a mesh": outside_of_a_mesh,
    "gradient that is still added": gradient_that_is_still_added,
    "moved": moved,
    "one rank begins anew": one_rank_begins_anew,
    "compiled with partial gradients": compiled_with_partial_gradients,
    "group of a parameter group": group_of_a_parameter_group,
    "refused after a change": refused_after_a_change,
    "versions": versions,
    "compiled": compiled,
}

if __name__ == "__main__":
    serve(CASES)
