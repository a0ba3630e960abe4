"""Starts Python scripts in several processes under `mpirun`, none of which outlives its time."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

__all__ = ["TIME_LIMIT", "mpirun", "needs_mpirun"]

TIME_LIMIT = 150  # seconds of a launch, on a machine that has much else to do

ROOT = Path(__file__).resolve().parents[2]
PLACES = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


def needs_mpirun() -> None:
    """Skip a test module unless Open MPI and mpi4py are installed."""
    pytest.importorskip("mpi4py")
    if not _is_open_mpi():
        pytest.skip("no mpirun of Open MPI", allow_module_level=True)


@cache
def _is_open_mpi() -> bool:
    command = shutil.which("mpirun", path=PLACES)
    if command is None:
        return False
    return "Open MPI" in subprocess.run([command, "--version"], capture_output=True, text=True, timeout=60).stdout


def mpirun(processes: int, script: Path, *arguments: Any, options: tuple[str, ...] = ()) -> Any:
    """Run a script and return the finished process, with its output as text.

    Parameters
    ----------
    processes : int
        How many run it.
    script : Path
        The script. mpirun ends its processes after `TIME_LIMIT`.
    *arguments : object
        Of the script.
    options : tuple of str
        Of mpirun.
    """
    command = [shutil.which("mpirun", path=PLACES), "--allow-run-as-root", "--oversubscribe", "--bind-to", "none"]
    command += ["--timeout", TIME_LIMIT, *options, "-n", processes, sys.executable]
    command += ["-m", "mpi4py", script, *arguments]  # where one process raises, mpi4py ends all
    one_thread = dict.fromkeys(("LARS_ARRAY_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    paths = os.pathsep.join([str(ROOT), str(ROOT / "adapters"), str(ROOT / "tests" / "support")])
    environment = os.environ | one_thread | {"PYTHONPATH": paths}
    return subprocess.run(
        [str(x) for x in command], capture_output=True, text=True, env=environment, timeout=TIME_LIMIT + 30
    )
