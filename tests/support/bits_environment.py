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

__all__ = ["environment", "other_environment"]

PACKAGES = ("numpy", "numba", "llvmlite", "torch", "jax", "jaxlib", "ml_dtypes")


def environment() -> dict[str, Any]:
    """Return processor, compiler, and versions."""
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
        **versions,
    }


def other_environment(record: Mapping[str, Any]) -> list[str]:
    """Return in what this machine is another than that of a record."""
    here, there = environment(), record["environment"]
    return [f"{key} is {here.get(key)}, not {there[key]}" for key in there if here.get(key) != there[key]]
