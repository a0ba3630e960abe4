"""Move the optimizer of a Barlow Twins or VICReg script to lars_torch, and compare it with the original's equations.

main.py of facebookresearch/barlowtwins and main_vicreg.py of facebookresearch/vicreg have the same LARS. Replace its
constructor (in VICReg, with model.parameters() and args.wd) by the last line; `adjust_learning_rate` stays as it is:

    optimizer = LARS(parameters, lr=0, weight_decay=args.weight_decay,
                     weight_decay_filter=exclude_bias_and_norm, lars_adaptation_filter=exclude_bias_and_norm)
    optimizer = LARS(param_groups(model, args.weight_decay), lr=0, **preset("barlow"))

python examples/moving_barlow_twins.py
"""

import copy

import torch
from torch import nn

from lars_array import preset, warmup_cosine
from lars_torch import LARS, param_groups

STEPS, BATCH, WEIGHT_DECAY, LAMBDA = 50, 2048, 1e-6, 0.0051
torch.set_default_dtype(torch.float64)


@torch.no_grad()
def original_step(model, buffers, lr_weights, lr_biases):
    """Take a step by the original's equations: weight decay, trust ratio, momentum."""
    for name, p in model.named_parameters():
        d = p.grad if p.ndim == 1 else p.grad + WEIGHT_DECAY * p  # exclude_bias_and_norm
        ratio = 0.001 * p.norm() / d.norm() if p.ndim > 1 and p.norm() > 0 and d.norm() > 0 else 1
        buffers[name] = 0.9 * buffers.get(name, 0) + ratio * d
        p -= (lr_weights if p.ndim > 1 else lr_biases) * buffers[name]


def loss_of(model, views):
    """Return the loss of Barlow Twins for two views of a batch."""
    z = [nn.functional.batch_norm(model(view), None, None, training=True) for view in views]
    errors = (z[0].T @ z[1] / BATCH - torch.eye(16)) ** 2
    return (1 - LAMBDA) * errors.trace() + LAMBDA * errors.sum()


for script, base_lrs in {"Barlow Twins": (0.2, 0.0048), "VICReg": (0.2, 0.2)}.items():  # base rates
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(32, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 16, bias=False))
    original, buffers, losses = copy.deepcopy(ours), {}, []
    optimizer = LARS(param_groups(ours, WEIGHT_DECAY), lr=0, **preset("barlow"))
    factor = warmup_cosine(BATCH / 256, STEPS, warmup_steps=10, end_lr=0.001 * BATCH / 256)  # of adjust_learning_rate
    for step in range(STEPS):
        views = torch.randn(BATCH, 32) + 0.3 * torch.randn(2, BATCH, 32)
        for model in (ours, original):
            model.zero_grad()
            losses.append(loss_of(model, views))
            losses[-1].backward()
        lrs = [factor(step) * lr for lr in base_lrs]
        optimizer.param_groups[0]["lr"], optimizer.param_groups[1]["lr"] = lrs
        optimizer.step()
        original_step(original, buffers, *lrs)
    apart = max(((p - q).norm() / q.norm()).item() for p, q in zip(ours.parameters(), original.parameters()))
    print(f"{script}: loss {losses[0]:.2f}, later {losses[-1]:.2f}; parameters differ by {apart:.0e} of their norms")
