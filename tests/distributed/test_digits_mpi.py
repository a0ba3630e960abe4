"""The example that trains over MPI processes."""

from __future__ import annotations

import re
from pathlib import Path

import launch
import pytest

launch.needs_mpirun()
pytest.importorskip("sklearn")

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "digits_mpi.py"


def test_accuracy_is_the_same_over_four_processes_and_momentum_a_fourth() -> None:
    found = {}
    for processes in (1, 4):
        run = launch.mpirun(processes, EXAMPLE)
        text = re.fullmatch(r"test accuracy (0\.\d{4}), (\d+) bytes of momentum here\n", run.stdout)
        assert run.returncode == 0 and text, run.stderr
        found[processes] = text[1], int(text[2])
    (accuracy, momentum), (accuracy_of_four, momentum_of_one) = found.values()
    assert float(accuracy) > 0.95
    assert accuracy_of_four == accuracy
    assert momentum <= 4 * momentum_of_one < momentum + 4 * 8
