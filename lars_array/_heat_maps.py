"""Heat maps of numbers by step and layer, on logarithmic scales."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw", "figure_of"]

MOST_NAMES = 60  # along an axis, so that they stay readable
LONGEST = 40  # letters of a name


def figure_of(steps: Any, layers: Sequence[str], maps: Mapping[str, Any]) -> Figure:
    """Return a figure with a heat map for each title and array of shape (steps, layers)."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot needs matplotlib: pip install matplotlib") from error
    height = 1.2 + 0.2 * min(len(layers), MOST_NAMES)
    figure = Figure(figsize=(4 * len(maps) + 2, max(3.0, height)), layout="constrained")
    axes = figure.subplots(1, len(maps), sharey=True, squeeze=False)[0]
    for own, (title, values) in zip(axes, maps.items(), strict=True):
        draw(own, steps, layers, values)
        own.set_title(title, loc="left")
    for own in axes[1:]:
        own.tick_params(labelleft=False)
    return figure


def draw(axes: Any, steps: Any, layers: Sequence[str], values: Any) -> None:
    """Draw one heat map with its colour bar; layers from the top, and grey for numbers that are 0 or unknown."""
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import MaxNLocator

    shown = np.ma.masked_where(~(np.isfinite(values) & (values > 0)), values).T
    known = shown.compressed()
    low, high = (known.min(), known.max()) if known.size else (1.0, 1.0)
    axes.set_facecolor("#cccccc")
    edges = np.arange(len(layers) + 1) - 0.5
    mesh = axes.pcolormesh(_edges(steps), edges, shown, norm=LogNorm(low, high), cmap="viridis", rasterized=True)
    bar = axes.figure.colorbar(mesh, ax=axes, aspect=40, ticks=np.geomspace(low, high, 5), format="%.3g")
    bar.ax.minorticks_off()
    stride = -(-len(layers) // MOST_NAMES)
    names = [name if len(name) <= LONGEST else f"…{name[1 - LONGEST :]}" for name in layers]
    axes.set_yticks(range(0, len(layers), stride), names[::stride], fontsize=8)
    axes.set_ylim(len(layers) - 0.5, -0.5)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.set_xlabel("step")


def _edges(steps: Any) -> Any:
    """Return where the column of each step begins and ends: half way to its neighbours, at most one step on its own."""
    steps = np.asarray(steps, float)
    if len(steps) == 1:
        return np.array([steps[0] - 0.5, steps[0] + 0.5])
    middles = (steps[:-1] + steps[1:]) / 2
    return np.concatenate([[2 * steps[0] - middles[0]], middles, [2 * steps[-1] - middles[-1]]])
