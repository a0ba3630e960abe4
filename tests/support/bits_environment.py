"""What bits depend on beside the library."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

__all__ = ["environment", "other_environment", "settings_of"]

PACKAGES = ("numpy", "numba", "llvmlite", "torch", "jax", "jaxlib", "ml_dtypes")
SETTINGS = ("NPY_DISABLE_CPU_FEATURES", "NUMBA_CPU_NAME", "OPENBLAS_CORETYPE", "XLA_FLAGS")


def environment() -> dict[str, Any]:
    """Return processor, compiler, versions, and settings."""
    try:
        info = Path("/proc/cpuinfo").read_text()
    except OSError:
        info = ""
    facts = {key: re.search(rf"^{key}\s*: (.*)$", info, re.MULTILINE) for key in ("model name", "flags")}
    command = ["g++", "-dumpfullversion"]
    gcc = (
        subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        if shutil.which("g++")
        else None
    )
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        **{key: match[1].strip() if match else None for key, match in facts.items()},
        "g++": gcc,
        "settings": {name: os.environ.get(name) for name in SETTINGS},
        **versions,
    }


def other_environment(record: Mapping[str, Any]) -> list[str]:
    """Return in what this machine is another than that of a record, but for settings."""
    here, there = environment(), record["environment"]
    return [f"{x} is {here.get(x)}, not {there[x]}" for x in there if x != "settings" and here.get(x) != there[x]]


def settings_of(record: Mapping[str, Any]) -> dict[str, str]:
    """Return the variables of a process that has the settings of a record."""
    settings = record["environment"]["settings"]
    kept = {name: value for name, value in os.environ.items() if name not in settings}
    return kept | {name: value for name, value in settings.items() if value is not None}
