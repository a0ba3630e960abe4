"""The calls of CuPy, checked without a GPU: on a stand-in that has nothing else, and on CuPy, if it is installed."""

from __future__ import annotations

import contextlib
import ctypes
import inspect
import sys
import weakref
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import cuda_on_cpu
import numpy as np
import pytest
from assertions import assert_same
from cuda_bodies import BODIES, Place
from cuda_launches import noted_launches

from lars_array import RULES, core, hyperparams, kernels
from lars_array.kernels.cuda import device
from lars_array.kernels.cuda.kernel import Kernel
from lars_array.kernels.cuda.source import COMMON, OPTIONS, ROWS, THREADS, pair_name, source
from lars_array.nonfinite import CAUSES, PARAMETER
from lars_array.state import counts as device_counts
from lars_array.state import device as device_state
from lars_array.state import device_rows
from lars_array.state import memory as ranges
from lars_array.state.counts import PinnedCounts, StepCounts
from lars_array.state.device import DeviceState
from lars_array.state.device_rows import DeviceRows
from lars_array.state.graph_memory import GraphMemory
from lars_array.state.memory import MemoryRanges, check_writable

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
    fake.cuda.Event = lambda **_: SimpleNamespace(record=lambda stream: None, done=True)
    fake.zeros = lambda shape, dtype: np.zeros(shape, dtype).view(Array)
    fake.ndarray = Array
    fake.asarray = lambda x: np.array(x).view(Array)
    fake.compiled = compiled
    pinned: Any = ModuleType("cupyx")
    pinned.zeros_pinned = np.zeros
    modules = {"cupy": fake, "cupy.cuda": fake.cuda, "cupy.cuda.compiler": fake.cuda.compiler, "cupyx": pinned}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    device._device.cache_clear()
    yield fake
    device._device.cache_clear()


def array(x: Any) -> Array:
    return np.array(x).view(Array)


