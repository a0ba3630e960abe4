"""What the figures depend on: the machine, and the versions of what was measured. No name of host, user or path."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import re
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

__all__ = ["ROOT", "available_bytes", "commit", "cores", "give_back", "machine", "plain", "used_by_others", "versions"]

ROOT = Path(__file__).resolve().parents[1]

DISTRIBUTIONS = """lars-array numpy array-api-compat numba llvmlite torch torch_optimizer lightning-flash timm
    pytorch_optimizer jax jaxlib optax""".split()

ENVIRONMENT = """LARS_ARRAY_THREADS OMP_NUM_THREADS OMP_WAIT_POLICY MKL_NUM_THREADS OPENBLAS_NUM_THREADS
    OPENBLAS_CORETYPE NUMBA_NUM_THREADS NUMBA_CPU_NAME NUMBA_DISABLE_JIT XLA_FLAGS THP_MEM_ALLOC_ENABLE""".split()


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine() -> dict[str, Any]:
    """Return processor, cores, caches, memory, and the settings that change how fast they are."""
    return {
        "processor": _processor(),
        "cores": cores(),
        "caches": _caches(),
        "memory_gib": round(_meminfo("MemTotal") / 2**30),
        "system": f"{platform.system()} {platform.machine()}",
        "huge_pages": _setting("/sys/kernel/mm/transparent_hugepage/enabled"),
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
    }


def versions() -> dict[str, str]:
    """Return the versions of Python and of what is installed of the contestants."""
    found = {"python": platform.python_version()}
    for name in DISTRIBUTIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def commit(checkout: Path = ROOT) -> str | None:
    """Return the commit that was measured, with "-dirty" if files but results differ from it; None outside of git."""
    try:
        head = _git(checkout, "rev-parse", "--short=12", "HEAD")
        return f"{head}-dirty" if _git(checkout, "status", "--porcelain", "--", ".", ":!benchmarks/results") else head
    except (OSError, subprocess.CalledProcessError):
        return None


def plain(error: BaseException | str) -> str:
    """Return the first line of a message without the folders of the paths in it."""
    text = str(error).strip() or type(error).__name__
    return re.sub(r"(?<![\w.])(?:~|[A-Za-z]:)?[/\\](?:[\w.+@%~-]+[/\\])+", "", text.splitlines()[0])


def available_bytes() -> int:
    """Return how much memory can be had without swapping."""
    return _meminfo("MemAvailable")


def give_back() -> None:
    """Give back to the system what is not used any more, also where it lies in the middle of the heap."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):  # not glibc
        pass


def used_by_others() -> float:
    """Return the seconds that cores were busy and not with this process, since some time; 0 where that is not known.

    A step whose threads wait for each other takes several times as long if another process has one of the cores.
    """
    for line in _lines("/proc/stat"):
        if line.startswith("cpu "):
            user, nice, system, _, _, irq, softirq, steal = (int(word) for word in line.split()[1:9])
            busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
            return busy - time.process_time()
    return 0.0


def _git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


def _processor() -> str:
    found: dict[str, str] = {}
    for line in _lines("/proc/cpuinfo"):
        key, _, value = line.partition(":")
        found.setdefault(key.strip(), value.strip())
    if "model name" not in found:
        return platform.processor() or platform.machine()
    numbers = [f"{key} {found[key]}" for key in ("cpu family", "model", "stepping") if key in found]
    return f"{found['model name']} ({', '.join(numbers)})"


def _caches() -> dict[str, str]:
    """Return the caches that the first core sees, by level."""
    found = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        if kind != "Instruction":
            found[f"L{level}"] = size
    return found


def _meminfo(key: str) -> int:
    """Return an entry of /proc/meminfo in bytes; where there is none, what the machine has."""
    for line in _lines("/proc/meminfo"):
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _setting(path: str) -> str | None:
    """Return the word in brackets."""
    match = re.search(r"\[(\w+)\]", " ".join(_lines(path)))
    return match and match[1]


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
