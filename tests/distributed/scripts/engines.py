"""What the engines of torch make of a small network, trained beside the same one that is whole: for scripts on ranks.

Layers are cut evenly, unevenly, and so that some ranks hold nothing of them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lars_torch import LARS

OPTIONS: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
SAVED: dict[str, Any] = {"rule": "nvidia"}  # the options of a checkpoint: this rule keeps the last learning rate too
SAVED_AT = 5  # steps
UNADAPTED = {"weight_decay": 0.0, "adapt": False}
PLAN = {"0": ColwiseParallel(), "2": RowwiseParallel()}
LINEAR = (0, 2, 4)  # the modules with parameters


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(7, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """Return two parameter groups: biases are neither decayed nor adapted."""
    named = list(model.named_parameters())
    weights, biases = ([p for name, p in named if name.endswith(end)] for end in ("weight", "bias"))
    return [{"params": weights}, {"params": biases, **UNADAPTED}]


def whole(tensor: Any) -> torch.Tensor:
    found: torch.Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return found.detach()


def backward(model: nn.Module, optimizer: Any, k: int) -> None:
    """Compute the gradients of step k, from the same numbers on all ranks."""
    generator = torch.Generator().manual_seed(k)
    x, y = (torch.randn(8, width, generator=generator, dtype=torch.float64) for width in (7, 3))
    optimizer.zero_grad()
    (model(x) - y).square().mean().backward()


def train(model: nn.Module, optimizer: Any, steps: int = 20, start: int = 0) -> list[int]:
    """Train, and return how many collectives each step needed."""
    counts = []
    for k in range(start, start + steps):
        backward(model, optimizer, k)
        with CommDebugMode() as mode:
            optimizer.step()
        counts.append(mode.get_total_counts())
    return counts


def distance(model: nn.Module, other: nn.Module) -> float:
    """Return the largest difference of two networks, relative to the largest entry of a parameter."""
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return max(float((whole(p) - whole(q)).abs().max() / whole(p).abs().max()) for p, q in pairs)


def checkpoint_of(processes: int) -> Path:
    """Return where the checkpoint of a number of processes lies."""
    return Path(sys.argv[3]).parent / f"checkpoint-{processes}"


# ----------------------------------------------------------------------------------------------------------- engines


def fsdp(model: nn.Module) -> nn.Module:
    return sharded(model)


def sharded(model: nn.Module, mesh: Any = None) -> nn.Module:
    for i in LINEAR:
        fully_shard(model[i], mesh=mesh)  # type: ignore[index]
    fully_shard(model, mesh=mesh)
    return model


def halves() -> tuple[int, int]:
    return 2, distributed.get_world_size() // 2


def hsdp(model: nn.Module) -> nn.Module:
    return sharded(model, init_device_mesh("cpu", halves(), mesh_dim_names=("replicate", "shard")))


def tensor_parallel(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),), mesh_dim_names=("tp",))
    return parallelize_module(model, mesh, PLAN)


def fsdp_and_tensor_parallel(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", halves(), mesh_dim_names=("dp", "tp"))
    return sharded(parallelize_module(model, mesh["tp"], PLAN), mesh["dp"])


ENGINES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "fsdp": fsdp,
    "tensor parallel": tensor_parallel,
    "hsdp": hsdp,
    "fsdp and tensor parallel": fsdp_and_tensor_parallel,
}


def trained(steps: int = 20, **options: Any) -> tuple[nn.Module, LARS]:
    """Return the whole network and its optimizer after some steps."""
    model = network()
    optimizer = LARS(groups_of(model), **OPTIONS | options)
    train(model, optimizer, steps)
    return model, optimizer


def spread(engine: str = "fsdp", **options: Any) -> tuple[nn.Module, LARS]:
    """Return a network that an engine has spread over the ranks, and its optimizer."""
    model = ENGINES[engine](network())
    return model, LARS(groups_of(model), **OPTIONS | options)
