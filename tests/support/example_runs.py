"""Runs the scripts in examples/, each in a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

__all__ = ["EXAMPLES", "accuracy_of", "run_example"]

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = {path.stem: path for path in sorted((ROOT / "examples").glob("*.py"))}


def run_example(name: str, **environment: str) -> str:
    """Return what an example prints.

    Parameters
    ----------
    name : str
        The example, a key of `EXAMPLES`.
    **environment : str
        Variables to set beside those of this process.

    Raises
    ------
    AssertionError
        With the end of the errors that it prints, if the example fails.
    """
    paths = os.pathsep.join([str(ROOT), str(ROOT / "adapters")])
    variables = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"} | environment  # cores may be shared
    command = [sys.executable, str(EXAMPLES[name])]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def accuracy_of(name: str, **environment: str) -> float:
    """Return the test accuracy that an example prints; arguments of `run_example`."""
    printed = run_example(name, **environment)
    found = re.search(r"test accuracy (\d\.\d{4}) after 150 steps\n$", printed)
    assert found is not None, printed
    return float(found[1])
