"""Run by test_engines on 2 and on 4 ranks: the network spread by each engine, beside the whole one."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import engines
import torch
import torch_optimizer
from ranks import serve
from torch import distributed, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor

from benchmarks.peers.timm_lars import lars_class as timm_lars
from lars_torch import LARS

CPU = torch.device("cpu")
RULES: dict[str, dict[str, Any]] = {
    "flash": {},
    "optax": {"rule": "optax"},
    "nvidia": {"rule": "nvidia", "nesterov": True},
    "clipped": {"max_grad_norm": 0.3},
    "clipped, third sum": {"rule": "optax", "max_grad_norm": 0.3, "nonfinite": "raise"},
}


@cache
def whole(rule: str) -> nn.Module:
    """Return the whole network, trained by a rule."""
    model, _ = engines.trained(**RULES[rule])
    return model


def beside(engine: str, rule: str) -> dict[str, Any]:
    model, options = whole(rule), RULES[rule]
    ours, optimizer = engines.spread(engine, **options)
    counts = engines.train(ours, optimizer)
    replicas = [p._local_tensor.double().sum().item() for p in ours.parameters() if hasattr(p, "_local_tensor")]
    return {
        "distance": engines.distance(model, ours),
        "first": counts[0],
        "later": sorted(set(counts[1:])),
        "norms": {name: list(norms) for name, norms in optimizer.norms().items()},
        "ratios": optimizer.trust_ratios(),
        "replicas": replicas,
    }


def fully_sharded_1() -> dict[str, Any]:
    """Plain pieces of FSDP1, some of them empty and without a gradient."""
    model, _ = engines.trained()
    wrapped = FullyShardedDataParallel(
        engines.network(),
        use_orig_params=True,
        auto_wrap_policy=ModuleWrapPolicy({nn.Linear}),
        device_id=CPU,
    )
    optimizer = LARS(engines.groups_of(wrapped), **engines.OPTIONS, shard_group=distributed.group.WORLD)
    counts = engines.train(wrapped, optimizer)
    empty = sum(p.grad is None for p in wrapped.parameters())
    with FullyShardedDataParallel.summon_full_params(wrapped):
        return {"distance": engines.distance(model, wrapped), "later": sorted(set(counts[1:])), "without": empty}


def zero_redundancy(options: dict[str, Any]) -> float:
    """ZeroRedundancyOptimizer gives whole parameters to ranks: a global norm needs `norm_group`."""
    model = engines.network()
    engines.train(model, LARS(model.parameters(), **engines.OPTIONS, max_grad_norm=0.3))
    ours = engines.network()
    arguments = engines.OPTIONS | {"max_grad_norm": 0.3} | options
    engines.train(ours, ZeroRedundancyOptimizer(ours.parameters(), LARS, **arguments))
    return engines.distance(model, ours)


def pipeline() -> dict[str, Any]:
    """Two stages with different layers, each sharded over its ranks, clipped by the norm of both."""
    rank, (stages, width) = distributed.get_rank(), engines.halves()
    mesh = init_device_mesh("cpu", (stages, width), mesh_dim_names=("pp", "dp"))
    model = engines.network()
    optimizer = LARS(model.parameters(), **engines.OPTIONS, max_grad_norm=0.3)
    ours = engines.network()
    stage = nn.Sequential(*(list(ours)[:2] if rank < width else list(ours)[2:]))
    for module in stage:
        if isinstance(module, nn.Linear):
            engines.fully_shard(module, mesh=mesh["dp"])
    mine = LARS(stage.parameters(), **engines.OPTIONS, max_grad_norm=0.3, norm_group=mesh["pp"])
    twins = [p for i in ((0,) if rank < width else (2, 4)) for p in model[i].parameters()]  # type: ignore[union-attr]
    counts = []
    for k in range(20):
        engines.backward(model, optimizer, k)
        for p, twin in zip(stage.parameters(), twins, strict=True):
            p.grad = distribute_tensor(twin.grad.clone(), p.device_mesh, p.placements, src_data_rank=None)
        with engines.CommDebugMode() as mode:
            mine.step()
        optimizer.step()
        counts.append(mode.get_total_counts())
    pairs = zip(stage.parameters(), twins, strict=True)
    return {
        "distance": max(float((engines.whole(p) - q).abs().max()) for p, q in pairs),
        "later": sorted(set(counts[1:])),
    }


def pipeline_with_a_nan() -> list[int]:
    """A NaN on one rank of the first stage skips the step of both stages."""
    rank, (stages, width) = distributed.get_rank(), engines.halves()
    mesh = init_device_mesh("cpu", (stages, width), mesh_dim_names=("pp", "dp"))
    stage = nn.Linear(4, 3 if rank < width else 5)
    engines.fully_shard(stage, mesh=mesh["dp"])
    optimizer = LARS(stage.parameters(), **engines.OPTIONS, nonfinite="skip", norm_group=mesh["pp"])
    counts = []
    for is_spoiled in (False, True, False):
        for p in stage.parameters():
            p.grad = torch.ones_like(p)
            if is_spoiled and rank == 0:
                p.grad._local_tensor[...] = float("nan")
        optimizer.step()
        counts.append(optimizer.skipped_steps)
    return counts


def stepped(
    make: Callable[[torch.Tensor], torch.Tensor], grad: Callable[[Any, torch.Tensor], Any], **options: Any
) -> Any:
    """Return the distance of one DTensor from a plain tensor after some steps with the same gradients."""
    torch.manual_seed(0)
    start = torch.randn(6, 5, 3, dtype=torch.float64)
    plain, ours = nn.Parameter(start.clone()), nn.Parameter(make(start.clone()))
    both = [LARS([p], **engines.OPTIONS | options) for p in (plain, ours)]
    for _ in range(5):
        plain.grad = torch.randn_like(start)
        ours.grad = grad(ours, plain.grad.clone())
        for optimizer in both:
            optimizer.step()
    norms = [list(optimizer.norms()) for optimizer in both]
    return {"distance": float((engines.whole(ours) - plain).abs().max()), "alike": norms[0][:1] == norms[1][:1]}


def as_parameter(p: Any, g: torch.Tensor) -> Any:
    return distribute_tensor(g, p.device_mesh, p.placements, src_data_rank=None)


def cut(*placements: Any, shape: tuple[int, ...] | None = None) -> Callable[[torch.Tensor], Any]:
    return lambda x: distribute_tensor(x, mesh_of(shape), placements, src_data_rank=None)


def mesh_of(shape: tuple[int, ...] | None) -> Any:
    return init_device_mesh("cpu", shape or (distributed.get_world_size(),))


def partial_gradient(p: Any, g: torch.Tensor) -> Any:
    """Return a gradient of which each rank holds one part of a sum."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(g / distributed.get_world_size(), p.device_mesh, [Partial()])


