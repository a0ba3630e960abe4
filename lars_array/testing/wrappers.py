"""Steps for `assert_conforms`: of functions of one layer, of torch's optimizers and of optax's transformations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

__all__ = ["Step", "layer_step", "optax_step", "torch_step"]

# step(params, grads, state, *, lr, **hyper) -> (params, state)
Step = Callable[..., tuple[Any, Any]]


def layer_step(function: Callable[..., tuple[Any, Any]]) -> Step:
    """Return a step of a network from a function that takes a step of one layer.

    Parameters
    ----------
    function : callable
        ``function(p, g, v, *, lr, momentum, ...) -> (p', v')``. p and g are NumPy arrays of its own, which it may
        modify; v is whatever it returned for this layer at the step before, None at the first.

    Returns
    -------
    callable
        A step for `assert_conforms`.

    Examples
    --------
    >>> from lars_array import lars_step
    >>> from lars_array.testing import assert_conforms
    >>> assert_conforms(layer_step(lars_step), "flash")
    """

    def step(params: dict[str, Any], grads: dict[str, Any], state: Any, **hyper: Any) -> tuple[Any, Any]:
        buffers = state or dict.fromkeys(params)
        results = {name: function(p, grads[name], buffers[name], **hyper) for name, p in params.items()}
        return {name: p for name, (p, _) in results.items()}, {name: v for name, (_, v) in results.items()}

    return step


def torch_step(make: Callable[..., Any]) -> Step:
    """Return a step from a torch optimizer.

    Parameters
    ----------
    make : callable
        ``make(tensors, *, lr, momentum, ...) -> optimizer``, such as the class of the optimizer, or a function that
        gives the hyper-parameters other names. `tensors` is a list with one leaf tensor per layer, on the CPU. The
        learning rate of all groups is set before each step.

    Returns
    -------
    callable
        A step for `assert_conforms`.
    """

    def step(params: dict[str, Any], grads: dict[str, Any], state: Any, *, lr: float, **hyper: Any) -> tuple[Any, Any]:
        import torch

        if state is None:
            tensors = [torch.tensor(p, requires_grad=True) for p in params.values()]
            state = tensors, make(tensors, lr=lr, **hyper)
        tensors, optimizer = state
        for tensor, g in zip(tensors, grads.values(), strict=True):
            tensor.grad = torch.tensor(g)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        return {name: tensor.detach().numpy().copy() for name, tensor in zip(params, tensors, strict=True)}, state

    return step


def optax_step(make: Callable[..., Any]) -> Step:
    """Return a step from a gradient transformation of optax.

    Parameters
    ----------
    make : callable
        ``make(lr, *, momentum, ...) -> transformation``, such as `optax.lars`. It is called for each step, with its
        learning rate; the state is handed on. Without ``jax_enable_x64``, compare with ``dtype="float32"``.

    Returns
    -------
    callable
        A step for `assert_conforms`.
    """

    def step(params: dict[str, Any], grads: dict[str, Any], state: Any, *, lr: float, **hyper: Any) -> tuple[Any, Any]:
        import jax
        import optax

        transformation = make(lr, **hyper)
        given, gradients = jax.tree.map(jax.numpy.asarray, (params, grads))
        state = transformation.init(given) if state is None else state
        updates, state = transformation.update(gradients, state, given)
        return jax.tree.map(np.asarray, optax.apply_updates(given, updates)), state

    return step
