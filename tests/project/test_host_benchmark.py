"""``python -m benchmarks host``: in processes of their own, since CuPy is replaced in parts to the end of one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import host

pytest.importorskip("cupy")

ROOT = Path(__file__).parents[2]

# Prints the launches of a step over three arrays, for all that may be new.
LAUNCHES = """
import json
import numpy as np
from benchmarks import host, no_device
launched = []
no_device._Module.get_function = lambda self, name: lambda grid, block, arguments: launched.append(name)
found = {}
for name, build in host.CONTESTANTS.items():
    for kind, changes in host.KINDS.items():
        run = build(*([np.zeros(shape, np.float32) for shape in [(7, 3), (5,), (40, 40)]] for _ in "pg"), **changes)
        launched.clear()
        run.before()
        run.step()
        found[f"{name}; {kind}"] = launched[:]
print(json.dumps(found))
"""


def printed(*command: str) -> str:
    return subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_a_step_launches_what_it_would_on_a_device() -> None:
    found: dict[str, list[str]] = json.loads(printed("-c", LAUNCHES))
    pair = "float32_float32"
    stages = [f"sums_{pair}", "coefficients", f"apply_{pair}"]
    assert len(found) == len(host.CONTESTANTS) * len(host.KINDS)
    for name, launched in found.items():
        addresses = ["write_pointers"] if "; new gradients" in name else []
        assert launched == ([] if "SGD" in name else [*addresses, *stages]), name


def test_results_are_written(tmp_path: Path) -> None:
    path = tmp_path / "host.json"
    text = printed("-m", "benchmarks", "host", "--rounds", "2", "--json", str(path))
    document: dict[str, Any] = json.loads(path.read_text())
    assert (document["arrays"], document["rounds"]) == (161, 2) and "cupy" in document["versions"]
    assert list(document["contestants"]) == list(host.CONTESTANTS)
    for name, own in document["contestants"].items():
        assert name in text and list(own) == list(host.KINDS)
        assert all(row["median_ms"] > 0 and row["ratio"]["median"] > 0 for row in own.values())
    assert all(row["ratio"]["median"] == 1 for row in document["contestants"][host.SGD].values())
