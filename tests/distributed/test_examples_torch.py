"""The example trains the same network on one process and on several."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("sklearn")
if not torch.distributed.is_available() or not torch.distributed.is_gloo_available() or torch.__version__ < (2, 7):
    pytest.skip("needs gloo, and fully_shard on a CPU, which is there since torch 2.7", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "digits_torch.py"
WAYS = {"one": 1, "ddp": 2, "fsdp": 2, "hsdp": 2}


@pytest.mark.parametrize("way", WAYS)
def test_the_example_trains(way: str) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(WAYS[way])]
    command = [sys.executable, *(launcher if way != "one" else []), str(SCRIPT), way]
    path = os.pathsep.join([str(ROOT), str(ROOT / "adapters")])
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=120, check=False
    )
    # torch with gloo may abort a process that has done all its work, at its exit.
    assert done.returncode == 0 or "terminate called without an active exception" in done.stderr, done.stderr[-3000:]
    found = re.search(rf"{way} on {WAYS[way]}: accuracy (0\.\d+)", done.stdout)
    assert found is not None and float(found[1]) > 0.97
