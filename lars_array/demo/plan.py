"""The list of runs: first those that choose learning rates, then those that are reported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from lars_array import linear_scaled_lr
from lars_array.demo.experiment import OPTIMIZERS, Outcome, Run

Outcomes: TypeAlias = Mapping[Run, Outcome]
Choice: TypeAlias = dict[tuple[str, int], float]


@dataclass(frozen=True)
class Method:
    """An optimizer and a way to choose its learning rate: tuned per batch size, or on the smallest and then scaled."""

    label: str
    optimizer: str
    scaled: bool = False


METHODS = {
    "sgd-linear": Method("SGD (lr scaled)", "sgd", scaled=True),
    "sgd": Method("SGD (lr tuned)", "sgd"),
    "sgd-clip": Method("clipped SGD (lr tuned)", "sgd-clip"),
    "lars": Method("LARS (lr tuned)", "lars"),
}


@dataclass(frozen=True)
class Settings:
    """The size of the experiment.

    Attributes
    ----------
    seed : int
        Seed of the split of the data, all initial weights and the order of the rows.
    epochs : int
        Passes over the training set.
    batch_sizes : tuple of int
        Batch sizes. The scaled learning rate is tuned on the smallest.
    lrs : tuple of float
        The grid of peak learning rates.
    tuning_seeds : tuple of int
        Number of tuning runs per learning rate, for every batch size. Seeds differ most on the largest batch.
    final_seeds : int
        Number of test runs with each chosen learning rate.
    """

    seed: int
    epochs: int = 30
    batch_sizes: tuple[int, ...] = (32, 128, 512, 1024)
    lrs: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0)
    tuning_seeds: tuple[int, ...] = (1, 1, 1, 2)
    final_seeds: int = 5


def quick(seed: int) -> Settings:
    """Return settings for a run of a few seconds: a demonstration, too small for conclusions."""
    return Settings(seed, epochs=10, batch_sizes=(128, 1024), lrs=(0.03, 0.1, 0.3), tuning_seeds=(1, 1), final_seeds=2)


def tuning_runs(settings: Settings) -> list[Run]:
    """Return the runs that choose learning rates: the whole grid, scored on the validation set."""
    return [
        Run(optimizer, batch_size, lr, (settings.seed, 0, repetition), settings.epochs, "validation")
        for batch_size, repetitions in zip(settings.batch_sizes, settings.tuning_seeds, strict=True)
        for optimizer in OPTIMIZERS
        for lr in settings.lrs
        for repetition in range(repetitions)
    ]


def tuning_scores(tuned: Outcomes, optimizer: str, batch_size: int) -> dict[float, list[float]]:
    """Return the validation accuracies of every learning rate, in the order of the grid."""
    scores: dict[float, list[float]] = {}
    for run, outcome in tuned.items():
        if (run.optimizer, run.batch_size) == (optimizer, batch_size):
            scores.setdefault(run.lr, []).append(outcome.accuracy)
    return scores


def choose(settings: Settings, tuned: Outcomes) -> Choice:
    """Choose the learning rate of every method and batch size.

    Parameters
    ----------
    settings : Settings
        The size of the experiment.
    tuned : mapping of Run to Outcome
        The outcomes of `tuning_runs`.

    Returns
    -------
    dict of (method, batch size) to float
        The learning rate with the best mean validation accuracy; the smallest of equal ones.
    """
    choice: Choice = {}
    smallest = min(settings.batch_sizes)
    for name, method in METHODS.items():
        for batch_size in settings.batch_sizes:
            scores = tuning_scores(tuned, method.optimizer, smallest if method.scaled else batch_size)
            best = max(scores, key=lambda lr: float(np.mean(scores[lr])))
            choice[name, batch_size] = linear_scaled_lr(best, batch_size, smallest) if method.scaled else best
    return choice


def final_runs(settings: Settings, choice: Choice) -> dict[tuple[str, int], list[Run]]:
    """Return the runs that are reported, by method and batch size: chosen learning rates, scored on the test set.

    Their seeds differ from those of tuning. For the smallest batch, SGD scaled and SGD tuned are the same runs.
    """
    return {
        (name, batch_size): [
            Run(METHODS[name].optimizer, batch_size, lr, (settings.seed, 1, repetition), settings.epochs, "test")
            for repetition in range(settings.final_seeds)
        ]
        for (name, batch_size), lr in choice.items()
    }
