"""The figure: accuracy against batch size and learning rate, and the trust ratio of each layer over the steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from lars_array.demo.plan import LABELS, METHODS, Outcomes, Settings, grid, tuning_scores
from lars_array.demo.summary import Cells

# Colours that are distinct for any colour vision (Okabe and Ito), with one marker each for print without colour.
STYLES: dict[str, dict[str, Any]] = {
    "sgd": {"color": "#E69F00", "marker": "D"},
    "clip-1": {"color": "#009E73", "marker": "^"},
    "clip-0.1": {"color": "#CC79A7", "marker": "v"},
    "lars": {"color": "#0072B2", "marker": "o"},
}
LINE: dict[str, Any] = {"linewidth": 2, "markersize": 6.5, "markeredgecolor": "white", "markeredgewidth": 0.8}
SCALED: dict[str, Any] = {"linewidth": 1.3, "linestyle": (0, (4, 2)), "alpha": 0.8, "markersize": 5}


def draw(settings: Settings, cells: Cells, tuned: Outcomes, trust_ratios: Mapping[str, list[float]]) -> bytes:
    """Return the figure as a PNG.

    Parameters
    ----------
    settings : Settings
        The size of the experiment.
    cells : mapping of (method, batch size) to Cell
        The summary, for the left panel.
    tuned : mapping of Run to Outcome
        The outcomes of the tuning runs, for the right panel.
    trust_ratios : mapping of str to list of float
        The trust ratios of each layer at every step, for the lower panel.
    """
    figure = Figure(figsize=(11, 8), layout="constrained")
    parts = np.asarray(figure.subfigures(2, 1, height_ratios=(4.9, 3.1), hspace=0.04))
    upper, lower = parts
    left, right = upper.subplots(1, 2, sharey=True)
    _against_batch_size(left, settings, cells)
    _against_lr(right, settings, tuned)
    for axes in (left, right):
        axes.set_ylim(0, 104)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e6e6e6")
        axes.set_axisbelow(True)
    handles = [Line2D([], [], label=label, **LINE, **STYLES[name]) for name, label in LABELS.items()]
    handles.append(Line2D([], [], label="lr scaled", color="#666666", **SCALED))
    upper.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    _over_steps(lower.subplots(), settings, trust_ratios)
    image = BytesIO()
    figure.savefig(image, format="png", dpi=150)
    return image.getvalue()


def _against_batch_size(axes: Axes, settings: Settings, cells: Cells) -> None:
    for name, method in METHODS.items():
        found = [cells[name, batch_size] for batch_size in settings.batch_sizes]
        means, spreads = [cell.mean for cell in found], [cell.std for cell in found]
        style = {**LINE, **STYLES[method.optimizer]}
        # A little beside each other, so that no bar hides another.
        aside = 1 + 0.015 * (list(STYLES).index(method.optimizer) - 1.5)
        sizes = [aside * batch_size for batch_size in settings.batch_sizes]
        if method.scaled:
            axes.plot(sizes, means, **{**style, **SCALED})  # Without bars, which are wide: the table has them.
        else:
            axes.errorbar(sizes, means, spreads, capsize=3, elinewidth=1, **style)
    axes.set_xscale("log", base=2)
    _ticks(axes, settings.batch_sizes)
    axes.set_xlabel("batch size")
    axes.set_ylabel("accuracy in %")
    axes.set_title(f"Test accuracy, mean ± standard deviation of {settings.final_seeds} seeds", loc="left")


def _against_lr(axes: Axes, settings: Settings, tuned: Outcomes) -> None:
    largest = max(settings.batch_sizes)
    for name, style in STYLES.items():
        scores = tuning_scores(settings, tuned, name, largest)
        lrs, percent = list(scores), 100 * np.array(list(scores.values()))
        lowest, highest = percent.min(axis=1), percent.max(axis=1)
        axes.fill_between(lrs, lowest, highest, color=style["color"], alpha=0.15, linewidth=0)
        axes.plot(lrs, percent.mean(axis=1), **LINE, **style)
    axes.set_xscale("log")
    _ticks(axes, sorted({lr for name in STYLES for lr in grid(settings, name)}))
    axes.set_xlabel("peak learning rate")
    axes.set_title(f"Validation accuracy with batches of {largest}, mean and range", loc="left")


def _over_steps(axes: Axes, settings: Settings, trust_ratios: Mapping[str, list[float]]) -> None:
    ratios = np.array(list(trust_ratios.values()))
    positive = ratios[ratios > 0]
    bound = max(2.0, positive.max(), 1 / positive.min())  # The step of SGD is white; longer ones are red.
    image = axes.pcolormesh(ratios, norm=LogNorm(1 / bound, bound), cmap="RdBu_r", rasterized=True)
    count = len(ratios)
    ends = {1: "layer 1 (input)", count: f"layer {count} (output)"}
    axes.set_yticks(np.arange(count) + 0.5, [ends.get(layer, f"layer {layer}") for layer in range(1, count + 1)])
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.spines[:].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("step")
    largest = max(settings.batch_sizes)
    axes.set_title(f"Why: LARS gives each layer a trust ratio of its own, here with batches of {largest}", loc="left")
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    axes.figure.colorbar(image, ax=axes, label="trust ratio (SGD: 1)", pad=0.01, format=plain)


def _ticks(axes: Axes, values: Sequence[float]) -> None:
    """Label exactly `values`, as plain numbers."""
    axes.xaxis.set_major_locator(FixedLocator(values))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
