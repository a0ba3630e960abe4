"""That the checks of the CUDA kernels can fail: wrong indices, missing barriers; and what sanitizers say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import cuda_on_cpu
import pytest

pytestmark = pytest.mark.skipif(bool(cuda_on_cpu.missing()), reason=str(cuda_on_cpu.missing()))

FLOAT32 = ("float32", "float32")

# What stands in lars.cu, and what a slip would have made of it.
SLIPS = {
    "none": ("return all[threadIdx.x];", "return all[threadIdx.x]; "),
    "the tail is one short": ("if (k < part.end) add<THIRD>", "if (k + 1 < part.end) add<THIRD>"),
    "the tail is left out of apply": ("if (k < part.end) {", "if (false) {"),
    "pieces begin one pack late": (
        "begin = m.pieces[piece].index * array.piece;",
        "begin = m.pieces[piece].index * array.piece + (m.pieces[piece].index > 0 ? WIDTH : 0);",
    ),
    "another layer's coefficients": ("m.C + 6 * (i64)part.array.row", "m.C + 6 * (i64)(part.array.row ^ 1)"),
    "a barrier is missing": ("part[mine][lane] = s;\n    }\n    __syncthreads();", "part[mine][lane] = s;\n    }"),
    "the last piece is not summed": ("k < row.pieces; k += LANES", "k + 1 < row.pieces; k += LANES"),
    "registers of the wrong column": ("registers[next][column] = result", "registers[next][column ^ 1] = result"),
    "a step that is refused is written": ("return !m.decides || (*m.prevented == 0", "return !m.decides || (true"),
    "the buffer is not written": ("if (v != nullptr) save(v + k, vs, aligned);", ""),
}


@pytest.mark.parametrize("slip", SLIPS)
def test_a_slip_is_noticed(slip: str, tmp_path: Path) -> None:
    """Each in a process of its own, since some end it."""
    path = cuda_on_cpu.build(tmp_path, pairs=[FLOAT32], change=SLIPS[slip])
    script = f"import sys; sys.path.insert(0, {str(cuda_on_cpu.HERE)!r}); from cuda_slips import *\n"
    script += f"sys.exit(not all(is_right(Path({str(path)!r}), order) for order in (0, 1, 2)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode == 0) == (slip == "none"), done.stderr


def test_threads_that_part_at_a_barrier_are_noticed(tmp_path: Path) -> None:
    change = ("all[threadIdx.x] = mine;", "all[threadIdx.x] = mine; if (threadIdx.x == 3) return mine;")
    path = cuda_on_cpu.build(tmp_path, pairs=[FLOAT32], change=change)
    script = f"import sys; sys.path.insert(0, {str(cuda_on_cpu.HERE)!r}); from cuda_slips import *\n"
    script += f"is_right(Path({str(path)!r}), 0)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "threads wait for others that have ended" in done.stderr


def run_under_sanitizers(path: Path, *arguments: str) -> Any:
    asan = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    environment = os.environ | {
        "LD_PRELOAD": asan.stdout.strip(),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "LARS_CUDA_ON_CPU": str(path),
    }
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=cuda_on_cpu.HERE)


def test_sanitizers_find_nothing(tmp_path: Path) -> None:
    """Address and undefined-behaviour sanitizers, over the tests of the logic that are no trajectories."""
    pytest.importorskip("ml_dtypes")
    path = cuda_on_cpu.build(tmp_path, options=cuda_on_cpu.SANITIZE)
    chosen = "forwards or types or structures or half or depend"
    file = str(Path(__file__).with_name("test_logic.py"))
    done = run_under_sanitizers(path, "-m", "pytest", "-q", "-x", file, "-k", chosen, "-p", "no:cacheprovider", "-s")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("whole = end - (end - begin) % WIDTH;", "whole = end;"), "AddressSanitizer: heap-buffer-overflow"),
        (("return (u64)x % alignof(Pack<T>) == 0;", "return (u64)x % 1 == 0;"), "misaligned address"),
    ],
)
def test_sanitizers_can_find_something(change: tuple[str, str], message: str, tmp_path: Path) -> None:
    path = cuda_on_cpu.build(tmp_path, pairs=[FLOAT32], options=cuda_on_cpu.SANITIZE, change=change)
    script = f"from cuda_slips import *; is_right(Path({str(path)!r}), 0, offset=1)"
    done = run_under_sanitizers(path, "-c", script)
    assert done.returncode != 0
    assert message in done.stderr
