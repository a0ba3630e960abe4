"""The whole training, with a progress bar and the remaining time."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from lars_array.demo.data import Digits
from lars_array.demo.experiment import Outcome, Run
from lars_array.demo.plan import METHODS, Choice, Settings, choose, final_runs, tuning_runs
from lars_array.demo.runner import Workers


def train_all(
    settings: Settings, digits: Digits, console: Console
) -> tuple[dict[Run, Outcome], Choice, dict[Run, Outcome]]:
    """Choose the learning rates, then run the final runs.

    Parameters
    ----------
    settings : Settings
        The size of the experiment.
    digits : Digits
        The data.
    console : rich.console.Console
        The console for the progress bar.

    Returns
    -------
    tuned : dict of Run to Outcome
        Outcomes of `tuning_runs`.
    choice : dict of (method, batch size) to float
        The chosen learning rates.
    final : dict of Run to Outcome
        Outcomes of `final_runs` with these learning rates.
    """
    remaining = TimeRemainingColumn(elapsed_when_finished=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), remaining)

    def work(batch_size: int) -> float:
        # Duration of a run in arbitrary units: each step costs 1, plus 1/50 per row.
        return settings.epochs * (50 / batch_size + 1)

    tuning = tuning_runs(settings)
    # The duration of the final runs is independent of the learning rates, so it is included from the start.
    total = len(METHODS) * settings.final_seeds * sum(map(work, settings.batch_sizes))
    total += sum(work(run.batch_size) for run in tuning)
    with Workers(digits) as workers, Progress(*columns, console=console) as progress:
        bar = progress.add_task("choosing learning rates", total=total)

        def advance(run: Run) -> None:
            progress.advance(bar, work(run.batch_size))

        tuned = workers.map(tuning, advance)
        choice = choose(settings, tuned)
        progress.update(bar, description="testing the chosen ones")
        final = workers.map((run for runs in final_runs(settings, choice).values() for run in runs), advance)
        progress.update(bar, completed=total)  # Runs shared by two methods run once.
    return tuned, choice, final
