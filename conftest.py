"""Tests of what is not installed are skipped, and older releases are given the names that tests know.

Not in `tests`, since what is tested is also in the packages and in the documentation.
"""

import functools
import importlib
import importlib.metadata
import importlib.util
import re
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

# What tests may do without. They need NumPy, array_api_compat, pytest and Hypothesis.
_OPTIONAL = (
    "array_api_strict cupy cupyx equinox expecttest flax hatchling jax jaxlib lightning llvmlite matplotlib ml_dtypes "
    "mpi4py numba optax pytorch_optimizer rich scipy sklearn timm torch torch_optimizer"
).split()


def _version(library: str) -> tuple[int, ...]:
    """Return the first two numbers of a version."""
    return tuple(map(int, importlib.metadata.version(library).split(".")[:2]))


@functools.cache
def _is_lacking(library: str) -> bool:
    try:
        return library in _OPTIONAL and importlib.util.find_spec(library) is None
    except ImportError:
        return True


# pytest would leave behind what it has imported of these in part.
_NEEDED_BY = {"jax": "adapters/lars_jax/*", "torch": "adapters/lars_torch/*", "numba": "lars_array/kernels/compiled/*"}
collect_ignore_glob = [files for library, files in _NEEDED_BY.items() if _is_lacking(library)]
collect_ignore_glob += ["tests/clients/*", "docs/_build/*"]  # need an environment of their own; copies of the examples
collect_ignore_glob.append("tests/distributed/scripts/*")  # which run on several processes

if not _is_lacking("jax") and _version("jax") < (0, 8):
    jax = importlib.import_module("jax")
    jax.enable_x64 = importlib.import_module("jax.experimental").enable_x64  # its name until then


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, Any, Any]:
    return _skipped_for_lack((yield), collector.path)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    return _skipped_for_lack((yield), item.path)


def _skipped_for_lack(report: Any, path: Path) -> Any:
    """Return a report as one of a skip if what failed lacks an optional library, perhaps in another process."""
    text = str(report.longrepr) if report.failed else ""
    reasons = [f"no {name}" for name in re.findall(r"No module named '?(\w+)", text) if _is_lacking(name)]
    if "one of the params is tuple" in text and _version("torch") < (2, 6):
        reasons.append("torch takes named parameters since 2.6")
    if reasons:
        report.outcome, report.longrepr = "skipped", (str(path), 0, f"Skipped: {reasons[0]}")
    return report
