"""The namespaces that the tests run on, the guard of the GPU tests, and the Hypothesis profiles."""

import contextlib
import functools
import gc
import importlib
import os
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# `xp` is one namespace for a whole test: an example cannot leave it dirty for the next.
_QUIET = [HealthCheck.function_scoped_fixture]
settings.register_profile("default", deadline=None, suppress_health_check=_QUIET)
settings.register_profile("ci", deadline=None, suppress_health_check=_QUIET, derandomize=True, database=None)
settings.load_profile("ci" if "CI" in os.environ else "default")

# Workers of pytest-xdist share the cores: without a limit torch starts a thread for every core in each of them.
# LARS_ARRAY_THREADS keeps its default; tests of thread counts set it.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

# Else JAX takes most of a GPU's memory when it first looks at it, and CuPy and torch are to work there too.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


_MODULES = {
    "numpy": "numpy",
    "strict": "array_api_strict",
    "strictest": "array_api_strict",
    "torch": "array_api_compat.torch",
    "jax": "jax.numpy",
}


@pytest.fixture(params=_MODULES)
def xp(request: pytest.FixtureRequest) -> Iterator[Any]:
    """An array namespace. "strictest" has no optional part of the standard; JAX runs eagerly, in 64 bits."""
    namespace = importlib.import_module(_MODULES[request.param])
    limits: Any = contextlib.nullcontext()
    if request.param == "strictest":
        limits = namespace.ArrayAPIStrictFlags(
            boolean_indexing=False, data_dependent_shapes=False, enabled_extensions=()
        )
    elif request.param == "jax":
        limits = importlib.import_module("jax").enable_x64(True)
    with limits:
        yield namespace


def pytest_collection_finish() -> None:
    """Exclude the objects of imported modules from later garbage collections, which torch and JAX make slow."""
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and (reason := _no_gpu()):
        (pytest.fail if os.environ.get("LARS_REQUIRE_GPU") == "1" else pytest.skip)(reason)


@functools.cache
def _no_gpu() -> str:
    try:
        import cupy
    except ImportError as error:
        return f"no CuPy: {error}"
    # CuPy imports without a device, so that the import proves nothing.
    return "" if cupy.cuda.is_available() else "no CUDA device"
