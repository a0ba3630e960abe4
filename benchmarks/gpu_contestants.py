"""Who takes part on a GPU. Everyone is given NumPy arrays and makes copies on the device."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np

from benchmarks.contestant import DECAY, ETA, FLOOR, LR, MOMENTUM, OPTIONS, Contestant, Run, UnavailableError
from benchmarks.peers import timm_lars

__all__ = ["GPU", "OWN_STREAM", "REFERENCE"]

REFERENCE = "torch_optimizer"
UNCHECKED = {"nonfinite": "propagate"}


def cupy_lars(params: list[Any], grads: list[Any], **options: Any) -> Run:
    """`lars_array.LARS` over CuPy arrays."""
    import cupy

    from lars_array import LARS

    own, slopes = ([cupy.array(x) for x in arrays] for arrays in (params, grads))
    optimizer = LARS(own, **OPTIONS, **options)
    return Run(lambda: optimizer.step(slopes), lambda: [cupy.asnumpy(p) for p in own])


def cupy_graph(params: list[Any], grads: list[Any]) -> Run:
    """The same, captured once and replayed."""
    import cupy

    from lars_array import LARS

    own, slopes = ([cupy.array(x) for x in arrays] for arrays in (params, grads))
    optimizer = LARS(own, **OPTIONS, **UNCHECKED)
    graphs: list[Any] = []

    def step() -> None:
        if graphs and graphs[0] is None:
            stream = cupy.cuda.Stream(non_blocking=True)
            cupy.cuda.Device().synchronize()
            with stream:
                stream.begin_capture()
                optimizer.step(slopes)
                graphs[0] = stream.end_capture()
        if graphs:
            graphs[0].launch(cupy.cuda.Stream.null)
        else:
            optimizer.step(slopes)
            graphs.append(None)

    return Run(step, lambda: [cupy.asnumpy(p) for p in own])


def one_launch(params: list[Any], grads: list[Any], *, build: Callable[..., Run]) -> Run:
    """The same in one launch a step, which is asked for while the optimizer makes its tables."""
    run, first = build(params, grads), iter(range(2))

    def step() -> None:
        if next(first, None) is None:
            run.step()
        else:
            with patch.dict(os.environ, LARS_ARRAY_CUDA="one-launch"):
                run.step()

    return Run(step, run.parameters)


def torch_run(
    params: list[Any],
    grads: list[Any],
    make: Callable[[list[Any]], Any],
    *,
    compiled: bool = False,
    device: str = "cuda",
) -> Run:
    """Return the run of an optimizer of torch."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise UnavailableError(f"torch {torch.__version__} has no CUDA")
    tensors = [torch.nn.Parameter(torch.as_tensor(np.array(p), device=device)) for p in params]
    for tensor, g in zip(tensors, grads):
        tensor.grad = torch.as_tensor(np.array(g), device=device)
    optimizer = make(tensors)
    step = torch.compile(optimizer.step) if compiled else optimizer.step
    return Run(step, lambda: [tensor.detach().cpu().numpy() for tensor in tensors])


def torch_adapter(params: list[Any], grads: list[Any]) -> Run:
    """`lars_torch.LARS`, which lets what is not finite through, as torch's optimizers do."""
    from lars_torch import LARS

    return torch_run(params, grads, lambda tensors: LARS(tensors, **OPTIONS))


def torch_optimizer(params: list[Any], grads: list[Any]) -> Run:
    """``torch_optimizer.LARS``, flash's arithmetic."""
    from torch_optimizer import LARS

    return torch_run(params, grads, lambda tensors: LARS(tensors, **OPTIONS))


def timm(params: list[Any], grads: list[Any], *, compiled: bool = False, foreach: bool = True) -> Run:
    """``timm.optim.Lars``."""
    lars = timm_lars.lars_class()
    if compiled and shutil.which("g++") is None and shutil.which("gcc") is None:
        raise UnavailableError("torch.compile needs a C compiler")
    options = timm_lars.OPTIONS | ({"foreach": True} if foreach else {})
    return torch_run(params, grads, lambda tensors: lars(tensors, **options), compiled=compiled)


