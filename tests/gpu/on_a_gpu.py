"""What needs a GPU, in parts, in ten minutes: what has not been run on one yet comes first.

``make gpu`` runs this under the interpreter in PYTHON, with what that has: nothing is installed. Arguments choose
parts, which are run in the order of `PARTS`; those behind ``--`` are for ``python -m benchmarks gpu``. What each part
prints goes to a file in the folder of ``--out``, beside the figures and ``parts.json``; its end is printed here. A part
that takes longer than its share is stopped, and the next begins.
"""

from __future__ import annotations

import argparse
import contextlib
import glob
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 600  # for all parts; each has its own limit, or what is left

# The tests of a part and the seconds that it may take; or the case of the benchmark. "graphs" are in several files.
NEW = {
    "jax": (["tests/gpu/test_jax.py"], 100),
    "graphs": (["tests/gpu", "-k", "graph or captured or replay"], 60),
    "sharding": (["tests/gpu/test_collectives.py"], 50),
    "one-launch": (["tests/gpu/test_one_launch.py"], 60),
}
MEASURED = {"resnet50": 90, "vit-l": 80, "1b": 100}
OTHERS = {"tests": 90, "sanitizers": 300}
PRINTED = 25  # lines at the end of what a part has printed
NOTHING = "nothing was run"  # by pytest, since all of it is skipped
PARTS = {**{name: seconds for name, (_, seconds) in NEW.items()}, **MEASURED, **OTHERS}

# Who is measured beside lars_array: the others need minutes to compile.
CONTESTANTS = ("lars", "optax", "torch_optimizer", "torch SGD")

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
SANITIZED = "on_the_gpu and not ten_thousand or bfloat16 or three_launches"
SANITIZERS = ("memcheck", "racecheck")


def main(arguments: list[str]) -> int:
    """Return 0 if all that was asked for went well, 2 if it could not be tried."""
    border = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(prog="make gpu", description=__doc__)
    parser.add_argument("parts", nargs="*")
    # Not benchmarks/results: what is there was measured with all contestants.
    parser.add_argument(
        "--out", type=Path, default=ROOT / "gpu-results", help="by default gpu-results, which git ignores"
    )
    asked = parser.parse_args(arguments[:border])
    out, options = asked.out.resolve(), arguments[border + 1 :]
    unknown = [part for part in asked.parts if part not in PARTS]
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
    chosen = [part for part in PARTS if not asked.parts or part in asked.parts]
    results = run_parts(chosen, lambda part: commands(part, out, options), out)
    return int(any(result not in ("passed", NOTHING) for result in results.values()))


def commands(part: str, out: Path, options: list[str]) -> list[list[str]]:
    """Return what a part runs."""
    pytest = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-ra", "-p", "no:cacheprovider"]
    if part in NEW:
        return [[*pytest, *NEW[part][0]]]
    if part in MEASURED:
        measure = [sys.executable, "-m", "benchmarks", "gpu", "--case", part, "--only", *CONTESTANTS]
        return [[*measure, "--out", str(out), *options]]
    if part == "tests":
        done = [arguments[0] for arguments, _ in NEW.values()]
        return [[*pytest, *(name for name in marked() if name not in done)]]
    tool = ["env", "LARS_WITHOUT_POOL=1", sanitizer()]
    some = [*pytest, "-x", "tests/gpu/test_kernel.py", "tests/gpu/test_one_launch.py", "-k", SANITIZED]
    return [[*tool, "--tool", name, "--error-exitcode", "9", "--print-limit", "20", *some] for name in SANITIZERS]


def run_parts(chosen: list[str], commands_of: Any, out: Path, seconds: float = SECONDS) -> dict[str, str]:
    """Run parts, and return what became of each; that of those that are over stays, whatever happens to later ones."""
    results: dict[str, str] = {}
    end = time.monotonic() + seconds
    out.mkdir(parents=True, exist_ok=True)
    for part in chosen:
        start = time.monotonic()
        log = out / f"{part}.log"
        results[part] = run(commands_of(part), min(start + PARTS[part], end), log)
        print(*log.read_text(errors="replace").splitlines()[-PRINTED:], sep="\n")
        print(f"{part}: {results[part]}, {time.monotonic() - start:.0f} s", flush=True)
        (out / "parts.json").write_text(json.dumps(results, indent=2) + "\n")
    print("\n".join(["", *(f"{part}: {result}" for part, result in results.items())]))
    return results


def run(commands: list[list[str]], end: float, log: Path) -> str:
    """Run commands until one fails or the time is up, and return which it was."""
    with log.open("w") as file:
        for command in commands:
            left = end - time.monotonic()
            if left <= 0:
                return "not run, the time was up"
            print("+", *command, file=file, flush=True)
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment(), stdout=file, stderr=file, start_new_session=True
            )
            try:
                status = process.wait(timeout=left)
                if status != 0:
                    return NOTHING if status == 5 and "pytest" in command else f"failed: {status}"
            except subprocess.TimeoutExpired:
                return "stopped, the time was up"
            finally:  # with what it has started
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return "passed"


def environment() -> dict[str, str]:
    """Return the environment, in which the packages are found where they lie, and no GPU is a failure."""
    known = [str(ROOT), str(ROOT / "adapters"), *filter(None, [os.environ.get("PYTHONPATH")])]
    more = {"LARS_REQUIRE_GPU": "1", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # else JAX takes most of the memory
    return os.environ | {"PYTHONPATH": os.pathsep.join(known)} | more


def marked() -> list[str]:
    """Return the files with tests that need a GPU: the others may need packages that are not here."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(path.relative_to(ROOT)) for path in files if "pytest.mark.gpu" in path.read_text(encoding="utf-8")]


def sanitizer() -> str:
    """Return where compute-sanitizer is, which comes with the CUDA toolkit."""
    folders = [
        *filter(None, [os.environ.get("CUDA_PATH"), os.environ.get("CUDA_HOME")]),
        *glob.glob("/usr/local/cuda*"),
    ]
    found = [shutil.which("compute-sanitizer"), *(shutil.which("compute-sanitizer", path=f"{x}/bin") for x in folders)]
    return next(filter(None, found), "compute-sanitizer")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
