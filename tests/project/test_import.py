"""What ``import lars_array`` brings along, and what it costs."""

import importlib.metadata
import os
import statistics
import subprocess
import sys

import pytest

OPTIONAL = ["cupy", "jax", "matplotlib", "mpi4py", "numba", "rich", "scipy", "sklearn", "torch"]


# An installed package is compiled; so must be the one that is measured.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def python(script):
    command = [sys.executable, "-c", script]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=ENVIRONMENT).stdout


def test_import_brings_no_other_library():
    if {"jax", "torch", "sklearn"} - set(importlib.metadata.packages_distributions()):
        pytest.skip("the absence of what is not installed proves nothing")
    loaded = python("import sys, lars_array; print(*sys.modules)").split()
    assert [name for name in OPTIONAL if name in loaded] == []


def test_the_conformance_kit_is_imported_by_nobody_and_needs_numpy_only():
    loaded = python("import sys, lars_array, lars_array.optimizer; print(*sys.modules)").split()
    assert [name for name in loaded if name.startswith("lars_array.testing")] == []
    loaded = python("import sys, lars_array.testing; print(*sys.modules)").split()
    assert "lars_array.testing.wrappers" in loaded
    assert [name for name in [*OPTIONAL, "optax", "pytest"] if name in loaded] == []


def test_torch_brings_nothing_of_several_processes():
    pytest.importorskip("torch")
    loaded = python("import sys, lars_torch; print(*sys.modules)").split()
    several = ["cupy", "mpi4py", "torch.distributed.fsdp", "torch.distributed.tensor"]
    assert [name for name in several if name in loaded] == []


@pytest.mark.parametrize(
    ("package", "lacking", "extra"),
    [("lars_torch", "torch", "torch"), ("lars_jax", "jax", "jax"), ("lars_jax", "optax", "jax")],
)
def test_an_adapter_without_its_library_says_what_to_install(package, lacking, extra):
    if lacking == "optax":
        pytest.importorskip("jax")
    script = f"""
import sys
sys.modules[{lacking!r}] = None  # as if it were not installed
try:
    import {package}
except ModuleNotFoundError as error:
    print(error.name, error, sep=": ")
"""
    message = f"{lacking}: {package} needs {lacking}, which is not installed: pip install 'lars-array[{extra}]'\n"
    assert python(script) == message


@pytest.mark.parametrize(("package", "library"), [("lars_torch", "torch"), ("lars_jax", "jax")])
def test_another_module_that_an_adapter_lacks_is_named_as_it_is(package, library):
    pytest.importorskip(library)
    script = f"""
import sys
sys.modules["lars_array.layers"] = None
try:
    import {package}
except ModuleNotFoundError as error:
    print(error.name, error, sep=": ")
"""
    name = "lars_array.layers"
    assert python(script) == f"{name}: import of {name} halted; None in sys.modules\n"


def test_version_is_the_installed_one():
    shown = python("import lars_array; print(lars_array.__version__)")
    assert shown.strip() == importlib.metadata.version("lars-array")


def test_import_costs_at_most_a_fifth_more_than_numpy():
    ours, numpys = zip(*(import_seconds() for _ in range(12)), strict=True)
    # Both are imported by one process, so that a slow moment falls on both. The first two rounds fill the caches.
    ratio = 1 + statistics.median(a / b for a, b in zip(ours[2:], numpys[2:], strict=True))
    assert ratio <= 1.2, f"import lars_array took {ratio:.3f} times as long as import numpy"


def import_seconds():
    script = """
import time
start = time.perf_counter()
import numpy
middle = time.perf_counter()
import lars_array
print(time.perf_counter() - middle, middle - start)
"""
    return tuple(map(float, python(script).split()))


def test_an_unknown_name_is_named():
    import lars_array

    with pytest.raises(AttributeError, match=r"^module 'lars_array' has no attribute 'Lars'$"):
        _ = lars_array.Lars
