"""The figure: accuracy against batch size, and against learning rate for the largest batch."""

from __future__ import annotations

from io import BytesIO
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from lars_array.demo.plan import METHODS, Outcomes, Settings, tuning_scores
from lars_array.demo.summary import Cells

# Colours that are distinct for any colour vision (Okabe and Ito), with one marker each for print without colour.
STYLES: dict[str, dict[str, Any]] = {
    "sgd-linear": {"color": "#888888", "marker": "s"},
    "sgd": {"color": "#E69F00", "marker": "D"},
    "sgd-clip": {"color": "#009E73", "marker": "^"},
    "lars": {"color": "#0072B2", "marker": "o"},
}
LINE: dict[str, Any] = {"linewidth": 2, "markersize": 6.5, "markeredgecolor": "white", "markeredgewidth": 0.8}


def draw(settings: Settings, cells: Cells, tuned: Outcomes) -> bytes:
    """Return the figure as a PNG.

    Parameters
    ----------
    settings : Settings
        The size of the experiment.
    cells : mapping of (method, batch size) to Cell
        The summary, for the left panel.
    tuned : mapping of Run to Outcome
        The outcomes of the tuning runs, for the right panel.
    """
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    _against_batch_size(left, settings, cells)
    _against_lr(right, settings, cells, tuned)
    for axes in (left, right):
        axes.set_ylim(0, 104)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e6e6e6")
        axes.set_axisbelow(True)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(METHODS), frameon=False)
    image = BytesIO()
    figure.savefig(image, format="png", dpi=150)
    return image.getvalue()


def _against_batch_size(axes: Axes, settings: Settings, cells: Cells) -> None:
    for name, method in METHODS.items():
        found = [cells[name, batch_size] for batch_size in settings.batch_sizes]
        means, spreads = [cell.mean for cell in found], [cell.std for cell in found]
        axes.errorbar(settings.batch_sizes, means, spreads, label=method.label, capsize=3, **LINE, **STYLES[name])
    axes.set_xscale("log", base=2)
    _ticks(axes, settings.batch_sizes)
    axes.set_xlabel("batch size")
    axes.set_ylabel("accuracy in %")
    axes.set_title(f"Test accuracy, mean ± standard deviation of {settings.final_seeds} seeds", loc="left")


def _against_lr(axes: Axes, settings: Settings, cells: Cells, tuned: Outcomes) -> None:
    largest = max(settings.batch_sizes)
    for name, method in METHODS.items():
        if method.scaled:
            axes.axvline(cells[name, largest].lr, color=STYLES[name]["color"], linestyle="--")
            continue
        scores = tuning_scores(tuned, method.optimizer, largest)
        lrs, percent = list(scores), 100 * np.array(list(scores.values()))
        lowest, highest = percent.min(axis=1), percent.max(axis=1)
        axes.fill_between(lrs, lowest, highest, color=STYLES[name]["color"], alpha=0.15, linewidth=0)
        axes.plot(lrs, percent.mean(axis=1), **LINE, **STYLES[name])
    axes.set_xscale("log")
    _ticks(axes, settings.lrs)
    axes.set_xlabel("peak learning rate (dashed: what linear scaling asks for)")
    axes.set_title(f"Validation accuracy with batches of {largest}, mean and range", loc="left")


def _ticks(axes: Axes, values: tuple[float, ...]) -> None:
    """Label exactly `values`, as plain numbers."""
    axes.xaxis.set_major_locator(FixedLocator(values))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
