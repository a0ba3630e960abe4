"""The table on the terminal and the JSON file."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

from rich import box
from rich.table import Table

from lars_array._version import __version__
from lars_array.demo.data import Digits
from lars_array.demo.experiment import CHANCE, MOMENTUM, OPTIMIZERS, WARMUP_SHARE, WEIGHT_DECAY
from lars_array.demo.network import WIDTHS
from lars_array.demo.plan import METHODS, Outcomes, Settings
from lars_array.demo.summary import Cells

INITS = {"uniform": "Initialised as nn.Linear", "he": "He initialisation"}


def title(settings: Settings) -> str:
    """Return the heading of `table`."""
    seeds = f"mean ± standard deviation over {settings.final_seeds} seeds"
    return f"{INITS[settings.init]}, {settings.epochs} epochs: test accuracy in %, {seeds}"


def table(settings: Settings, cells: Cells) -> Table:
    """Return test accuracies and learning rates, with one row per method and one column per batch size."""
    rows = Table(
        caption="below each: the peak learning rate, chosen on validation", box=box.SIMPLE_HEAD, pad_edge=False
    )
    rows.add_column("batch size", no_wrap=True)
    for batch_size in settings.batch_sizes:
        rows.add_column(str(batch_size), justify="right", no_wrap=True)
    for name, method in METHODS.items():
        found = [cells[name, batch_size] for batch_size in settings.batch_sizes]
        style = "bold" if method.optimizer == "lars" else ""
        rows.add_row(method.label, *(f"{cell}\n[dim]lr {cell.lr:g}[/dim]" for cell in found), style=style)
    return rows


@dataclass(frozen=True)
class Experiment:
    """An experiment and what came of it.

    Attributes
    ----------
    settings : Settings
        The size of the experiment.
    cells : mapping of (method, batch size) to Cell
        The summary.
    sentences : dict of str to list of str
        Verdict and caveats.
    """

    settings: Settings
    cells: Cells
    sentences: dict[str, list[str]]


def to_json(
    experiments: Sequence[Experiment],
    digits: Digits,
    outcomes: Outcomes,
    trust_ratios: Mapping[str, list[float]],
    seconds: float,
) -> str:
    """Return all numbers as JSON. Two identical runs differ only in ``"timings"``.

    Parameters
    ----------
    experiments : sequence of Experiment
        The experiments.
    digits : Digits
        The data, of which the sizes are reported.
    outcomes : mapping of Run to Outcome
        The outcomes of all runs of all experiments.
    trust_ratios : mapping of str to list of float
        The trust ratios of each layer at every step of the run that is shown.
    seconds : float
        Total wall time.
    """
    document: dict[str, Any] = {
        "config": {
            "widths": WIDTHS,
            "rows": {part: len(getattr(digits, part).y) for part in ("train", "validation", "test")},
            "momentum": MOMENTUM,
            "weight_decay": WEIGHT_DECAY,
            "warmup_share": WARMUP_SHARE,
            "optimizers": OPTIMIZERS,
            "methods": {name: asdict(method) for name, method in METHODS.items()},
            "diverged_counts_as": CHANCE,
        },
        "versions": {
            "lars-array": __version__,
            "python": platform.python_version(),
            **{package: version(package) for package in ("numpy", "scikit-learn")},
        },
        "runs": [
            {**asdict(run), "accuracy": outcome.accuracy, "diverged": outcome.diverged}
            for run, outcome in outcomes.items()
        ],
        "experiments": [
            {
                "settings": asdict(experiment.settings),
                "chosen_lrs": _by_method(experiment.cells, lambda cell: cell.lr),
                "summary": _by_method(experiment.cells, asdict),
                **experiment.sentences,
            }
            for experiment in experiments
        ],
        "trust_ratios": trust_ratios,
        "timings": {"seconds": seconds, "seconds_of_runs": [outcome.seconds for outcome in outcomes.values()]},
    }
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def _by_method(cells: Cells, value: Any) -> dict[str, dict[str, Any]]:
    """Return ``{method: {batch size: value of the cell}}``."""
    return {
        name: {str(batch_size): value(cell) for (of, batch_size), cell in cells.items() if of == name}
        for name in METHODS
    }
