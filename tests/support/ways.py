"""Several steps of one parameter, by every kernel and every function; each returns the parameter after each step."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import cuda_on_cpu
import numpy as np
import pytest

from lars_array import LARS, RULES, init, lars_step, update
from lars_array.kernels import NUMPY_KERNELS

__all__ = ["FEW", "NAMES", "WAYS"]

NAMES = sorted({rule: name for name, rule in reversed(RULES.items())}.values())  # each rule once


def in_place(kernel: str) -> Callable[..., Any]:
    def steps(p: Any, grads: list[Any], v: Any = None, **options: Any) -> list[Any]:
        p = p.copy()
        optimizer = LARS({"w": p}, kernel=kernel, nonfinite="propagate", **options)
        if v is not None:
            optimizer.attach_state({"w": {"momentum_buffer": v.copy(), "previous_lr": options["lr"]}})
        return [p.copy() for g in grads if optimizer.step({"w": g}) or True]

    return steps


def on_cuda(p: Any, grads: list[Any], v: Any = None, **options: Any) -> list[Any]:
    if reason := cuda_on_cpu.missing():
        pytest.skip(reason)
    with cuda_on_cpu.pretended():
        p = cuda_on_cpu.far(p)
        optimizer = LARS({"w": p}, nonfinite="propagate", **options)
        if v is not None:
            optimizer.attach_state({"w": {"momentum_buffer": cuda_on_cpu.far(v), "previous_lr": options["lr"]}})
        return [np.array(p) for g in grads if optimizer.step({"w": cuda_on_cpu.far(g)}) or True]


def by_update(p: Any, grads: list[Any], v: Any = None, **options: Any) -> list[Any]:
    params: Any = {"w": p}
    state, found = init(params), []
    if v is not None:
        state = state._replace(
            momentum_buffers={"w": v}, first=np.array([False]), previous_lr=np.array([options["lr"]])
        )
    for g in grads:
        params, state = update(params, {"w": g}, state, nonfinite="propagate", **options)
        found.append(params["w"])
    return found


def by_lars_step(p: Any, grads: list[Any], v: Any = None, **options: Any) -> list[Any]:
    before, found = None, []
    for g in grads:
        p, v = lars_step(p, g, v, previous_lr=before, **options)
        before = options["lr"]
        found.append(p)
    return found


def by_jax(p: Any, grads: list[Any], *, jits: bool, wide: bool = True, **options: Any) -> list[Any]:
    jax, lars_jax = pytest.importorskip("jax"), pytest.importorskip("lars_jax")
    with jax.enable_x64(wide):
        lr = options.pop("lr")
        solver = lars_jax.lars(lr, **options)
        step = jax.jit(solver.update) if jits else solver.update
        params = jax.numpy.asarray(p)
        state, found = solver.init(params), []
        for g in grads:
            updates, state = step(jax.numpy.asarray(g), state, params)
            params = params + updates
            found.append(np.array(params))
    return found


WAYS: dict[str, Callable[..., Any]] = {
    **{kernel: in_place(kernel) for kernel in NUMPY_KERNELS},
    "cuda": on_cuda,
    "update": by_update,
    "lars_step": by_lars_step,
    "jax": functools.partial(by_jax, jits=False),
    "jax, jitted": functools.partial(by_jax, jits=True),
}
FEW = {"jax", "jax, jitted"}  # which are slow
