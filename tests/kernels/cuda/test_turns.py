"""The blocks of one launch in all kinds of turns: no order leads to other bits, and none to a standstill."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cuda_on_cpu
import numpy as np
import pytest
from cuda_turns import survives, twins
from density import ALL, sample

pytestmark = pytest.mark.skipif(bool(cuda_on_cpu.missing()), reason=str(cuda_on_cpu.missing()))

FLOAT32 = ("float32", "float32")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cuda_on_cpu.build(tmp_path_factory.mktemp("turns"), pairs=[FLOAT32], options=cuda_on_cpu.TOGETHER)


def test_steps_have_the_bits_of_three_launches_in_random_turns(library: Path) -> None:
    assert survives(library, runs=60 if ALL else 20)


def test_steps_have_the_bits_of_three_launches_as_the_system_runs_blocks(library: Path) -> None:
    assert survives(library, as_they_come=True)


@pytest.mark.parametrize("grid", [2, 3])
def test_all_turns_with_two_changes_more_than_needed(grid: int, library: Path) -> None:
    """A block goes on until it ends or looks at a counter, but at two points, which are any."""
    with twins(library, grid, [70, 3]) as found:  # three pieces, of two layers in one unit
        assert found.step([0])
        points = found.points
        assert points > 50
        step = (1 if grid == 2 else 3) * (1 if ALL else 5)
        for first, second in itertools.combinations(range(0, points, step), 2):
            turns = np.zeros(10 * points, np.int32)
            turns[[first, second]] = 1 + first % (grid - 1), 1 + second % (grid - 1)
            assert found.step(turns), (first, second)


# What stands in one_launch.cu, and what a slip would have made of it.
SLIPS = {
    "none": ("if (turn >= plan.task_count) break;", "if (turn >= plan.task_count) break; "),
    "updates wait for nothing": ("while (peek(counter) != number) {}", "(void)peek(counter), (void)number;"),
    "updates wait for sums alone": ("plan.units[task.unit].pieces + 1);", "plan.units[task.unit].pieces);"),
    "coefficients come too early": ("== unit.pieces - 1;", "== 0;"),
    "tasks in another order": ("plan.tasks[turn];", "plan.tasks[plan.task_count - 1 - turn];"),
    "found_inf is ignored": ("bool taken = !found_inf(m);", "bool taken = true;"),
    "a task is skipped": ("turn = atomicAdd(plan.next, 1);", "turn = atomicAdd(plan.next, 1) + (blockIdx.x == 1);"),
    "committed by the first block that ends": ("== (int)gridDim.x - 1;", "== 0;"),
    "counters are left": ("plan.measured[k] = 0;", ""),
    "the count of blocks is left": ("atomicExch(plan.ended, 0);", ""),
    "the next task is left": ("*plan.next = 0;", ""),
    "coefficients count before all are there": (
        "        __syncthreads();\n    }\n    if (threadIdx.x == 0) count",
        "    }\n    if (threadIdx.x == 0) count",
    ),
    "the turn is overwritten": ("        __syncthreads();  // before `turn` is overwritten\n", ""),
    "coefficients of the first rows only": ("first += COLUMNS", "first += unit.end"),
}


USUAL_SLIPS = ["none", "updates wait for nothing", "committed by the first block that ends", "counters are left"]


@pytest.mark.parametrize("slip", sample(SLIPS, USUAL_SLIPS))
def test_a_slip_is_noticed(slip: str, tmp_path: Path) -> None:
    """Each in a process of its own, since some end it."""
    path = cuda_on_cpu.build(tmp_path, pairs=[FLOAT32], change=SLIPS[slip], options=cuda_on_cpu.TOGETHER)
    done = run(path, "runs=40")
    assert (done.returncode == 0) == (slip == "none"), done.stderr
    if slip == "tasks in another order":
        assert "no block gets any further" in done.stderr


def run(path: Path, options: str, **environment: str) -> Any:
    script = f"import sys; sys.path.insert(0, {str(cuda_on_cpu.HERE)!r}); from cuda_turns import *\n"
    script += f"sys.exit(not survives({str(path)!r}, {options}))"
    environ = os.environ | {"LARS_CUDA_ON_CPU": str(cuda_on_cpu.library())} | environment
    command = [sys.executable, "-c", script]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environ, timeout=200)


def run_under(sanitizer: str, folder: Path, change: tuple[str, str] | None, options: str, flags: Sequence[str]) -> Any:
    found = subprocess.run(["g++", f"-print-file-name=lib{sanitizer}.so"], capture_output=True, text=True, check=True)
    if not Path(found.stdout.strip()).is_absolute():
        pytest.skip(f"no lib{sanitizer}")
    path = cuda_on_cpu.build(folder, pairs=[FLOAT32], change=change, options=(*cuda_on_cpu.TOGETHER, "-g", *flags))
    settings = {"ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0", "TSAN_OPTIONS": "halt_on_error=1"}
    done = run(path, options, LD_PRELOAD=found.stdout.strip(), **settings)
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("this system's addresses are not those that ThreadSanitizer expects")
    return done


FENCES = {
    "none": None,
    "before counting": ("    __threadfence();\n    int before", "    int before"),
    "behind counting": ("    __threadfence();\n    return before", "    return before"),
    "behind waiting": ("{}\n    __threadfence();", "{}"),
}


@pytest.mark.parametrize("fence", sample(FENCES, ["none", "behind waiting"]))
def test_threads_race_where_a_fence_is_missing(fence: str, tmp_path: Path) -> None:
    """ThreadSanitizer, which is told what fences are."""
    done = run_under("tsan", tmp_path, FENCES[fence], "runs=5, as_they_come=True", ["-fsanitize=thread"])
    assert (done.returncode == 0) == (fence == "none"), done.stderr
    assert ("ThreadSanitizer: data race" in done.stderr) == (fence != "none")


@pytest.mark.parametrize(("change", "message"), [
    (None, ""),
    (("for (int k = threadIdx.x; k < plan.unit_count;", "for (int k = threadIdx.x; k <= plan.unit_count;"), "overflow"),
])  # fmt: skip
def test_blocks_stay_within_their_tables(change: tuple[str, str] | None, message: str, tmp_path: Path) -> None:
    done = run_under("asan", tmp_path, change, "runs=12", cuda_on_cpu.SANITIZE)
    assert (done.returncode == 0) == (change is None), done.stderr
    assert message in done.stderr
