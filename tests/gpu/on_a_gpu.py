"""What needs a GPU: the tests marked so, NVIDIA's compute-sanitizer over some of them, and the benchmark.

``make gpu`` runs this under the interpreter in PYTHON, with what that has: nothing is installed. Arguments choose
parts: tests, sanitizers, benchmark; those behind ``--`` are for ``python -m benchmarks gpu``.
"""

from __future__ import annotations

import glob
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("tests", "sanitizers", "benchmark")

NEEDED = {
    "numpy": "numpy",
    "array_api_compat": "array-api-compat",
    "cupy": "cupy-cuda12x or cupy-cuda13x",
    "pytest": "pytest",
    "hypothesis": "hypothesis",
}
WELCOME = {"torch": "torch with CUDA", "ml_dtypes": "ml-dtypes", "jax": "jax with CUDA", "optax": "optax"}
WELCOME |= {"timm": "timm", "torch_optimizer": "torch_optimizer"}

# Sizes and shapes of all kinds, and every kernel; not what is about time.
SANITIZED = "on_the_gpu and not ten_thousand or bfloat16"


def main(arguments: list[str]) -> int:
    """Return 0 if all that was asked for went well, 2 if it could not be tried."""
    parts, _, options = " ".join(arguments).partition("--")
    chosen = parts.split() or list(PARTS)
    unknown = [part for part in chosen if part not in PARTS]
    if unknown:
        print(f"parts are {', '.join(PARTS)}; got {unknown[0]!r}", file=sys.stderr)
        return 2
    missing = [package for module, package in NEEDED.items() if find_spec(module) is None]
    if missing:
        print(f"{sys.executable} lacks {', '.join(missing)}; nothing is installed here", file=sys.stderr)
        return 2
    import cupy

    if not cupy.cuda.is_available():
        print("there is no CUDA device", file=sys.stderr)
        return 2
    absent = [package for module, package in WELCOME.items() if find_spec(module) is None]
    if absent:
        print(f"without {', '.join(absent)}: what needs them is skipped")
    results = {}
    for part in PARTS:
        if part in chosen:
            results[part] = {"tests": tests, "sanitizers": sanitizers}.get(part, lambda: benchmark(options.split()))()
    for part, failures in results.items():
        print(f"{part}: {'; '.join(failures) if failures else 'passed'}")
    return int(any(results.values()))


def environment(**more: str) -> dict[str, str]:
    """Return the environment, in which the packages are found where they lie, and no GPU is a failure."""
    known = [str(ROOT), str(ROOT / "adapters"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(known), "LARS_REQUIRE_GPU": "1"} | more


def marked() -> list[str]:
    """Return the files with tests that need a GPU: the others may need packages that are not here."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(path.relative_to(ROOT)) for path in files if "pytest.mark.gpu" in path.read_text(encoding="utf-8")]


def run(command: list[str], **more: str) -> bool:
    print("+", *command, flush=True)
    return subprocess.run(command, cwd=ROOT, env=environment(**more), check=False).returncode == 0


def tests() -> list[str]:
    """Run all tests that are marked."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-ra", "-p", "no:cacheprovider", *marked()]
    return [] if run(command) else ["failed"]


def sanitizer() -> str | None:
    """Return where compute-sanitizer is."""
    folders = [
        *filter(None, [os.environ.get("CUDA_PATH"), os.environ.get("CUDA_HOME")]),
        *glob.glob("/usr/local/cuda*"),
    ]
    found = [shutil.which("compute-sanitizer"), *(shutil.which("compute-sanitizer", path=f"{x}/bin") for x in folders)]
    return next(filter(None, found), None)


def sanitizers() -> list[str]:
    """Run the kernels under memcheck and racecheck."""
    tool = sanitizer()
    if tool is None:
        return [
            "compute-sanitizer is not there: it comes with the CUDA toolkit; looked in PATH and /usr/local/cuda*/bin"
        ]
    pytest = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/gpu/test_kernel.py"]
    failures = []
    for name in ("memcheck", "racecheck"):
        options = ["--tool", name, "--error-exitcode", "9", "--print-limit", "20"]
        if not run([tool, *options, *pytest, "-k", SANITIZED], LARS_WITHOUT_POOL="1"):
            failures.append(f"{name} failed")
    return failures


def benchmark(options: list[str]) -> list[str]:
    """Measure."""
    return [] if run([sys.executable, "-m", "benchmarks", "gpu", *options]) else ["failed"]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
