"""Loading copies once: the peak is that of the result and of one array."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lars_array import LARS, save

MOST = 1.10  # of what is loaded

# Peaks of this process alone: of anonymous memory, since pages of a mapped file are not the process's own.
SCRIPT = """
import sys, threading, time, numpy as np
from lars_array import LARS, load
sizes = [int(x) for x in sys.argv[4:]]
params = {f"w{i}": np.full(size, 1.0) for i, size in enumerate(sizes)}
optimizer = LARS(params, lr=1.0, kernel="blocked")

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))

load(sys.argv[3], LARS({"w": np.ones(1)}, lr=1.0, kernel="blocked"))  # what is imported and allocated once
before, peak, done = anonymous(), 0, False

def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())

thread = threading.Thread(target=watch)
thread.start()
if sys.argv[1] == "whole":
    result = load(sys.argv[2])
else:
    result = load(sys.argv[2], optimizer, params=params)
done = True
thread.join()
print(peak - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="no /proc")
@pytest.mark.parametrize("way", ["whole", "into"])
def test_peak_of_memory(tmp_path: Path, way: str) -> None:
    sizes = [100_000] * 100
    params = {f"w{i}": np.full(size, 1.0) for i, size in enumerate(sizes)}
    optimizer = LARS(params, lr=0.1, momentum=0.9, kernel="blocked")
    optimizer.step({name: np.ones_like(p) for name, p in params.items()})
    save(tmp_path / "run", optimizer, params=params)
    small = LARS({"w": np.ones(1)}, lr=1.0, momentum=0.9)
    small.step({"w": np.ones(1)})
    save(tmp_path / "small", small)
    files = [str(tmp_path / "run"), str(tmp_path / "small")]
    command = [sys.executable, "-c", SCRIPT, way, *files, *map(str, sizes)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    loaded = sum(sizes) * 8 * (2 if way == "whole" else 1)  # into: the parameters are there, and buffers are made
    assert int(done.stdout) <= MOST * loaded, f"{int(done.stdout) / loaded:.2f} times what is loaded"


SOAK = """
import sys, numpy as np
from lars_array import LARS, load, save
params = {f"w{i}": np.ones(50) for i in range(20)}
optimizer = LARS(params, lr=0.1, momentum=0.9, weight_decay=0.1, kernel="blocked")
optimizer.step({n: p + 1 for n, p in params.items()})

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))

for number in range(1000):
    if number == 200:
        before = anonymous()
    save(sys.argv[1], optimizer, params=params, metadata={"number": number})
    assert load(sys.argv[1], optimizer, params=params).metadata["number"] == number
    load(sys.argv[1])
print(anonymous() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="no /proc")
def test_a_thousand_files_take_no_memory(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SOAK, str(tmp_path / "run")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert int(done.stdout) < 300_000, f"{int(done.stdout)} bytes more after 800 files"
