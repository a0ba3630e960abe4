"""The CUDA kernels compiled by g++ and run on NumPy arrays, and a device for the kernel's host code that does that."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lars_array import kernels
from lars_array._stepper import arrays as step_arrays
from lars_array._stepper import program, stepper
from lars_array.hyperparams import checks, groups
from lars_array.kernels.base import Gradients, KernelArrays
from lars_array.kernels.cuda import kernel
from lars_array.kernels.cuda.one_launch import one_launch_source
from lars_array.kernels.cuda.source import COMMON, ELEMENTS, pair_name
from lars_array.state import device_exchange, memory, store

HERE = Path(__file__).parent
PAIRS = list(product(ELEMENTS, ELEMENTS))
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")
TOGETHER = ("-DBLOCKS_ARE_THREADS", "-pthread")

# Fewer threads than on a device, so that small arrays take several rounds of all of them, and a hypothesis is cheap.
THREADS, ROWS = 32, 8


def missing() -> str | None:
    """Return why the kernels can't be compiled here."""
    return None if shutil.which("g++") else "no g++"


def build(
    folder: Path,
    *,
    pairs: Sequence[tuple[str, str]] = PAIRS,
    options: Sequence[str] = (),
    change: tuple[str, str] | None = None,
    **numbers: int,
) -> Path:
    """Return a library of all kernels.

    Parameters
    ----------
    folder : Path
        Where to.
    pairs : sequence of tuple (str, str)
        For which element types.
    options : sequence of str
        More options of the compiler: `SANITIZE`, for a library that stops at memory that is not its own, and at what
        C++ leaves undefined; `TOGETHER`, for blocks that run at the same time, see cuda_turns.h.
    change : pair of str, optional
        What stands in the source, once, and what to put in its place.
    **numbers : int
        As for `source`.
    """
    code = one_launch_source(pairs, **({"THREADS": THREADS, "ROWS": ROWS} | numbers))
    if change is not None:
        assert code.count(change[0]) == 1, f"{change[0]!r} stands there {code.count(change[0])} times"
        code = code.replace(*change)
    threads = numbers.get("THREADS", THREADS)
    stages = {"sums": ["int"], "apply": ["int"] * 3, "step": ["const Plan&"]}
    kernels = {pair_name(stage, *pair): more for pair in pairs for stage, more in stages.items()}
    launchers = [_launcher(name, more, threads) for name, more in (kernels | {name: [] for name in COMMON}).items()]
    write = f"run(blocks, {threads}, order, [=] {{ write_pointers(table, *pointers); }});"
    declared = "int blocks, int order, u64* table, const Pointers* pointers"
    launchers.append(f"void launch_write_pointers({declared}) {{ {write} }}")
    path = folder / "kernels.cpp"
    header = f'#include "{HERE / "cuda_on_cpu.h"}"'
    path.write_text("\n".join([header, code, 'extern "C" {', *launchers, "}"]))
    library = folder / "kernels.so"
    always = [
        "-std=c++17",
        "-O1",
        "-ffp-contract=off",
        "-fno-strict-aliasing",
        "-fno-gnu-unique",
        "-Wall",
        "-Wextra",
        "-Werror",
    ]
    always += ["-Wno-unknown-pragmas", "-Wno-unused-function", "-shared", "-fPIC"]
    done = subprocess.run(["g++", *always, *options, "-o", library, path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return library


def _launcher(name: str, more: Sequence[str], threads: int) -> str:
    declared = ["int blocks", "int order", "const Model& m", *(f"{kind} x{k}" for k, kind in enumerate(more))]
    given = ", ".join(["m", *(f"x{k}" for k in range(len(more)))])
    call = f"run(blocks, {threads}, order, [&] {{ {name}({given}); }});"
    declared = ", ".join(declared)
    return f"void launch_{name}({declared}) {{ {call} }}"


class FarArray(np.ndarray):
    """An array that the host may pass around, but not look into."""

    readable = True

    def __array_finalize__(self, other: Any) -> None:
        pass


def _guarded(name: str) -> Any:
    def method(self: Any, *arguments: Any) -> Any:
        assert FarArray.readable, f"a value was read by {name}"
        return getattr(np.ndarray, name)(self, *arguments)

    return method


for _name in ("__bool__", "__float__", "__int__", "__index__", "item", "tolist", "nonzero", "__contains__"):
    setattr(FarArray, _name, _guarded(_name))


def far(x: Any) -> FarArray:
    """Return a copy that lies on the pretended device."""
    return np.array(x).view(FarArray)


def is_far(x: Any) -> bool:
    return isinstance(x, FarArray)


@contextlib.contextmanager
def nothing_read() -> Iterator[None]:
    FarArray.readable = False
    try:
        yield
    finally:
        FarArray.readable = True


@functools.cache
def library() -> Path:
    """Return the library of all kernels, built once a session; LARS_CUDA_ON_CPU names one that is there."""
    if given := os.environ.get("LARS_CUDA_ON_CPU"):
        return Path(given)
    folder = tempfile.TemporaryDirectory(prefix="lars-array-cuda-")
    atexit.register(folder.cleanup)
    return build(Path(folder.name))


class Kernel(kernel.Kernel):
    """The CUDA kernel with all of its host code, over a device that is none."""

    @staticmethod
    def unsupported_reason(params: Sequence[Any]) -> str | None:
        return None if all(map(is_far, params)) else "these lie here"

    def writer(self, grads: Gradients, C: Any, taken: Any = None) -> Callable[[], None]:
        # Where NumPy has made a scalar of an array of shape (), its address is that of a copy.
        kept = None if taken is None else np.array(taken)
        write = super().writer(grads, C, kept)
        return lambda: (kept, write())[1]


def kernel_of(params: Any, grads: Any, buffers: Any = None, masters: Any = None, kind: Any = Kernel) -> Any:
    """Return the kernel for arrays that are all dense."""
    nothing = [None] * len(params)
    return kind(KernelArrays(params, grads, buffers or nothing, masters or nothing), np)


def gradients(arrays: Sequence[Any]) -> Gradients:
    """Return arrays as kernels take the gradients of a step."""
    return Gradients(np.array(list(map(address, arrays)), np.int64), lambda: arrays)


def address(x: Any) -> int:
    found: int = x.__array_interface__["data"][0]
    return found


def answer_whether_on_accelerator(patch: pytest.MonkeyPatch, answer: Callable[[Any], bool]) -> None:
    """Have steps ask this function whether an array lies on a device."""
    for module in (groups, memory, device_exchange, program, stepper):
        patch.setattr(module, "is_on_accelerator", answer)


@contextlib.contextmanager
def pretended(order: int = 0, path: Path | None = None) -> Iterator[Device]:
    """Have `FarArray`s taken for arrays on a device, by the CUDA kernel and its host code."""
    device = Device(path or library(), order)
    choose, known, allocate = kernels.choose, checks._known, store.allocate_buffers

    def allocated(params: Sequence[Any]) -> list[Any]:
        return [x.view(FarArray) if is_far(p) else x for p, x in zip(params, allocate(params), strict=True)]

    with pytest.MonkeyPatch.context() as patch:
        answer_whether_on_accelerator(patch, is_far)
        for owner in (store, step_arrays):
            patch.setattr(owner, "allocate_buffers", allocated)
        patch.setattr(checks, "_known", lambda x: None if is_far(x) else known(x))
        patch.setattr(Kernel, "Device", device)
        patch.setattr(kernels, "choose", lambda params, name: Kernel if is_far(params[0]) else choose(params, name))
        yield device


class Device:
    """In the place of `lars_array.kernels.cuda.device.Device`. Counts launches and allocations.

    Parameters
    ----------
    library : Path
        From `build`.
    order : int
        In which order threads and blocks take turns.
    """

    rows = ROWS
    address = staticmethod(address)

    def __init__(self, library: Path, order: int = 0) -> None:
        self.library, self.order = ctypes.CDLL(os.fspath(library)), order
        self.launches: list[tuple[str, int]] = []
        self.allocations = 0
        self.capturing = False
        self.cache_bytes, self.multiprocessors = 1 << 14, 2
        self._turn = threading.Lock()

    def on(self, like: Any) -> Device:
        return self

    def zeros(self, shape: Any, dtype: Any) -> Any:
        self.allocations += 1
        return np.zeros(shape, dtype).view(FarArray)

    def put(self, array: Any) -> Any:
        self.allocations += 1
        return far(array)

    def is_capturing(self) -> bool:
        return self.capturing

    def attribute(self, name: str) -> int:
        return {"L2CacheSize": self.cache_bytes, "MultiProcessorCount": self.multiprocessors}[name]

    def compile(self, pairs: Any, *, one_launch: bool = False) -> None:
        pass

    def launcher(self, *call: Any) -> Callable[[], None]:
        return lambda: self.launch(*call)  # which tests replace

    def launch(self, name: str, blocks: int, *arguments: Any) -> None:
        assert blocks > 0, f"{name} would not be launched"
        self.launches.append((name, blocks))
        values = [
            ctypes.c_void_p(address(x) if isinstance(x, np.ndarray) else int(x))
            if isinstance(x, np.ndarray | np.uint64)
            else ctypes.c_int(int(x))
            for x in arguments
        ]
        with self._turn:  # all threads of a launch take turns in one place
            getattr(self.library, f"launch_{name}")(blocks, self.order, *values)
