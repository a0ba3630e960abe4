"""Run by test_losses_torch on 3 ranks: one of them is killed before a step, or comes after the others gave up."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from ranks import serve
from torch import distributed, nn

from lars_torch import LARS

PATIENCE = 3  # seconds that the others wait


def lost(*, killed: bool) -> Any:
    piece = nn.Parameter(torch.ones(4))
    optimizer = LARS([piece], lr=0.1, momentum=0.9, weight_decay=0.1, shard_group=distributed.group.WORLD)
    for _ in range(2):
        piece.grad = torch.ones_like(piece)
        optimizer.step()
    before = piece.detach().clone(), optimizer.state[piece]["momentum_buffer"].clone()
    if distributed.get_rank() == 1:
        if killed:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(PATIENCE + 2)
    start = time.monotonic()
    try:
        optimizer.step()
        seen = "stepped"
    except Exception as error:
        seen = type(error).__name__
    after = piece.detach(), optimizer.state[piece]["momentum_buffer"]
    return {
        "seen": seen,
        "seconds": time.monotonic() - start,
        "unchanged": all(map(torch.equal, before, after)),
    }


if __name__ == "__main__":
    is_killed = Path(sys.argv[3]).name.startswith("killed")
    serve({"lost": lambda: lost(killed=is_killed)}, PATIENCE, ends=False)
