"""Train a network on handwritten digits with LARS, on one process or on several.

python examples/digits_torch.py
torchrun --nproc-per-node 2 examples/digits_torch.py ddp
torchrun --nproc-per-node 2 examples/digits_torch.py fsdp
torchrun --nproc-per-node 4 examples/digits_torch.py hsdp
"""

import sys

import torch
from sklearn.datasets import load_digits
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from lars_torch import LARS, param_groups

EPOCHS, BATCH = 30, 256  # the batch of all processes together
kind = sys.argv[1] if len(sys.argv) > 1 else "one"
if kind != "one":
    distributed.init_process_group("gloo")
rank, size = (distributed.get_rank(), distributed.get_world_size()) if kind != "one" else (0, 1)

x, y = (torch.tensor(part) for part in load_digits(return_X_y=True))
x = x.float() / 16
train, test = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).split([1280, len(x) - 1280])

torch.manual_seed(0)  # the same network on all processes
model: nn.Module = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
if kind == "ddp":
    model = DistributedDataParallel(model)
elif kind in ("fsdp", "hsdp"):
    shape, names = ((size,), ("shard",)) if kind == "fsdp" else ((2, size // 2), ("replicate", "shard"))
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    for layer in list(model):
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)

optimizer = LARS(param_groups(model, weight_decay=1e-4), lr=1.0, momentum=0.9, trust_coefficient=0.02)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=EPOCHS * len(train) // BATCH)
for epoch in range(EPOCHS):
    order = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(epoch))]
    for batch in order.split(BATCH):
        own = batch[rank::size]  # of each batch this process takes its part
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[own]), y[own]).backward()
        optimizer.step()
        schedule.step()

with torch.no_grad():
    accuracy = (model(x[test]).argmax(1) == y[test]).double().mean().item()
if rank == 0:
    print(f"{kind} on {size}: accuracy {accuracy:.4f}")
if kind != "one":
    distributed.barrier()
    distributed.destroy_process_group()
