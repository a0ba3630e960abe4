"""What ``import lars_array`` brings along, and what it costs."""

import importlib.metadata
import os
import statistics
import subprocess
import sys

import pytest

OPTIONAL = ["cupy", "jax", "matplotlib", "numba", "rich", "scipy", "sklearn", "torch"]


# An installed package is compiled; so must be the one that is measured.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def python(script):
    command = [sys.executable, "-c", script]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=ENVIRONMENT).stdout


def test_import_brings_no_other_library():
    installed = importlib.metadata.packages_distributions()
    assert {"jax", "torch", "sklearn"} <= set(installed), "their absence would prove nothing"
    loaded = python("import sys, lars_array; print(*sys.modules)").split()
    assert [name for name in OPTIONAL if name in loaded] == []


def test_version_is_the_installed_one():
    shown = python("import lars_array; print(lars_array.__version__)")
    assert shown.strip() == importlib.metadata.version("lars-array")


def test_import_costs_at_most_a_fifth_more_than_numpy():
    """Other processes only ever make an import slower: one quiet attempt out of three is proof."""
    ratios = []
    for _ in range(3):
        ratios.append(cost_over_numpy(rounds=9))
        if ratios[-1] <= 1.2:
            return
    pytest.fail(f"import lars_array took {min(ratios):.2f} times as long as import numpy, at most 1.2 is allowed")


def cost_over_numpy(rounds):
    # Interleaved, so that a slow moment falls on both; the round before fills the caches.
    seconds = [(import_seconds("lars_array"), import_seconds("numpy")) for _ in range(rounds + 1)][1:]
    ours, numpys = zip(*seconds, strict=True)
    return statistics.median(ours) / statistics.median(numpys)


def import_seconds(module):
    script = f"import time; start = time.perf_counter(); import {module}; print(time.perf_counter() - start)"
    return float(python(script))