def replicated_gradient(p: Any, g: torch.Tensor) -> Any:
    return distribute_tensor(g, p.device_mesh, [Replicate()], src_data_rank=None)


def two_meshes() -> Any:
    """Parameters on meshes that have nothing to do with each other, and one that is plain."""
    torch.manual_seed(0)
    starts = [torch.randn(5, 4, dtype=torch.float64) for _ in range(3)]
    plain = [nn.Parameter(x.clone()) for x in starts]
    make = [cut(Shard(0)), cut(Shard(1)), torch.clone]
    ours = [nn.Parameter(f(x.clone())) for f, x in zip(make, starts, strict=True)]
    both = [LARS(params, **engines.OPTIONS, max_grad_norm=0.5) for params in (plain, ours)]
    counts = []
    for _ in range(5):
        for p, q in zip(plain, ours, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = as_parameter(q, p.grad.clone()) if hasattr(q, "placements") else p.grad.clone()
        both[0].step()
        with engines.CommDebugMode() as mode:
            both[1].step()
        counts.append(mode.get_total_counts())
    found = max(float((engines.whole(q) - p).abs().max()) for p, q in zip(plain, ours, strict=True))
    return {"distance": found, "later": sorted(set(counts[1:]))}


def collectives_of(make: Callable[[Any], Any]) -> int:
    """Return how many collectives a step of another LARS needs."""
    model, _ = engines.spread()
    return engines.train(model, make(model.parameters()), 2)[1]


def other_copies() -> str:
    """A DTensor on one axis of a plane, whose numbers differ along the other one."""
    mesh = init_device_mesh("cpu", engines.halves(), mesh_dim_names=("dp", "tp"))
    generator = torch.Generator().manual_seed(mesh.get_local_rank("tp"))
    whole, other = torch.ones(4, 3), torch.randn(4, 3, generator=generator)
    params = [
        nn.Parameter(distribute_tensor(x, part, [Shard(0)] * part.ndim, src_data_rank=None))
        for x, part in ((whole, mesh), (other, mesh["dp"]))
    ]
    optimizer = LARS(params, **engines.OPTIONS)
    for p in params:
        p.grad = torch.ones_like(p)
    before = params[1]._local_tensor.clone()
    try:
        optimizer.step()
    except ValueError as error:
        return f"{error}, {torch.equal(before, params[1]._local_tensor)}"
    return "stepped"


def save() -> str:
    """Save a checkpoint that on_checkpoints loads, on as many ranks and on others."""
    model, optimizer = engines.spread(**engines.SAVED)
    engines.train(model, optimizer, engines.SAVED_AT)
    parts = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    checkpoint.save(parts, checkpoint_id=engines.checkpoint_of(distributed.get_world_size()))
    return "saved"


def marks() -> dict[str, str]:
    """Return what is said of plain tensors that other engines have marked, and of one flat tensor for all."""

    def refused(p: Any) -> str:
        try:
            LARS([p], lr=0.1)
        except TypeError as error:
            return str(error)
        return "taken"

    def marked(name: str, value: Any) -> str:
        p = nn.Parameter(torch.ones(3))
        setattr(p, name, value)
        return refused(p)

    wrapped = {
        kind: next(FullyShardedDataParallel(engines.network(), use_orig_params=kind, device_id=CPU).parameters())
        for kind in (True, False)
    }
    params = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    replaced = LARS(params, lr=0.1)
    replaced.param_groups[0]["params"] = [nn.Parameter(torch.ones(3))]
    replaced.param_groups[0]["params"][0].grad = torch.ones(3)
    try:
        replaced.step()
        message = "taken"
    except TypeError as error:
        message = str(error)
    return {
        "fsdp": refused(wrapped[True]),
        "flat": refused(wrapped[False]),
        "fairscale": marked("_is_sharded", True),
        "deepspeed 3": marked("ds_id", 0),
        "deepspeed": message,
        "megatron": marked("tensor_model_parallel", True),
    }


CASES: dict[str, Callable[[], Any]] = {
    **{f"{engine}: {rule}": partial(beside, engine, rule) for engine in engines.ENGINES for rule in RULES},
    "fsdp 1": fully_sharded_1,
    "zero redundancy": partial(zero_redundancy, {}),
    "zero redundancy, norm group": lambda: zero_redundancy({"norm_group": distributed.group.WORLD}),
    "pipeline": pipeline,
    "pipeline with a nan": pipeline_with_a_nan,
    "middle axis": lambda: stepped(cut(Shard(1)), as_parameter),
    "last axis": lambda: stepped(cut(Shard(2)), as_parameter),
    "stacked, cut along its layers": lambda: stepped(cut(Shard(0)), as_parameter, layer_axes=1),
    "stacked, cut within its layers": lambda: stepped(cut(Shard(1)), as_parameter, layer_axes=1),
    "stacked, on a plane": lambda: stepped(
        cut(Replicate(), Shard(0), shape=engines.halves()), as_parameter, layer_axes=1
    ),
    "partial gradient": lambda: stepped(cut(Shard(0)), partial_gradient),
    "replicated gradient": lambda: stepped(cut(Shard(0)), replicated_gradient),
    "replicated parameter": lambda: stepped(cut(Replicate()), as_parameter),
    "two meshes": two_meshes,
    "marks": marks,
    "other copies": other_copies,
    "save": save,
    "collectives of torch_optimizer": lambda: collectives_of(
        lambda params: torch_optimizer.LARS(params, lr=0.1, momentum=0.9, weight_decay=0.01)
    ),
    "collectives of timm": lambda: collectives_of(
        lambda params: timm_lars()(params, lr=0.1, momentum=0.9, weight_decay=0.01)
    ),
}

if __name__ == "__main__":
    serve(CASES)
