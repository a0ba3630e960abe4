"""The list of runs: first those that choose learning rates, then those that are reported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np

from lars_array import linear_scaled_lr
from lars_array.demo.experiment import OPTIMIZERS, Outcome, Run
from lars_array.demo.network import Init

Outcomes: TypeAlias = Mapping[Run, Outcome]
Choice: TypeAlias = dict[tuple[str, int], float]

LABELS = {"sgd": "SGD", "clip-1": "SGD clipped at 1", "clip-0.1": "SGD clipped at 0.1", "lars": "LARS"}


@dataclass(frozen=True)
class Method:
    """An optimizer and a way to choose its learning rate: tuned per batch size, or on the smallest and then scaled."""

    label: str
    optimizer: str
    scaled: bool = False


METHODS = {
    **{name: Method(f"{LABELS[name]}, lr tuned", name) for name in OPTIMIZERS},
    **{f"{name}-scaled": Method(f"{LABELS[name]}, lr scaled", name, scaled=True) for name in OPTIMIZERS},
}


@dataclass(frozen=True)
class Settings:
    """The size of an experiment.

    Attributes
    ----------
    seed : int
        Seed of the split of the data, all initial weights and the order of the rows.
    init : {"uniform", "he"}
        The initialisation of the network.
    epochs : int
        Passes over the training set.
    batch_sizes : tuple of int
        Batch sizes. The scaled learning rate is tuned on the smallest.
    lrs : tuple of float
        The grid of peak learning rates; see `grid`.
    tuning_seeds : tuple of int
        Number of tuning runs per learning rate, for every batch size. Seeds differ most on the largest batch.
    final_seeds : int
        Number of test runs with each chosen learning rate.
    """

    seed: int
    init: Init = "uniform"
    epochs: int = 120
    batch_sizes: tuple[int, ...] = (256, 1024)
    lrs: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0)
    tuning_seeds: tuple[int, ...] = (1, 2)
    final_seeds: int = 5


def full(seed: int) -> list[Settings]:
    """Return the experiment of the demo, and a smaller one with the initialisation that leaves nothing to LARS."""
    return [Settings(seed), Settings(seed, "he", epochs=30)]


def quick(seed: int) -> list[Settings]:
    """Return settings for a run of a few seconds: a demonstration, too small for conclusions."""
    small = Settings(seed, epochs=10, lrs=(0.1, 0.3), tuning_seeds=(1, 1), final_seeds=2)
    return [small, replace(small, init="he", epochs=5)]


def grid(settings: Settings, optimizer: str) -> list[float]:
    """Return the learning rates to choose from: `Settings.lrs`, divided by the threshold of clipping if there is one.

    A clipped step is at most the learning rate times the threshold long.
    """
    threshold = OPTIMIZERS[optimizer].get("max_grad_norm", 1.0)
    return [round(lr / threshold, 6) for lr in settings.lrs]


def tuning_runs(settings: Settings) -> list[Run]:
    """Return the runs that choose learning rates: the whole grid, scored on the validation set."""
    return [
        Run(optimizer, batch_size, lr, (settings.seed, 0, repetition), settings.epochs, "validation", settings.init)
        for batch_size, repetitions in zip(settings.batch_sizes, settings.tuning_seeds, strict=True)
        for optimizer in OPTIMIZERS
        for lr in grid(settings, optimizer)
        for repetition in range(repetitions)
    ]


def tuning_scores(settings: Settings, tuned: Outcomes, optimizer: str, batch_size: int) -> dict[float, list[float]]:
    """Return the validation accuracies of every learning rate, in the order of the grid."""
    scores: dict[float, list[float]] = {}
    for run in tuning_runs(settings):
        if (run.optimizer, run.batch_size) == (optimizer, batch_size):
            scores.setdefault(run.lr, []).append(tuned[run].accuracy)
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
            scores = tuning_scores(settings, tuned, method.optimizer, smallest if method.scaled else batch_size)
            best = max(scores, key=lambda lr: float(np.mean(scores[lr])))
            choice[name, batch_size] = linear_scaled_lr(best, batch_size, smallest) if method.scaled else best
    return choice


def final_runs(settings: Settings, choice: Choice) -> dict[tuple[str, int], list[Run]]:
    """Return the runs that are reported, by method and batch size: chosen learning rates, scored on the test set.

    Their seeds differ from those of tuning. For the smallest batch, scaled and tuned rates are the same runs.
    """
    seeds = [(settings.seed, 1, repetition) for repetition in range(settings.final_seeds)]
    epochs, init = settings.epochs, settings.init
    return {
        (name, batch_size): [Run(METHODS[name].optimizer, batch_size, lr, seed, epochs, "test", init) for seed in seeds]
        for (name, batch_size), lr in choice.items()
    }


def traced_run(settings: Settings, choice: Choice) -> Run:
    """Return the run whose trust ratios are shown: LARS on the largest batch, tuned, with the first of the seeds."""
    return final_runs(settings, choice)["lars", max(settings.batch_sizes)][0]
