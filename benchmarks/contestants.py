"""Who takes part."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks.contestant import FLOOR, LIMIT, Contestant, Run
from benchmarks.peers import (
    flash_lars,
    flat_pass,
    kozistr_lars,
    optax_lars,
    our_jax,
    our_lars,
    our_torch,
    our_update,
    timm_lars,
    torch_sgd,
)

__all__ = ["CPU", "LIMIT_NAME", "REFERENCE"]

REFERENCE = "torch_optimizer"
LIMIT_NAME = "flat pass"

# JAX took 18 s to compile 1,000 arrays and more than 280 s for 4,000; torch 90 s for 161.
TRACED = 1000


def _jitted(name: str, build: Callable[..., Run], rule: str = "flash", **options: Any) -> list[Contestant]:
    """Return a function under ``jax.jit``, as it is and donating what it replaces: either may be the faster one."""
    ways = {f"{name}, jax.jit": False, f"{name}, jax.jit, donated": True}
    return [
        Contestant(label, partial(build, donate=donate), rule, most_arrays=TRACED, **options)
        for label, donate in ways.items()
    ]


CPU = [
    Contestant("lars_array compiled, nonfinite=propagate", our_lars.compiled_unchecked, in_place=True),
    Contestant("lars_array compiled", our_lars.compiled, in_place=True),
    Contestant("lars_array blocked", our_lars.blocked, in_place=True),
    Contestant("lars_torch", our_torch.build),
    Contestant("lars_torch, new gradients", our_torch.build_with_new_gradients, copies=5),
    Contestant("lars_torch, torch.compile", our_torch.build_compiled, most_arrays=TRACED),
    *_jitted("lars_array.update", our_update.build),
    *_jitted("lars_jax.lars", our_jax.build),
    Contestant("lars_jax.LARS, donate=True", our_jax.build_eager, in_place=True),
    Contestant("lars_jax.LARS", our_jax.build_eager_copying),
    Contestant(REFERENCE, flash_lars.torch_optimizer, distribution="torch_optimizer", float32_norms=True),
    Contestant("lightning-flash", flash_lars.lightning_flash, distribution="lightning-flash", float32_norms=True),
    Contestant("timm", timm_lars.build, "timm", distribution="timm", float32_norms=True),
    Contestant("timm, foreach", timm_lars.build_foreach, "timm", distribution="timm", float32_norms=True),
    Contestant("timm, torch.compile", timm_lars.build_compiled, "timm", distribution="timm", most_arrays=TRACED),
    Contestant(
        "pytorch_optimizer",
        kozistr_lars.build,
        "kozistr",
        distribution="pytorch_optimizer",
        copies=4,
        float32_norms=True,
    ),
    *_jitted("optax", optax_lars.build, "optax", distribution="optax"),
    Contestant("torch SGD, fused", torch_sgd.build_fused, "sgd", FLOOR, distribution="torch"),
    Contestant("torch SGD, foreach", torch_sgd.build_foreach, "sgd", FLOOR, distribution="torch"),
    Contestant(LIMIT_NAME, flat_pass.build, "sgd", LIMIT, in_place=True),
]