@needs_compiler
def test_kernels_are_compiled_once_and_launched_with_their_arguments(
    cupy: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    types = ("float32", "float32")
    path = cuda_on_cpu.build(tmp_path, pairs=[types], THREADS=THREADS, ROWS=ROWS)
    FakeModule.library = cuda_on_cpu.Device(path)
    rng = np.random.default_rng(0)
    here = [[rng.standard_normal(size).astype(np.float32) for size in (5, 1000, 0)] for _ in range(3)]
    params, grads, buffers = ([array(x) for x in arrays] for arrays in here)
    kernel = cuda_on_cpu.kernel_of(params, grads, buffers, kind=Kernel)
    given = cuda_on_cpu.gradients(grads)
    with params[0].device:
        S = kernel.sums(given)
    expected = core.sums(*here, xp=np)
    np.testing.assert_allclose(np.asarray(S), expected, rtol=1e-13)
    group = hyperparams.at_step({"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "nonfinite": "skip"}, 0)
    for module in (device_state, device_rows):
        monkeypatch.setattr(module, "asarray", arrays_there)
    lists: Any = list("abc"), [0] * 3, range(3), range(3), [True] * 3
    with params[0].device:
        state = DeviceState([True] * 3, [0.0] * 3, like=params[0])
        state.write([group], captured=False)
        rows = DeviceRows(*lists, [], np.zeros(3, int), None, None, params[0])
        assert kernel.enqueue(given, rows, [RULES["flash"]], ["skip"], state, None, clips=False) is not None
    C = np.asarray(kernel._steps[1].C)
    for p, g, v, old, c in zip(params, grads, buffers, zip(*here, strict=True), C, strict=True):
        new_p, new_v = core.apply(*old, c, xp=np)
        assert_same([np.asarray(x) for x in (p, g, v)], [new_p, old[1], new_v])
    assert np.asarray(state.counts).tolist() == [1, 0, 0, 0]
    assert cupy.compiled == [(source([types]), OPTIONS)]
    with params[0].device:
        cuda_on_cpu.kernel_of(params, grads, buffers, kind=Kernel).sums(given)
    assert len(cupy.compiled) == 1
    assert FakeDevice.inside == 0


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The kernels with as many threads as on a device."""
    return cuda_on_cpu.build(tmp_path_factory.mktemp("cuda"), THREADS=THREADS, ROWS=ROWS)


def arrays_there(values: Any, dtype: Any = None, *, like: Any, xp: Any) -> Any:
    """In the place of `lars_array._arrays.asarray`."""
    if not isinstance(like, Array):
        return np.asarray(values, dtype)
    assert FakeDevice.inside, "CuPy makes arrays on the current device"
    return array(np.asarray(values, dtype))


def buffers_like(params: Any) -> Any:
    if any(isinstance(p, Array) for p in params):
        assert FakeDevice.inside, "CuPy makes arrays on the current device"
    return [np.zeros_like(p, dtype=np.float32 if p.dtype == np.float16 else p.dtype) for p in params]


# All but one that takes long, and one in which NumPy makes arrays that are no stand-ins.
MOST = [body for body in BODIES if body.__name__ not in ("ten_thousand_small_arrays", "slices_and_parts_of_layers")]


@needs_compiler
@pytest.mark.parametrize("body", MOST, ids=lambda body: body.__name__)
def test_bodies_over_the_stand_in(body: Any, cupy: Any, library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of lars_array that names CuPy, but with arrays in the host's memory."""
    FakeModule.library = cuda_on_cpu.Device(library)

    for module in ("core", "hyperparams.rows", "nonfinite", "state.device", "state.device_rows"):
        monkeypatch.setattr(f"lars_array.{module}.asarray", arrays_there)
    for module in ("_stepper.arrays", "state.store"):
        monkeypatch.setattr(f"lars_array.{module}.allocate_buffers", buffers_like)
    known, choose = hyperparams.checks._known, kernels.choose
    monkeypatch.setattr(hyperparams.checks, "_known", lambda x: None if isinstance(x, Array) else known(x))
    monkeypatch.setattr(kernels, "choose", lambda xs, name: Kernel if isinstance(xs[0], Array) else choose(xs, name))
    launches = noted_launches(monkeypatch)
    body(Place(array, np.asarray))
    assert cupy.compiled and any(name.startswith("apply") for name in launches)
    assert FakeDevice.inside == 0


def test_counts_arrive_in_pinned_memory(cupy: Any) -> None:
    of_c = 2 * len(CAUSES) + PARAMETER
    counts = array(np.array([4, 3, 2, of_c], np.int64))
    pinned = PinnedCounts(counts)
    assert pinned.read(wait=False) == StepCounts()
    pinned.copy()
    found = pinned.read(wait=True)
    assert found == StepCounts(4, 3, 2, of_c)
    assert str(found.error("abc")).startswith("the norm of the parameter of 'c' was not finite")


@pytest.mark.parametrize("failing", [1, 2, 5, 7])
def test_a_module_that_was_not_loaded_is_loaded_again(cupy: Any, failing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs, calls = [("float32", "float32"), ("float16", "float16")], 0

    def get_function(self: Any, name: str) -> Any:
        nonlocal calls
        calls += 1
        if calls == failing:
            raise MemoryError
        return lambda grid, block, arguments: None

    monkeypatch.setattr(FakeModule, "get_function", get_function)
    own = device.Device(0)
    with pytest.raises(MemoryError):
        own.compile(pairs)
    own.compile(pairs)
    for name in (*COMMON, "write_pointers", *(pair_name(stage, *p) for p in pairs for stage in ("sums", "apply"))):
        own.launcher(name, 1)()


class PinnedPool:
    """A model of CuPy's pool of pinned memory, which gives away blocks whose arrays are gone, and of a stream."""

    def __init__(self) -> None:
        self.free: list[Any] = []
        self.queue: list[Any] = []  # copies that the device has not made yet
        self.made = 0

    def zeros_pinned(self, size: int, dtype: Any) -> Any:
        block = self.free.pop() if self.free else np.zeros(64, dtype)
        array = block[:size]
        array[...] = 0
        weakref.finalize(array, self.free.append, block)
        return array

    def copy(self, target: int, origin: int, size: int, kind: Any, stream: int) -> None:
        self.queue.append(lambda: ctypes.memmove(target, origin, size))

    def event(self, **_: Any) -> Any:
        pool = self

        class Event:
            place = 0

            def record(self, stream: Any) -> None:
                self.place = pool.made + len(pool.queue)

            @property
            def done(self) -> bool:
                return pool.made >= self.place

        return Event()

    def run(self) -> None:
        for copy in self.queue:
            copy()
        self.made += len(self.queue)
        self.queue.clear()


@pytest.fixture
def pool(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> PinnedPool:
    own = PinnedPool()
    monkeypatch.setattr(sys.modules["cupyx"], "zeros_pinned", own.zeros_pinned)
    monkeypatch.setattr(cupy.cuda.runtime, "memcpyAsync", own.copy)
    monkeypatch.setattr(cupy.cuda, "Event", own.event)
    for kept in (device_counts._in_flight, device_counts._in_graphs):
        kept.clear()
    return own


def test_memory_of_counts_that_are_still_copied_goes_to_nobody_else(pool: PinnedPool) -> None:
    counts = array(np.array([4, 3, 2, 1], np.int64))
    for _ in range(3):
        dropped = PinnedCounts(counts)
        dropped.copy()
        del dropped
    somebody_else = pool.zeros_pinned(4, np.int64)
    pool.run()
    assert somebody_else.tolist() == [0] * 4
    assert not pool.free and len(device_counts._in_flight) == 3
    PinnedCounts(counts)  # and once the device is done, it is given back
    assert len(pool.free) >= 2 and len(device_counts._in_flight) <= 1


def test_memory_that_a_graph_writes_to_is_kept(cupy: Any, pool: PinnedPool) -> None:
    cupy.cuda.get_current_stream().is_capturing = lambda: True
    counts = array(np.array([4, 3, 2, 1], np.int64))
    dropped = PinnedCounts(counts)
    dropped.copy()
    del dropped
    PinnedCounts(counts)
    somebody_else = pool.zeros_pinned(4, np.int64)
    pool.run()  # a replay
    assert somebody_else.tolist() == [0] * 4


def test_memory_of_a_device_is_compared_by_address(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:

    class Elsewhere:
        """Like `Array`, but nothing that NumPy would take for its own."""

        def __init__(self, x: Any) -> None:
            self.array = x
            self.shape, self.strides, self.itemsize, self.dtype = x.shape, x.strides, x.itemsize, x.dtype
            self.data = SimpleNamespace(ptr=x.__array_interface__["data"][0])

    monkeypatch.setattr(ranges, "is_cupy_array", lambda x: isinstance(x, Elsewhere))
    memory = np.zeros((10, 4), np.float32)
    first, second, third = Elsewhere(memory[:5]), Elsewhere(memory[5:]), Elsewhere(memory[4:6, ::2])
    taken = MemoryRanges(["a", "b"], [first, second])
    assert taken.find([third]) in [(0, "parameter 'a'"), (0, "parameter 'b'")]
    assert taken.find([Elsewhere(np.zeros(3)), Elsewhere(memory[:0])]) is None
    with pytest.raises(ValueError, match="parameters must not overlap in memory; parameter 'c' and parameter 'b' do"):
        MemoryRanges(["a", "b", "c"], [first, second, Elsewhere(memory[6:])])
    assert MemoryRanges(["a", "b"], [Elsewhere(memory[:, ::2]), Elsewhere(memory[:, 1::2])]).find([first]) is not None
    monkeypatch.setattr(ranges, "is_writeable_array", lambda x: True)
    check_writable("a", first)
    with pytest.raises(ValueError, match="must not overlap itself"):
        check_writable("a", Elsewhere(np.lib.stride_tricks.as_strided(memory, (3, 3), (4, 4))))


def test_reasons_why_it_can_not_be_used(cupy: Any) -> None:
    cupy.cuda.is_available = lambda: False
    cupy.cuda.runtime.is_hip = False
    assert device.problem() == "there is no CUDA device"
    cupy.cuda.runtime.is_hip = True
    assert device.problem() == "it is CUDA, and this CuPy is for ROCm"
    cupy.cuda.is_available, cupy.cuda.runtime.is_hip = lambda: True, False
    assert device.problem() is None


def test_cupy_has_all_that_is_called() -> None:
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


def test_a_captured_step_allocates_from_a_pool_of_its_own(cupy: Any) -> None:
    """Else other arrays would get memory that replays of the graph write to."""
    pools, entered = [], []

    class Pool:
        def __init__(self) -> None:
            pools.append(self)

        def malloc(self, size: int) -> Any:
            raise AssertionError("nothing is allocated here")

    @contextlib.contextmanager
    def using_allocator(malloc: Any) -> Iterator[None]:
        entered.append(malloc)
        yield
        entered.append("left")

    cupy.cuda.MemoryPool, cupy.cuda.using_allocator = Pool, using_allocator
    capturing = SimpleNamespace(is_capturing=lambda: True)
    memory, like = GraphMemory(), array(np.ones(1))
    for kernel, p in (
        (SimpleNamespace(is_capturing=lambda: False), like),
        (SimpleNamespace(), like),
        (capturing, np.ones(1)),
    ):
        with memory.while_capturing(kernel, p):
            assert not pools and not entered
    for _ in range(2):
        with memory.while_capturing(capturing, like):
            pass
    assert len(pools) == 1 and entered == 2 * [pools[0].malloc, "left"]
