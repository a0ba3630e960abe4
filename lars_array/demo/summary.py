"""The reported numbers and sentences, computed from the outcomes of the runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from scipy.stats import t

from lars_array.demo.plan import METHODS, Choice, Outcomes, Settings, final_runs


@dataclass(frozen=True)
class Cell:
    """The result of a method for a batch size.

    Attributes
    ----------
    lr : float
        The chosen learning rate.
    mean, std, standard_error : float
        Of the test accuracy over the seeds, in percent; `std` is the sample standard deviation.
    diverged : int
        Number of runs that diverged.
    """

    lr: float
    mean: float
    std: float
    standard_error: float
    diverged: int

    def __str__(self) -> str:
        return f"{self.mean:.1f} ± {self.std:.1f}"


Cells: TypeAlias = Mapping[tuple[str, int], Cell]


def summarise(settings: Settings, choice: Choice, final: Outcomes) -> dict[tuple[str, int], Cell]:
    """Return the cell of every method and batch size; `final` contains the outcomes of `final_runs`."""
    cells = {}
    for key, runs in final_runs(settings, choice).items():
        percent = 100 * np.array([final[run].accuracy for run in runs])
        std = float(percent.std(ddof=1))
        diverged = sum(final[run].diverged for run in runs)
        cells[key] = Cell(choice[key], float(percent.mean()), std, std / len(runs) ** 0.5, diverged)
    return cells


def verdict(settings: Settings, cells: Cells) -> list[str]:
    """Return sentences that compare LARS on the largest batch, and list each method's loss of accuracy there.

    A difference is claimed only if its 95 % confidence interval excludes 0. The interval is Welch's, with the degrees
    of freedom of the smaller sample, which is conservative.
    """
    smallest, largest = min(settings.batch_sizes), max(settings.batch_sizes)
    quantile = float(t.ppf(0.975, settings.final_seeds - 1))
    lars = cells["lars", largest]
    sentences = []
    for name, method in METHODS.items():
        if name == "lars":
            continue
        other = cells[name, largest]
        lead = lars.mean - other.mean
        margin = quantile * float(np.hypot(lars.standard_error, other.standard_error))
        interval = f"{abs(lead):.1f} ± {margin:.1f} points"
        if lead > margin:
            found = f"LARS is {interval} ahead of {method.label}"
        elif lead < -margin:
            found = f"LARS is {interval} behind {method.label}"
        else:
            found = f"LARS and {method.label} do not clearly differ ({lead:+.1f} ± {margin:.1f} points)"
        sentences.append(f"With batches of {largest}, {found}.")
    lost = {name: cells[name, smallest].mean - cells[name, largest].mean for name in METHODS}
    costs = ", ".join(f"{method.label} {lost[name]:.1f}" for name, method in METHODS.items())
    sentences.append(f"Points lost from batches of {smallest} to {largest}: {costs}.")
    return sentences


def caveats(settings: Settings, cells: Cells) -> list[str]:
    """Return sentences on the limits of `verdict`: chosen learning rates at an end of the grid, and diverged runs."""
    ends, diverged = [], []
    for (name, batch_size), cell in cells.items():
        method = METHODS[name]
        if not method.scaled and cell.lr in (min(settings.lrs), max(settings.lrs)):
            ends.append(f"{method.label} at {batch_size}")
        if cell.diverged:
            diverged.append(f"{method.label} at {batch_size}, {cell.diverged} of {settings.final_seeds} runs")
    sentences = []
    if ends:
        sentences.append(f"The chosen lr is the last of the grid, a better one may lie beyond: {'; '.join(ends)}.")
    if diverged:
        sentences.append(f"Diverged, and counted as guessing: {'; '.join(diverged)}.")
    return sentences
