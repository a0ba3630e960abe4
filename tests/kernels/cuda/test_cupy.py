"""What is asked of CuPy, of a stand-in that has no more than that: that the calls are right can be seen without a GPU.

That CuPy has what is asked of it is seen too, where it is installed.
"""

from __future__ import annotations

import ctypes
import inspect
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import cuda_on_cpu
import numpy as np
import pytest
from assertions import assert_same
from cuda_bodies import BODIES, Place

import lars_array.hyper
import lars_array.memory
from lars_array import core, kernels
from lars_array.hyper import at_step, complete
from lars_array.hyper_table import HyperTable
from lars_array.kernels import cuda, cuda_device
from lars_array.kernels.cuda_source import OPTIONS, ROWS, THREADS, source
from lars_array.kernels.request import Request
from lars_array.memory import Spans, check_writable
from lars_array.news import ENTRIES, News, _CupyMailbox
from lars_array.registry import RULES

needs_compiler = pytest.mark.skipif(bool(cuda_on_cpu.missing()), reason=str(cuda_on_cpu.missing()))


class Array(cuda_on_cpu.FarArray):
    """An array with an address and a device."""

    @property
    def data(self) -> Any:  # type: ignore[override]
        return SimpleNamespace(ptr=self.__array_interface__["data"][0])

    @property
    def device(self) -> Any:  # type: ignore[override]
        return sys.modules["cupy"].cuda.Device(0)


class FakeDevice:
    inside = 0

    def __init__(self, number: int) -> None:
        self.id = number

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FakeDevice) and other.id == self.id

    def __enter__(self) -> None:
        FakeDevice.inside += 1

    def __exit__(self, *_: Any) -> None:
        FakeDevice.inside -= 1

    def synchronize(self) -> None:
        pass


class FakeModule:
    library: Any = None

    def load(self, binary: bytes) -> None:
        assert binary == b"machine code"

    def get_function(self, name: str) -> Any:
        def launch(grid: Any, block: Any, arguments: Any) -> None:
            assert block == (THREADS,) and len(grid) == 1 and FakeDevice.inside
            for x in arguments:
                assert isinstance(x, (np.int32, np.uint64)) or (isinstance(x, np.ndarray) and x.size == 1)
            FakeModule.library.launch(name, *grid, *arguments)

        return launch


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A module of that name."""
    compiled: list[Any] = []

    def compile_using_nvrtc(code: str, options: Any, *, filename: str) -> Any:
        compiled.append((code, options))
        return b"machine code", None

    stream = SimpleNamespace(ptr=7, is_capturing=lambda: False)

    def memcpy_async(target: int, origin: int, size: int, kind: Any, stream: int) -> None:
        assert (kind, stream) == ("to host", 7)
        ctypes.memmove(target, origin, size)

    fake: Any = ModuleType("cupy")
    runtime = SimpleNamespace(memcpyAsync=memcpy_async, memcpyDeviceToHost="to host")
    fake.cuda = ModuleType("cupy.cuda")
    fake.cuda.__dict__.update(Device=FakeDevice, Module=FakeModule, get_current_stream=lambda: stream, runtime=runtime)
    fake.cuda.compiler = ModuleType("cupy.cuda.compiler")
    fake.cuda.compiler.compile_using_nvrtc = compile_using_nvrtc
    fake.cuda.is_available, runtime.is_hip = lambda: True, False
    fake.zeros = lambda shape, dtype: np.zeros(shape, dtype).view(Array)
    fake.asarray = lambda x: np.array(x).view(Array)
    fake.compiled = compiled
    pinned: Any = ModuleType("cupyx")
    pinned.zeros_pinned = np.zeros
    modules = {"cupy": fake, "cupy.cuda": fake.cuda, "cupy.cuda.compiler": fake.cuda.compiler, "cupyx": pinned}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    cuda_device._device.cache_clear()
    yield fake
    cuda_device._device.cache_clear()


def array(x: Any) -> Array:
    return np.array(x).view(Array)


@needs_compiler
def test_kernels_are_compiled_once_and_launched_with_what_they_take(cupy: Any, tmp_path: Any) -> None:
    types = ("float32", "float32")
    path = cuda_on_cpu.build(tmp_path, pairs=[types], THREADS=THREADS, ROWS=ROWS)
    FakeModule.library = cuda_on_cpu.Device(path)
    rng = np.random.default_rng(0)
    here = [[rng.standard_normal(size).astype(np.float32) for size in (5, 1000, 0)] for _ in range(3)]
    params, grads, buffers = ([array(x) for x in arrays] for arrays in here)
    kernel = cuda.Kernel(params, buffers, np)
    S = kernel.sums(grads)
    expected = core.sums(*here, xp=np)
    np.testing.assert_allclose(np.asarray(S), expected, rtol=1e-13)
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "nonfinite": "skip"}
    table = HyperTable(array(0.0), np)
    table.refresh([at_step(complete(options), 0)])
    request = Request(
        [RULES["flash"]],
        ["skip"],
        False,
        [0] * 3,
        range(3),
        [True] * 3,
        [],
        table.array.view(Array),
        array([True] * 3),
        array([0.0] * 3),
        array(np.zeros(ENTRIES, np.int64)),
        None,
    )
    found = kernel.enqueue(grads, request)
    assert found is not None
    for p, g, v, old, c in zip(params, grads, buffers, zip(*here, strict=True), found[1], strict=True):
        new_p, new_v = core.apply(*old, np.asarray(c), xp=np)
        assert_same([np.asarray(x) for x in (p, g, v)], [new_p, old[1], new_v])
    assert np.asarray(request.counts).tolist() == [1, 0, 0, 0]
    assert cupy.compiled == [(source([types]), OPTIONS)]
    cuda.Kernel(params, buffers, np)
    assert len(cupy.compiled) == 1
    assert FakeDevice.inside == 0


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The kernels with as many threads as on a device."""
    return cuda_on_cpu.build(tmp_path_factory.mktemp("cuda"), THREADS=THREADS, ROWS=ROWS)


