"""A multi-layer perceptron in plain NumPy: initialisation, loss with gradients, accuracy."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import DTypeLike, NDArray

Array: TypeAlias = NDArray[np.floating[Any]]
Labels: TypeAlias = NDArray[np.intp]
Params: TypeAlias = dict[str, Array]

Init: TypeAlias = Literal["uniform", "he"]

WIDTHS = (64, 64, 64, 64, 64, 64, 64, 10)
"""Layer widths of the demo: an 8 x 8 image in, seven layers of weights, ten classes out."""


def init_params(
    rng: np.random.Generator,
    widths: tuple[int, ...] = WIDTHS,
    dtype: DTypeLike = np.float32,
    init: Init = "uniform",
) -> Params:
    """Draw the initial weights and biases.

    Parameters
    ----------
    rng : numpy.random.Generator
        Source of the weights.
    widths : tuple of int
        Width of the input and of the output of every layer.
    dtype : dtype
        Dtype of the parameters.
    init : {"uniform", "he"}
        "uniform" draws weights and biases from ±1/sqrt(fan_in), as torch's ``nn.Linear`` does by default: through every
        layer with ReLU, signals shrink by a factor of about 2.4. "he" draws normal weights with variance 2/fan_in,
        which keeps the size of signals, and sets biases to zero.

    Returns
    -------
    dict of str to ndarray
        ``"1/weight"`` of shape (widths[0], widths[1]), ``"1/bias"`` of shape (widths[1],), ``"2/weight"`` and so on.
    """
    params: Params = {}
    for layer, (fan_in, fan_out) in enumerate(pairwise(widths), start=1):
        if init == "uniform":
            bound = fan_in**-0.5
            weight, bias = rng.uniform(-bound, bound, (fan_in, fan_out)), rng.uniform(-bound, bound, fan_out)
        else:
            weight, bias = rng.standard_normal((fan_in, fan_out)) * np.sqrt(2.0 / fan_in), np.zeros(fan_out)
        params[f"{layer}/weight"] = weight.astype(dtype)
        params[f"{layer}/bias"] = bias.astype(dtype)
    return params


def forward(params: Params, x: Array) -> list[Array]:
    """Run the network and keep the activations for the backward pass.

    Parameters
    ----------
    params : dict of str to ndarray
        Parameters from `init_params`.
    x : ndarray of shape (rows, widths[0])
        Inputs.

    Returns
    -------
    list of ndarray
        The input of every layer, then the logits of shape (rows, widths[-1]).
    """
    depth = len(params) // 2
    activations = [x]
    for layer in range(1, depth + 1):
        z = activations[-1] @ params[f"{layer}/weight"]
        z += params[f"{layer}/bias"]
        if layer < depth:
            np.maximum(z, 0, out=z)
        activations.append(z)
    return activations


def loss_and_gradients(params: Params, x: Array, y: Labels) -> tuple[float, Params]:
    """Return the mean softmax cross-entropy and its gradient.

    Parameters
    ----------
    params : dict of str to ndarray
        Parameters from `init_params`.
    x : ndarray of shape (rows, widths[0])
        Inputs.
    y : ndarray of int, shape (rows,)
        Classes.

    Returns
    -------
    loss : float
        Mean over the rows.
    gradients : dict of str to ndarray
        With the names, shapes and dtypes of `params`.
    """
    *inputs, logits = forward(params, x)
    rows = np.arange(len(y))

    # Softmax shifted by the largest logit, which cannot overflow.
    log_probs = logits - logits.max(axis=1, keepdims=True)
    log_probs -= np.log(np.exp(log_probs).sum(axis=1, keepdims=True))
    loss = -float(log_probs[rows, y].mean())

    delta = np.exp(log_probs)
    delta[rows, y] -= 1
    delta /= len(y)

    gradients: Params = {}
    for layer in range(len(inputs), 0, -1):
        gradients[f"{layer}/weight"] = inputs[layer - 1].T @ delta
        gradients[f"{layer}/bias"] = delta.sum(axis=0)
        if layer > 1:
            delta = delta @ params[f"{layer}/weight"].T
            delta *= inputs[layer - 1] > 0  # ReLU passes a gradient only where it was active.
    return loss, gradients


def accuracy(params: Params, x: Array, y: Labels) -> float:
    """Return the fraction of rows, 0 to 1, whose class has the largest logit; arguments of `loss_and_gradients`."""
    return float((forward(params, x)[-1].argmax(axis=1) == y).mean())
