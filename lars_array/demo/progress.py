"""The whole training, with a progress bar and the remaining time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from lars_array.demo.data import Digits
from lars_array.demo.experiment import Outcome, Run
from lars_array.demo.plan import METHODS, Choice, Settings, choose, final_runs, traced_run, tuning_runs
from lars_array.demo.runner import Workers


@dataclass(frozen=True)
class Training:
    """The outcomes of all runs.

    Attributes
    ----------
    tuned, final : dict of Run to Outcome
        Outcomes of `tuning_runs` and of `final_runs`.
    choices : list of dict of (method, batch size) to float
        The chosen learning rates of each experiment.
    trust_ratios : dict of str to list of float
        Trust ratios of each layer at every step of `traced_run` of the first experiment.
    """

    tuned: dict[Run, Outcome]
    choices: list[Choice]
    final: dict[Run, Outcome]
    trust_ratios: dict[str, list[float]]


def train_all(experiments: Sequence[Settings], digits: Digits, console: Console) -> Training:
    """Choose the learning rates of all experiments, then run their final runs.

    Parameters
    ----------
    experiments : sequence of Settings
        The size of each experiment.
    digits : Digits
        The data.
    console : rich.console.Console
        The console for the progress bar.
    """
    remaining = TimeRemainingColumn(elapsed_when_finished=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), remaining)

    def work(batch_size: int, epochs: int) -> float:
        # Duration of a run in arbitrary units: each step costs 1, plus 1/200 per row.
        return epochs * (200 / batch_size + 1)

    tuning = [run for settings in experiments for run in tuning_runs(settings)]
    total = sum(work(run.batch_size, run.epochs) for run in tuning)
    # The duration of the final runs is independent of the learning rates, so it is included from the start.
    for settings in experiments:
        of_each = len(METHODS) * settings.final_seeds
        total += of_each * sum(work(batch_size, settings.epochs) for batch_size in settings.batch_sizes)
    with Workers(digits) as workers, Progress(*columns, console=console) as progress:
        bar = progress.add_task("choosing learning rates", total=total)

        def advance(run: Run) -> None:
            progress.advance(bar, work(run.batch_size, run.epochs))

        tuned = workers.map(tuning, advance)
        choices = [choose(settings, tuned) for settings in experiments]
        progress.update(bar, description="testing the chosen ones")
        planned = [final_runs(settings, choice) for settings, choice in zip(experiments, choices, strict=True)]
        final = workers.map((run for cells in planned for runs in cells.values() for run in runs), advance)
        trust_ratios = workers.trust_ratios(traced_run(experiments[0], choices[0]))
        progress.update(bar, completed=total)  # Runs shared by two methods run once.
    return Training(tuned, choices, final, trust_ratios)
