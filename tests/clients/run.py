"""Runs each client in a process of its own, and writes RESULTS.md: ``python tests/clients/run.py [name ...]``."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
CLIENTS = [path.stem.removeprefix("with_") for path in sorted(HERE.glob("with_*.py"))]
SHOWN = ("torch", "jax", "numpy", "numba")


def results_of(client: str) -> list[dict[str, Any]]:
    """Run all checks of a client in this process."""
    module = importlib.import_module(f"with_{client}")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in module.LIBRARIES)
    found = []
    for name, check in list(vars(module).items()):
        if not name.startswith("check_"):
            continue
        start = time.perf_counter()
        try:
            result = check() or "passed"
        except Exception as error:
            traceback.print_exc()
            result = f"FAILED: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        seconds = time.perf_counter() - start
        what = name.removeprefix("check_").replace("_", " ")
        found.append({"versions": versions, "check": what, "result": result, "seconds": round(seconds, 1)})
    return found


def run(client: str) -> list[dict[str, Any]]:
    """Run a client in another process."""
    command = [sys.executable, __file__, "--only", client]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=HERE, env=environment, text=True, stdout=subprocess.PIPE)
    lines = [line for line in done.stdout.splitlines() if line.startswith("[{")]
    if lines:
        rows: list[dict[str, Any]] = json.loads(lines[-1])
        return rows
    return [{"versions": client, "check": "all", "result": f"FAILED: exit status {done.returncode}", "seconds": 0}]


def table(rows: list[dict[str, Any]]) -> str:
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in SHOWN)
    lines = [
        f"| {row['versions']} | {row['check']} | {row['result'].replace('|', '/')} | {row['seconds']} |" for row in rows
    ]
    return "\n".join(
        [
            "# Libraries that users combine LARS with",
            "",
            f"Written by `make clients`: short trainings on a CPU. Python {platform.python_version()}, {versions}.",
            "",
            "| library | check | result | seconds |",
            "|---|---|---|---|",
            *lines,
            "",
        ]
    )


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["--only"]:
        print("\n" + json.dumps(results_of(arguments[1])))
        return 0
    rows = []
    for client in arguments or CLIENTS:
        for row in run(client):
            rows.append(row)
            print(f"{row['versions']}: {row['check']}: {row['result']} ({row['seconds']} s)", flush=True)
    if not arguments:
        (HERE / "RESULTS.md").write_text(table(rows))
    return int(any(row["result"].startswith("FAILED") for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
