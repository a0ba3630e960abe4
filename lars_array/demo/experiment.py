"""One training run, as a pure function of its description and the data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Literal

import numpy as np

from lars_array import LARS, NonFiniteError, param_groups, warmup_cosine
from lars_array.demo.data import Digits
from lars_array.demo.network import WIDTHS, Init, Labels, Params, accuracy, init_params, loss_and_gradients

MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4
WARMUP_SHARE = 0.3

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"adapt": False},
    "clip-1": {"adapt": False, "max_grad_norm": 1.0},
    "clip-0.1": {"adapt": False, "max_grad_norm": 0.1},
    "lars": {"trust_coefficient": 0.05},
}
"""The options of each optimizer. All are `LARS`: with ``adapt=False`` it is SGD, with optional gradient clipping.

Gradients are usually clipped at 1. The gradients of the demo's network are so small at first that a threshold of 0.1,
with a larger learning rate, suits it better; without it the comparison would be too kind to LARS.
"""

CHANCE = 1 / WIDTHS[-1]
"""The accuracy assigned to a diverged run: that of random guessing."""


@dataclass(frozen=True)
class Run:
    """The description of a run, which determines its outcome.

    Attributes
    ----------
    optimizer : str
        A key of `OPTIMIZERS`.
    batch_size : int
        Rows per step.
    lr : float
        Peak learning rate.
    seed : tuple of int
        Seed of the initial weights and of the order of the rows.
    epochs : int
        Passes over the training set.
    scored_on : {"validation", "test"}
        The part on which accuracy is measured. Runs that choose learning rates are scored on the validation set.
    init : {"uniform", "he"}
        The initialisation of `init_params`.
    """

    optimizer: str
    batch_size: int
    lr: float
    seed: tuple[int, ...]
    epochs: int
    scored_on: Literal["validation", "test"]
    init: Init = "uniform"


@dataclass(frozen=True)
class Outcome:
    """The result of a run.

    Attributes
    ----------
    accuracy : float
        Fraction of the part `Run.scored_on` that is classified correctly, 0 to 1; `CHANCE` if the run diverged.
    diverged : bool
        Whether a gradient or a parameter was not finite.
    seconds : float
        Wall time.
    """

    accuracy: float
    diverged: bool
    seconds: float


def train(run: Run, digits: Digits, interrupted: Callable[[], bool] = lambda: False) -> Outcome:
    """Train a network and measure its accuracy.

    Parameters
    ----------
    run : Run
        The description of the run.
    digits : Digits
        The data.
    interrupted : callable
        Called before every step; if it returns True, training is cancelled.

    Returns
    -------
    Outcome
        Identical for identical `run` and `digits`, except for the seconds.

    Raises
    ------
    CancelledError
        If `interrupted` returned True.
    """
    start = perf_counter()
    # Too large learning rates are part of the experiment. Overflow is detected below, so NumPy's warnings are off.
    with np.errstate(all="ignore"):
        params = fit(run, digits, interrupted)
        part = digits.validation if run.scored_on == "validation" else digits.test
        score = CHANCE if params is None else accuracy(params, part.x, part.y)
    return Outcome(score, params is None, perf_counter() - start)


def trust_ratios(run: Run, digits: Digits, interrupted: Callable[[], bool] = lambda: False) -> dict[str, list[float]]:
    """Train a network and record the trust ratios of its layers.

    Parameters
    ----------
    run : Run
        The description of the run.
    digits : Digits
        The data.
    interrupted : callable
        Called before every step; if it returns True, training is cancelled.

    Returns
    -------
    dict of str to list of float
        For the weights of each layer, from input to output, the trust ratio at every step; shorter if the run diverged.

    Raises
    ------
    CancelledError
        If `interrupted` returned True.
    """
    steps: list[dict[str, float]] = []
    with np.errstate(all="ignore"):
        fit(run, digits, interrupted, observe=lambda optimizer: steps.append(optimizer.trust_ratios()))
    names = [f"{layer}/weight" for layer in range(1, len(WIDTHS))]
    return {name: [ratios[name] for ratios in steps] for name in names}


def fit(
    run: Run,
    digits: Digits,
    interrupted: Callable[[], bool],
    observe: Callable[[LARS], object] = lambda optimizer: None,
) -> Params | None:
    """Return the trained parameters of `run`, or None if it diverged; `observe` is called after every step."""
    rng = np.random.default_rng(run.seed)
    params = init_params(rng, init=run.init)
    schedule = list(batches(rng, len(digits.train.y), run))
    optimizer = make_optimizer(run, params, steps=len(schedule))
    for batch in schedule:
        if interrupted():
            raise CancelledError
        _, gradients = loss_and_gradients(params, digits.train.x[batch], digits.train.y[batch])
        try:
            optimizer.step(gradients)  # Raises for non-finite gradients and changes nothing.
        except NonFiniteError:
            return None
        observe(optimizer)
    # After the last step no gradient reveals divergence.
    return params if all(np.isfinite(array).all() for array in params.values()) else None


def make_optimizer(run: Run, params: Params, steps: int) -> LARS:
    """Return the optimizer of `run`: linear warm-up, then cosine; no weight decay or adaptation for biases."""
    lr = warmup_cosine(run.lr, total_steps=steps, warmup_steps=round(WARMUP_SHARE * steps))
    # The options go into the groups, because options of a group override those of `LARS`.
    groups = [{**group, **OPTIMIZERS[run.optimizer]} for group in param_groups(params, weight_decay=WEIGHT_DECAY)]
    return LARS(groups, lr=lr, momentum=MOMENTUM)


def batches(rng: np.random.Generator, rows: int, run: Run) -> Iterator[Labels]:
    """Yield the rows of every step, shape (batch_size,).

    The shuffled epochs are joined into one stream, which is cut into batches. So every batch is full, and all batch
    sizes use the same examples (except for the last few of the last epoch).
    """
    stream = np.concatenate([rng.permutation(rows) for _ in range(run.epochs)])
    for start in range(0, len(stream) - run.batch_size + 1, run.batch_size):
        yield stream[start : start + run.batch_size]
