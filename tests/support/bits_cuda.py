"""The CUDA kernels for the recorder of bits: compiled by g++, and run on NumPy arrays in the place of a device's.

The one part of the recorder that imports what is not public.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from bits_cases import Scenario
from bits_runs import InPlace

from lars_array.kernels.cuda import source
from lars_array.kernels.cuda.kernel import Kernel
from lars_array.state.store import allocate_buffers as _allocate

__all__ = ["Cuda", "missing"]

THREADS, ROWS = 32, 8


def missing() -> str | None:
    """Return why the kernels can't be compiled here."""
    return None if shutil.which("g++") else "no g++"


class Far(np.ndarray):
    """An array on the pretended device."""


def _is_far(x: Any) -> bool:
    return isinstance(x, Far)


def _far(x: Any) -> Far:
    x = np.asarray(x)
    there = np.empty_like(x).view(Far)  # as it lies, but where there is no dense order that could be kept
    there[...] = x
    return there


def _address(array: Any) -> int:
    address: int = array.__array_interface__["data"][0]
    return address


def _allocated(params: Sequence[Any]) -> list[Any]:
    return [x.view(Far) if _is_far(p) else x for p, x in zip(params, _allocate(params), strict=True)]


class Cuda(InPlace):
    """`lars_array.LARS` over arrays of the pretended device."""

    def __init__(self, scenario: Scenario) -> None:
        self._scenario = scenario
        with self.around():
            super().__init__(scenario, "cuda", place=_far)

    def around(self) -> AbstractContextManager[Any]:
        """Have `Far` arrays taken for arrays on a device."""
        stack = ExitStack()
        for owner, name, value in _replaced():
            stack.enter_context(patch.object(owner, name, value))
        return stack


def _replaced() -> Iterator[tuple[Any, str, Any]]:
    """Yield an object, a name of its attributes, and another value for that."""
    yield Kernel, "unsupported_reason", staticmethod(lambda params: None)
    yield Kernel, "Device", _Device()
    names = {"is_on_accelerator": _is_far, "allocate_buffers": _allocated}
    for module_name, module in list(sys.modules.items()):
        if module_name.split(".")[0] == "lars_array":
            yield from ((module, name, names[name]) for name in names.keys() & vars(module).keys())


class _Device:
    """In the place of `lars_array.kernels.cuda.device.Device`."""

    rows = ROWS
    address = staticmethod(_address)

    def on(self, like: Any) -> _Device:
        return self

    def zeros(self, shape: Any, dtype: Any) -> Any:
        return np.zeros(shape, dtype).view(Far)

    def put(self, array: Any) -> Any:
        return np.array(array).view(Far)

    def is_capturing(self) -> bool:
        return False

    def compile(self, pairs: Any, **options: Any) -> None:
        pass

    def launcher(self, *call: Any) -> Callable[[], None]:
        return functools.partial(self.launch, *call)

    def launch(self, name: str, blocks: int, *arguments: Any) -> None:
        values = [
            ctypes.c_void_p(_address(x) if isinstance(x, np.ndarray) else int(x))
            if isinstance(x, np.ndarray | np.uint64)
            else ctypes.c_int(int(x))
            for x in arguments
        ]
        getattr(_library(), f"launch_{name}")(blocks, 0, *values)


@functools.cache
def _library() -> ctypes.CDLL:
    """Return the kernels of all pairs of types, compiled."""
    pairs = list(product(source.ELEMENTS, source.ELEMENTS))
    named = [(source.pair_name(stage, *pair), n) for pair in pairs for stage, n in (("sums", 1), ("apply", 3))]
    launchers = [_launcher(name, count) for name, count in [*named, *((name, 0) for name in source.COMMON)]]
    write = f"run(blocks, {THREADS}, order, [=] {{ write_pointers(table, *pointers); }});"
    declared = "int blocks, int order, u64* table, const Pointers* pointers"
    launchers.append(f"void launch_write_pointers({declared}) {{ {write} }}")
    tests = Path(__file__).resolve().parents[1]
    header = next(path for path in sorted(tests.rglob("cuda_on_cpu.h")))
    folder = tempfile.TemporaryDirectory(prefix="lars-array-bits-")
    atexit.register(folder.cleanup)
    code = [f'#include "{header}"', source.source(pairs, THREADS=THREADS, ROWS=ROWS), 'extern "C" {', *launchers, "}"]
    path = Path(folder.name) / "kernels.cpp"
    path.write_text("\n".join(code))
    options = ["-std=c++17", "-O1", "-ffp-contract=off", "-fno-strict-aliasing", "-fno-gnu-unique", "-shared", "-fPIC"]
    subprocess.run(["g++", *options, "-o", path.with_suffix(".so"), path], check=True, capture_output=True)
    return ctypes.CDLL(os.fspath(path.with_suffix(".so")))


def _launcher(name: str, integers: int) -> str:
    numbers = [f"i{k}" for k in range(integers)]
    declared = ", ".join(["int blocks", "int order", "const Model* m", *(f"int {x}" for x in numbers)])
    call = f"run(blocks, {THREADS}, order, [=] {{ {name}({', '.join(['*m', *numbers])}); }});"
    return f"void launch_{name}({declared}) {{ {call} }}"
