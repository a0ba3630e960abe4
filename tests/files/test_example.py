"""The example resumes bit for bit: a run that was stopped, and one that was killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from assertions import assert_same

from lars_array import load

pytest.importorskip("sklearn")
ALONE = os.environ | {"OMP_NUM_THREADS": "1"}  # the matrices are small
EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "digits_numpy.py"


def run(path: Path, *arguments: str) -> str:
    command = [sys.executable, str(EXAMPLE), str(path), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=ALONE)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    path = tmp_path_factory.mktemp("whole") / "run.safetensors"
    return path, run(path)


def assert_same_run(path: Path, printed: str, whole: tuple[Path, str]) -> None:
    """Two runs have ended with the same bits."""
    assert_same(load(path), load(whole[0]))
    assert printed.splitlines()[-1] == whole[1].splitlines()[-1]


def test_a_run_that_was_stopped(tmp_path: Path, whole: tuple[Path, str]) -> None:
    path = tmp_path / "run.safetensors"
    run(path, "--stop-after", "7")
    assert load(path).metadata == {"epoch": 7}
    printed = run(path)
    assert printed.startswith(f"{path} is of epoch 7\n")
    assert_same_run(path, printed, whole)
    assert float(printed.split("test accuracy ")[1].split()[0]) > 0.9


def test_a_run_that_was_killed(tmp_path: Path, whole: tuple[Path, str]) -> None:
    path = tmp_path / "run.safetensors"
    process = subprocess.Popen([sys.executable, str(EXAMPLE), str(path)], stdout=subprocess.DEVNULL, env=ALONE)
    end = time.monotonic() + 60
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    epoch = load(path).metadata["epoch"]
    printed = run(path)
    assert printed.startswith(f"{path} is of epoch {epoch}\n")
    assert_same_run(path, printed, whole)
