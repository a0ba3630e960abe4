"""The reported numbers and sentences, computed from the outcomes of the runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from scipy.stats import t

from lars_array.demo.plan import LABELS, METHODS, Choice, Outcomes, Settings, final_runs, grid


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


def lead(settings: Settings, cells: Cells, name: str) -> tuple[float, float]:
    """Return the lead of LARS over a method on the largest batch, in points, and half its 95 % confidence interval.

    LARS with a tuned learning rate is compared with methods that are tuned, and scaled with scaled. The interval is
    Welch's, with the degrees of freedom of the smaller sample, which is conservative. It covers the initial weights and
    the order of the rows, not the split of the data.
    """
    largest = max(settings.batch_sizes)
    other, lars = cells[name, largest], cells["lars-scaled" if METHODS[name].scaled else "lars", largest]
    quantile = float(t.ppf(0.975, settings.final_seeds - 1))
    return lars.mean - other.mean, quantile * float(np.hypot(lars.standard_error, other.standard_error))


def verdict(settings: Settings, cells: Cells) -> list[str]:
    """Return lines with the lead of LARS on the largest batch, and each tuned method's loss of accuracy there.

    A lead whose 95 % confidence interval contains 0 is called unclear.
    """
    smallest, largest = min(settings.batch_sizes), max(settings.batch_sizes)
    sentences = []
    for name, method in METHODS.items():
        if method.optimizer != "lars":
            points, margin = lead(settings, cells, name)
            found = f"{points:+.1f} ± {margin:.1f} points" + ("" if abs(points) > margin else " (unclear)")
            sentences.append(f"LARS over {method.label}, batches of {largest}: {found}")
    tuned = [name for name, method in METHODS.items() if not method.scaled]
    lost = ", ".join(f"{LABELS[name]} {cells[name, smallest].mean - cells[name, largest].mean:.1f}" for name in tuned)
    sentences.append(f"Points lost from batches of {smallest} to {largest}, lr tuned: {lost}")
    return sentences


def caveats(settings: Settings, cells: Cells) -> list[str]:
    """Return lines on the limits of `verdict`: chosen learning rates at an end of the grid, and diverged runs."""
    ends, diverged = [], []
    for (name, batch_size), cell in cells.items():
        method = METHODS[name]
        lrs = grid(settings, method.optimizer)
        if not method.scaled and cell.lr in (lrs[0], lrs[-1]):
            ends.append(f"{method.label} at {batch_size}")
        if cell.diverged:
            diverged.append(f"{method.label} at {batch_size}, {cell.diverged} of {settings.final_seeds} runs")
    sentences = []
    if ends:
        sentences.append(f"The chosen lr is the last of the grid, a better one may lie beyond: {'; '.join(ends)}")
    if diverged:
        sentences.append(f"Diverged, and counted as guessing: {'; '.join(diverged)}")
    return sentences