def torch_sgd(params: list[Any], grads: list[Any]) -> Run:
    """torch's fused SGD: no norms."""
    from torch.optim import SGD

    return torch_run(
        params, grads, lambda tensors: SGD(tensors, lr=LR, momentum=MOMENTUM, weight_decay=DECAY, fused=True)
    )


def _to_jax(*lists: list[Any]) -> list[Any]:
    import jax

    # Else it takes most of the memory that there is when it first looks at the device.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    try:
        device = jax.devices("gpu")[0]
    except RuntimeError as error:
        raise UnavailableError(f"JAX has no GPU: {error}") from error
    return [jax.device_put(list(arrays), device) for arrays in lists]


def jax_adapter(params: list[Any], grads: list[Any], *, donate: bool) -> Run:
    """`lars_jax.LARS`, which lets what is not finite through, as optax does."""
    import jax

    from lars_jax import LARS

    own, slopes = _to_jax(params, grads)
    optimizer = LARS(own, **OPTIONS, **UNCHECKED, donate=donate)

    def step() -> None:
        jax.block_until_ready(optimizer.step(slopes))

    return Run(step, lambda: [np.asarray(p) for p in optimizer.params])


def jax_transformation(params: list[Any], grads: list[Any]) -> Run:
    """`lars_jax.lars` and ``optax.apply_updates`` in one compiled function, which may write into what it is given."""
    from lars_jax import lars

    options = {key: x for key, x in OPTIONS.items() if key != "lr"}
    return _compiled(lars(OPTIONS["lr"], **options), params, grads)


def optax_lars(params: list[Any], grads: list[Any]) -> Run:
    """``optax.lars`` and ``optax.apply_updates`` in one compiled function, which may write into what it is given."""
    import optax

    optimizer = optax.lars(LR, weight_decay=DECAY, trust_coefficient=ETA, momentum=MOMENTUM)
    return _compiled(optimizer, params, grads)


def _compiled(optimizer: Any, params: list[Any], grads: list[Any]) -> Run:
    import jax
    import optax

    own, slopes = _to_jax(params, grads)

    def update(params: Any, state: Any, grads: Any) -> Any:
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    compiled = jax.jit(update, donate_argnums=(0, 1))
    held = (own, optimizer.init(own))

    def step() -> None:
        nonlocal held
        held = jax.block_until_ready(compiled(*held, slopes))

    return Run(step, lambda: [np.asarray(p) for p in held[0]])


# Of these only the host's time is known: events on CuPy's stream don't see theirs.
OWN_STREAM = {"optax, jax.jit", "lars_jax.lars, jax.jit", "lars_jax.LARS", "lars_jax.LARS, donate=True"}

GPU = [
    Contestant("lars_array, CuPy, captured in a graph", cupy_graph),
    Contestant("lars_array, CuPy, nonfinite=propagate", partial(cupy_lars, **UNCHECKED)),
    Contestant("lars_array, CuPy, one launch", partial(one_launch, build=partial(cupy_lars, **UNCHECKED))),
    Contestant("lars_array, CuPy, one launch, captured in a graph", partial(one_launch, build=cupy_graph)),
    Contestant("lars_array, CuPy", cupy_lars),
    Contestant("lars_torch", torch_adapter),
    Contestant("lars_torch, one launch", partial(one_launch, build=torch_adapter)),
    Contestant("lars_jax.lars, jax.jit", jax_transformation, copies=6, most_arrays=1000, float32_norms=True),
    Contestant("lars_jax.LARS, donate=True", partial(jax_adapter, donate=True)),
    Contestant("lars_jax.LARS", partial(jax_adapter, donate=False), copies=4),
    Contestant(REFERENCE, torch_optimizer, distribution="torch_optimizer", float32_norms=True),
    Contestant("timm, foreach", timm, "timm", distribution="timm", copies=6, float32_norms=True),
    Contestant(
        "timm, torch.compile",
        partial(timm, compiled=True, foreach=False),
        "timm",
        distribution="timm",
        copies=6,
        float32_norms=True,
        most_arrays=200,  # compiling more takes minutes
    ),
    Contestant("optax, jax.jit", optax_lars, "optax", distribution="optax", copies=6, most_arrays=1000),
    Contestant("torch SGD, fused", torch_sgd, "sgd", FLOOR, distribution="torch"),
]
