"""timm's LARS: one tensor at a time, which is its default on a CPU, with foreach, and compiled."""

from __future__ import annotations

import shutil
import sys
from importlib.util import find_spec, module_from_spec
from typing import Any

from benchmarks.contestant import DECAY, ETA, LR, MOMENTUM, Run, UnavailableError
from benchmarks.peers.torch_run import torch_run

__all__ = ["build", "build_compiled", "build_foreach", "lars_class"]

OPTIONS: dict[str, Any] = {"lr": LR, "momentum": MOMENTUM, "weight_decay": DECAY, "trust_coeff": ETA}


def build(params: list[Any], grads: list[Any]) -> Run:
    """``timm.optim.Lars`` as it is."""
    lars = lars_class()
    return torch_run(params, grads, lambda tensors: lars(tensors, **OPTIONS))


def build_foreach(params: list[Any], grads: list[Any]) -> Run:
    """The same with ``foreach=True``, the default on CUDA."""
    lars = lars_class()
    return torch_run(params, grads, lambda tensors: lars(tensors, **OPTIONS, foreach=True))


def build_compiled(params: list[Any], grads: list[Any]) -> Run:
    """``torch.compile(optimizer.step)``."""
    lars = lars_class()
    if shutil.which("g++") is None:
        raise UnavailableError("torch.compile needs g++")
    return torch_run(params, grads, lambda tensors: lars(tensors, **OPTIONS), compiled=True)


def lars_class() -> Any:
    """Import timm's LARS without the rest of timm, which wants a torchvision that fits torch, and more."""
    for name in ("timm", "timm.optim"):
        if name not in sys.modules:
            spec = find_spec(name)
            if spec is None:
                raise ModuleNotFoundError(f"No module named {name!r}")
            sys.modules[name] = module_from_spec(spec)  # a package that knows where its files are, not run
    from timm.optim.lars import Lars

    return Lars
