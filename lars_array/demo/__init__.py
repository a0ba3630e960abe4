"""The claim of the LARS paper, tested on a small network and real data: ``python -m lars_array demo``.

A seven-layer perceptron is trained on handwritten digits in a plain NumPy loop, in small and in large batches, with
SGD, SGD with clipped gradients and LARS. Learning rates are chosen on a validation set; the reported accuracies are
measured on a test set. A second, smaller experiment starts from another initialisation, with which LARS is no better.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from time import perf_counter


def main(quick: bool, seed: int, out: Path) -> int:
    """Run the demo.

    Parameters
    ----------
    quick : bool
        Whether to run a small version that takes a few seconds and is less conclusive.
    seed : int
        Seed of all random numbers; at least 0.
    out : pathlib.Path
        The folder for the figure and the numbers; created if it does not exist.

    Returns
    -------
    int
        Exit code: 0, 2 for an invalid argument, 130 after Ctrl-C.
    """
    if seed < 0:
        return _refuse(f"The seed must be at least 0, got {seed}.")
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()  # Fail now rather than after the training.
        files = _run(quick, seed)
        for name, content in files.items():
            _write(out / name, content)
            print(f"Written: {out / name}")
    except OSError as error:
        return _refuse(f"Cannot write to {out}: {error.strerror}.")
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130
    return 0


def _run(quick: bool, seed: int) -> dict[str, bytes]:
    """Train, print the results, and return the files to write."""
    # Imported here because worker processes import this package too, and need neither rich nor Matplotlib.
    from rich.console import Console

    from lars_array.demo import data, plan, plot, report, summary
    from lars_array.demo.progress import train_all

    start = perf_counter()
    console = Console(highlight=False)
    plans = plan.quick(seed) if quick else plan.full(seed)
    digits = data.load(seed)
    sizes = ", ".join(map(str, plans[0].batch_sizes))
    console.print(f"SGD and LARS on {len(digits.train.y)} handwritten digits, in batches of {sizes}.")
    training = train_all(plans, digits, console)

    experiments = []
    for settings, choice in zip(plans, training.choices, strict=True):
        cells = summary.summarise(settings, choice, training.final)
        sentences = {"verdict": summary.verdict(settings, cells), "caveats": summary.caveats(settings, cells)}
        experiments.append(report.Experiment(settings, cells, sentences))
        console.print(f"\n[bold]{report.title(settings)}[/bold]")
        console.print(report.table(settings, cells))
        for sentence in sentences["verdict"] + sentences["caveats"]:
            console.print(sentence)

    png = plot.draw(plans[0], experiments[0].cells, training.tuned, training.trust_ratios)
    outcomes = {**training.tuned, **training.final}
    numbers = report.to_json(experiments, digits, outcomes, training.trust_ratios, perf_counter() - start)
    console.print(f"\n{perf_counter() - start:.0f} seconds.")
    return {"demo.png": png, "demo.json": numbers.encode()}


def _write(path: Path, content: bytes) -> None:
    """Write a file atomically, so that it is never incomplete."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _refuse(reason: str) -> int:
    print(reason, file=sys.stderr)
    return 2