def buffers_like(params: Any, xp: Any) -> Any:
    if any(isinstance(p, Array) for p in params):
        assert FakeDevice.inside, "CuPy makes arrays on the current device"
    return [np.zeros_like(p, dtype=np.float32 if p.dtype == np.float16 else p.dtype) for p in params]


# All but one that takes long, and one in which NumPy makes arrays that are no stand-ins.
MOST = [body for body in BODIES if body.__name__ not in ("ten_thousand_small_arrays", "slices_and_parts_of_layers")]


@needs_compiler
@pytest.mark.parametrize("body", MOST, ids=lambda body: body.__name__)
def test_bodies_over_the_stand_in(body: Any, cupy: Any, library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of lars_array that knows CuPy by name, but with arrays in the host's memory."""
    FakeModule.library = cuda_on_cpu.Device(library)
    cupy.ndarray = Array

    def asarray(values: Any, dtype: Any = None, *, like: Any, xp: Any) -> Any:
        if not isinstance(like, Array):
            return np.asarray(values, dtype)
        assert FakeDevice.inside, "CuPy makes arrays on the current device"
        return array(np.asarray(values, dtype))

    for module in ("distant", "hyper_table", "nonfinite", "rows"):
        monkeypatch.setattr(f"lars_array.{module}.asarray", asarray)
    for module in ("layers", "roster", "stacks"):
        monkeypatch.setattr(f"lars_array.{module}.new_buffers", buffers_like)
    known = lars_array.hyper._known
    monkeypatch.setattr("lars_array.hyper._known", lambda x: None if isinstance(x, Array) else known(x))
    pick = kernels.pick
    monkeypatch.setattr(
        kernels, "pick", lambda params, name: cuda.Kernel if isinstance(params[0], Array) else pick(params, name)
    )
    body(Place(array, np.asarray))
    assert cupy.compiled
    assert FakeDevice.inside == 0


def test_news_come_by_pinned_memory(cupy: Any) -> None:
    counts = array(np.array([4, 3, 2, 7], np.int64))
    box = _CupyMailbox(counts)
    assert box.read(wait=False) == News()
    box.post()
    news = box.read(wait=True)
    assert news == News(4, 3, 2, 7)
    assert (news.layer, news.what) == (2, "parameter")


def test_memory_of_a_device_is_told_apart_by_address(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:

    class Elsewhere:
        """Like `Array`, but nothing that NumPy would take for its own."""

        def __init__(self, x: Any) -> None:
            self.array = x
            self.shape, self.strides, self.itemsize, self.dtype = x.shape, x.strides, x.itemsize, x.dtype
            self.data = SimpleNamespace(ptr=x.__array_interface__["data"][0])

    monkeypatch.setattr(lars_array.memory, "is_cupy_array", lambda x: isinstance(x, Elsewhere))
    memory = np.zeros((10, 4), np.float32)
    first, second, third = Elsewhere(memory[:5]), Elsewhere(memory[5:]), Elsewhere(memory[4:6, ::2])
    spans = Spans(["a", "b"], [first, second])
    assert spans.owner(third) in ("parameter 'a'", "parameter 'b'")
    assert spans.owner(Elsewhere(np.zeros(3))) is None
    assert spans.owner(Elsewhere(memory[:0])) is None
    with pytest.raises(ValueError, match="parameters must not overlap in memory; parameter 'c' and parameter 'b' do"):
        Spans(["a", "b", "c"], [first, second, Elsewhere(memory[6:])])
    assert Spans(["a", "b"], [Elsewhere(memory[:, ::2]), Elsewhere(memory[:, 1::2])]).owner(first) is not None
    monkeypatch.setattr(lars_array.memory, "is_writeable_array", lambda x: True)
    check_writable("a", first)
    with pytest.raises(ValueError, match="must not overlap itself"):
        check_writable("a", Elsewhere(np.lib.stride_tricks.as_strided(memory, (3, 3), (4, 4))))


def test_who_can_not_use_it_is_told_why(cupy: Any) -> None:
    cupy.cuda.is_available = lambda: False
    cupy.cuda.runtime.is_hip = False
    assert cuda_device.problem() == "there is no CUDA device"
    cupy.cuda.runtime.is_hip = True
    assert cuda_device.problem() == "it is CUDA, and this CuPy is for ROCm"
    cupy.cuda.is_available, cupy.cuda.runtime.is_hip = lambda: True, False
    assert cuda_device.problem() is None


def test_cupy_has_what_is_asked_of_it() -> None:
    cupy = pytest.importorskip("cupy")
    from cupy.cuda import compiler, runtime

    signature = inspect.signature(compiler.compile_using_nvrtc)
    signature.bind("source", OPTIONS, filename="lars_array.cu")
    assert callable(runtime.memcpyAsync) and isinstance(runtime.memcpyDeviceToHost, int)
    assert isinstance(runtime.is_hip, bool)
    for name in ("Device", "Module", "Event", "get_current_stream", "get_elapsed_time"):
        assert hasattr(cupy.cuda, name), name
    assert {"load", "get_function"} <= set(dir(cupy.cuda.Module))
    assert "is_capturing" in dir(cupy.cuda.Stream)
    assert {"c_contiguous", "forc"} <= set(dir(cupy._core.flags.Flags))
    import cupyx

    assert callable(cupyx.zeros_pinned) and callable(cupyx.allow_synchronize)
