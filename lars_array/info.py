"""Information for bug reports: versions, processors, and the kernels that are usable on this machine.

Versions come from package metadata, so no package is imported.
"""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from lars_array import kernels
from lars_array._version import __version__

_PACKAGES = (
    "numpy",
    "array-api-compat",
    "safetensors",
    "numba",
    "cupy-cuda12x",
    "cupy-cuda13x",
    "torch",
    "jax",
    "optax",
)
_SETTINGS = ("LARS_ARRAY_KERNEL", "LARS_ARRAY_THREADS", "LARS_ARRAY_CUDA", "NUMBA_CACHE_DIR")


def collect() -> dict[str, Any]:
    """Return everything that ``python -m lars_array info`` shows, ready for JSON; None for missing values."""
    return {
        "versions": {
            "lars-array": __version__,
            "python": platform.python_version(),
            **{package: _installed(package) for package in _PACKAGES},
        },
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "settings": {name: os.environ.get(name) for name in _SETTINGS},
        "kernels": [{"name": name, "usable": usable, "reason": reason} for name, usable, reason in kernels.report()],
    }


def render(collected: dict[str, Any]) -> str:
    """Return the same information as text, one line per fact."""
    lines = [f"{name:<20}{found or 'not installed'}" for name, found in collected["versions"].items()]
    lines += ["", *(f"{name:<20}{collected[name]}" for name in ("platform", "processors"))]
    lines += [f"{name:<20}{value or 'not set'}" for name, value in collected["settings"].items()]
    lines += ["", "kernels"]
    for kernel in collected["kernels"]:
        verdict = "usable" if kernel["usable"] else "not usable"
        lines.append(f"  {kernel['name']:<18}{': '.join(filter(None, (verdict, kernel['reason'])))}")
    return "\n".join(lines)


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
