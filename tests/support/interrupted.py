"""Optimizers whose steps are interrupted, or that run out of memory: all of a step is done and counted, or nothing."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import array_api_strict
import cuda_on_cpu
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import torch

import lars_array
import lars_jax
import lars_torch

__all__ = ["SUBJECTS", "Subject", "assert_whole", "history"]

SHAPES = ((40, 5), (7,), (3, 4, 5))
LARGE = ((700, 1000), (7,), (8, 300, 300))  # for several threads
OPTIONS: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "trust_coefficient": 0.02}
STEPS = 4


class Subject(NamedTuple):
    """How to make an optimizer, to step it with gradients that are NumPy arrays or None, and all that it holds."""

    make: Callable[[], Any]
    step: Callable[[Any, list[Any]], Any]
    seen: Callable[[Any], Any]
    context: Callable[[], Any] = contextlib.nullcontext
    kinds: tuple[str, ...] = ("float32",)  # of the gradients of each step in turn
    absent: bool = False  # whether a gradient is absent in every other step
    shapes: tuple[tuple[int, ...], ...] = SHAPES


def arrays(seed: int, kind: str = "float32", shapes: tuple[tuple[int, ...], ...] = SHAPES) -> list[Any]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(kind) for shape in shapes]


def gradients(subject: Subject, number: int) -> list[Any]:
    found: list[Any] = arrays(number + 1, subject.kinds[number % len(subject.kinds)], subject.shapes)
    if subject.absent and number % 2:
        found[1] = None
    return found


def _bytes(x: Any) -> Any:
    if isinstance(x, torch.Tensor):
        x = x.detach().view(torch.int16) if x.dtype == torch.bfloat16 else x.detach()
    return None if x is None else np.array(x).tobytes()


def _numpy(
    put: Callable[[Any], Any] = np.array, kind: Any = np.float32, shapes: Any = SHAPES, **options: Any
) -> Subject:
    def make() -> Any:
        return lars_array.LARS([put(x.astype(kind)) for x in arrays(0, shapes=shapes)], **OPTIONS | options)

    def step(optimizer: Any, grads: list[Any]) -> None:
        optimizer.step([None if g is None else put(g) for g in grads])

    def seen(optimizer: Any) -> Any:
        saved = optimizer.state_dict()
        state = {name: {key: _bytes(x) for key, x in own.items()} for name, own in saved["state"].items()}
        return list(map(_bytes, optimizer.param_groups[0]["params"])), state, saved["steps"], saved["skipped_steps"]

    return Subject(make, step, seen, shapes=shapes)


def _torch(kind: torch.dtype = torch.float32, **options: Any) -> Subject:
    def make() -> Any:
        params = [torch.tensor(x).to(kind).requires_grad_() for x in arrays(0)]
        return lars_torch.LARS(params, **OPTIONS | options)

    def step(optimizer: Any, grads: list[Any]) -> None:
        for p, g in zip(optimizer.param_groups[0]["params"], grads, strict=True):
            p.grad = None if g is None else torch.tensor(g).to(kind)
        optimizer.step()

    def seen(optimizer: Any) -> Any:
        params = optimizer.param_groups[0]["params"]
        state = [{key: _bytes(x) for key, x in optimizer.state.get(p, {}).items()} for p in params]
        return list(map(_bytes, params)), state, optimizer.steps, optimizer.skipped_steps

    return Subject(make, step, seen)


def _jax(**options: Any) -> Subject:
    def make() -> Any:
        return lars_jax.LARS([jnp.array(x) for x in arrays(0)], **OPTIONS | options)

    def step(optimizer: Any, grads: list[Any]) -> None:
        optimizer.step([None if g is None else jnp.array(g) for g in grads])

    def seen(optimizer: Any) -> Any:
        saved = optimizer.state_dict()
        state = {name: {key: _bytes(x) for key, x in own.items()} for name, own in saved["state"].items()}
        return list(map(_bytes, optimizer.params)), state, saved["steps"], saved["skipped_steps"]

    return Subject(make, step, seen)


def _untaped(S: Any, hyper: Any, xp: Any) -> Any:
    """A rule that no tape records: it reads other layers."""
    return lars_array.core.flash(S / xp.max(S), hyper, xp)


def _strict(x: Any) -> Any:
    return array_api_strict.asarray(np.array(x), copy=True)


def _far(subject: Subject) -> Subject:
    return subject._replace(context=cuda_on_cpu.pretended)


SUBJECTS: dict[str, Subject] = {
    "compiled, propagate": _numpy(kernel="compiled", nonfinite="propagate"),
    "compiled, raise": _numpy(kernel="compiled"),
    "compiled, clipped": _numpy(kernel="compiled", nonfinite="propagate", max_grad_norm=1.0),
    "compiled, other gradients": _numpy(kernel="compiled")._replace(kinds=("float32", "float16")),
    "compiled, masters": _numpy(kind=ml_dtypes.bfloat16, kernel="compiled", master_weights=True),
    "compiled, a gradient is absent": _numpy(kernel="compiled", nonfinite="propagate")._replace(absent=True),
    "compiled, a rule of NumPy": _numpy(kernel="compiled", rule=lars_array.Rule(_untaped)),
    "compiled and blocked": _numpy(lambda x: np.array(x)[..., ::-1] if x.ndim == 2 else np.array(x), kernel="compiled"),
    "blocked, raise": _numpy(kernel="blocked"),
    "blocked, propagate": _numpy(kernel="blocked", nonfinite="propagate"),
    "blocked, masters": _numpy(kind=np.float16, kernel="blocked", master_weights=True),
    "compiled, several threads": _numpy(kernel="compiled", nonfinite="propagate", shapes=LARGE),
    "compiled, several threads, raise": _numpy(kernel="compiled", shapes=LARGE),
    "blocked, several threads": _numpy(kernel="blocked", shapes=LARGE),
    "portable": _numpy(kernel="portable"),
    "portable, another library": _numpy(_strict),
    "cuda": _far(_numpy(cuda_on_cpu.far)),
    "cuda, masters": _far(_numpy(cuda_on_cpu.far, kind=np.float16, master_weights=True)),
    "cuda, a rule of NumPy": _far(_numpy(cuda_on_cpu.far, rule=lars_array.Rule(_untaped), nonfinite="propagate")),
    "cuda, other gradients": _far(_numpy(cuda_on_cpu.far))._replace(kinds=("float32", "float16")),
    "torch": _torch(),
    "torch, raise": _torch(nonfinite="raise"),
    "torch, portable": _torch(kernel="portable"),
    "torch, blocked": _torch(kernel="blocked"),
    "torch, a rule with rates": _torch(rule="mxnet"),
    "torch, masters": _torch(torch.bfloat16, master_weights=True),
    "torch, a gradient is absent": _torch()._replace(absent=True),
    "JAX": _jax(),
    "JAX, donated": _jax(donate=True),
    "JAX, propagate": _jax(nonfinite="propagate"),
    "JAX, other gradients": _jax()._replace(kinds=("float32", "float16")),
    "JAX, a gradient is absent": _jax()._replace(absent=True),
}


@functools.cache
def history(name: str) -> list[Any]:
    """Return what the optimizer holds before and after each of its steps."""
    subject = SUBJECTS[name]
    with subject.context():
        optimizer = subject.make()
        found = [subject.seen(optimizer)]
        for number in range(STEPS):
            subject.step(optimizer, gradients(subject, number))
            found.append(subject.seen(optimizer))
    return found


def optimizer_after(name: str, steps: int) -> Any:
    """Return an optimizer that has taken some steps."""
    subject = SUBJECTS[name]
    optimizer = subject.make()
    for number in range(steps):
        subject.step(optimizer, gradients(subject, number))
    return optimizer


def assert_whole(name: str, optimizer: Any, number: int) -> bool:
    """Step `number` was taken and counted or nothing was, and the next steps go on from there; return which it was."""
    subject, expected = SUBJECTS[name], history(name)
    found = subject.seen(optimizer)
    was_taken: bool = found == expected[number + 1]
    assert was_taken or found == expected[number], f"a step of {name} is torn"
    for k in range(number + was_taken, min(number + 2, STEPS)):
        subject.step(optimizer, gradients(subject, k))
        assert subject.seen(optimizer) == expected[k + 1], f"steps of {name} go on otherwise"
    return was_taken


@contextlib.contextmanager
def in_context(name: str) -> Iterator[None]:
    with SUBJECTS[name].context():
        yield
