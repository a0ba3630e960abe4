"""`lars_jax.LARS` on a CUDA device that is none: arrays of JAX on the CPU, and a stand-in for CuPy that sees them.

All but the order of streams is as it is with a GPU: whose memory it is, what is copied, and what is asked of JAX.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import cuda_on_cpu
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax_cuda_bodies import BODIES, OPTIONS, assert_close, draw, pair

from lars_array import NonFiniteError, Recorder
from lars_array.state import device
from lars_array.state.store import allocate_buffers
from lars_jax import LARS, _buffers
from lars_jax._donation import donate as donate_arrays

needs_compiler = pytest.mark.skipif(bool(cuda_on_cpu.missing()), reason=str(cuda_on_cpu.missing()))


class FakeDevice:
    inside = 0

    def __init__(self, number: int) -> None:
        self.id = number

    def __enter__(self) -> None:
        FakeDevice.inside += 1

    def __exit__(self, *_: Any) -> None:
        FakeDevice.inside -= 1


class FakeNdarray:
    """What it makes are arrays that the host must not look into."""

    def __new__(cls, shape: Any, dtype: Any, memory: Any) -> Any:
        place, size = memory
        buffer = (ctypes.c_byte * size).from_address(place)
        return np.frombuffer(buffer, dtype).reshape(shape).view(cuda_on_cpu.FarArray)


def unowned(place: int, size: int, owner: Any, number: int) -> tuple[int, int]:
    assert place and size and owner is None and number == 0
    return place, size


class ArrivedCounts(device.PinnedCounts):
    """Counts that the host has without waiting, as in pinned memory."""

    def read(self, *, wait: bool) -> device.StepCounts:
        return device.StepCounts(*np.asarray(self.counts).tolist())


def inside(function: Any) -> Any:
    def called(*arguments: Any) -> Any:
        assert FakeDevice.inside, "CuPy works on the current device"
        return function(*arguments)

    return called


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A module of that name."""
    fake: Any = ModuleType("cupy")
    fake.asked = []

    def from_dlpack(x: Any) -> Any:
        fake.asked.append(x)
        return np.from_dlpack(x).view(cuda_on_cpu.FarArray)

    fake.ndarray = FakeNdarray
    fake.from_dlpack = inside(from_dlpack)
    fake.empty = inside(lambda shape, dtype: np.empty(shape, dtype).view(cuda_on_cpu.FarArray))
    fake.zeros = inside(lambda shape, dtype: allocate_buffers([np.empty(shape, dtype)])[0])
    fake.asarray = inside(cuda_on_cpu.far)
    fake.asnumpy = inside(np.array)
    fake.cuda = SimpleNamespace(
        Device=FakeDevice,
        UnownedMemory=unowned,
        MemoryPointer=lambda memory, offset: memory,
        is_available=lambda: True,
        runtime=SimpleNamespace(is_hip=False),
    )
    monkeypatch.setitem(sys.modules, "cupy", fake)
    monkeypatch.setattr(_buffers, "is_cuda", lambda device: True)
    monkeypatch.setattr(_buffers, "cuda_device", lambda number: jax.devices()[0])
    monkeypatch.setattr(device, "PinnedCounts", ArrivedCounts)
    with cuda_on_cpu.pretended():
        yield fake
    assert FakeDevice.inside == 0


@pytest.fixture(autouse=True)
def strict() -> Iterator[None]:
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


def put(tree: Any) -> Any:
    return jax.tree.map(jnp.array, tree)


@needs_compiler
@pytest.mark.parametrize("donate", [False, True], ids=["kept", "donated"])
@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__)
def test_bodies_over_the_stand_in(body: Any, donate: bool, cupy: Any) -> None:
    body(put, donate)


@needs_compiler
def test_the_host_reads_nothing(cupy: Any) -> None:
    """Nor is JAX asked to wait: of its arrays only the token is exported, and no number."""
    there, _ = pair(put, True, nonfinite="skip")
    grads = [put(draw(t)) for t in range(5)]
    there.step(grads[0])
    cupy.asked.clear()
    with cuda_on_cpu.nothing_read():
        for g in grads[1:]:
            there.step(g)
    assert [x.dtype for x in cupy.asked] == 4 * [np.dtype("uint32")]


@needs_compiler
def test_a_recorder_reads_nothing_until_it_is_asked(cupy: Any) -> None:
    there, here = pair(put, True, nonfinite="skip")
    far, near = Recorder(there), Recorder(here)
    for t in range(4):
        g = put(draw(t))
        here.step(g)
        near.record()
        with cuda_on_cpu.nothing_read():
            there.step(g)
            far.record()
    assert far.steps.tolist() == near.steps.tolist() == [0, 1, 2, 3]
    assert far.layers == near.layers
    for name in ("parameter_norms", "gradient_norms", "trust_ratios"):
        np.testing.assert_allclose(getattr(far, name), getattr(near, name), 1e-6, err_msg=name)


@needs_compiler
def test_computations_are_compiled_once(cupy: Any, caplog: pytest.LogCaptureFixture) -> None:
    there, _ = pair(put, True)
    kept, _ = pair(put, False)
    grads = put(draw(1))
    for optimizer in (there, kept):
        optimizer.step(grads)
        optimizer.step(grads)
    with jax.log_compiles(True):
        for optimizer in (there, kept):
            for t in range(3):
                optimizer.step(put(draw(t)))
    found = [record.getMessage() for record in caplog.records if "Compiling" in record.getMessage()]
    assert not [line for line in found if "_donated" in line or "_copied" in line], found


@needs_compiler
def test_a_parameter_that_another_library_sees_is_left_to_it(cupy: Any) -> None:
    there, here = pair(put, True)
    there.step(put(draw(1)))
    here.step(draw(1))
    seen = np.asarray(there.params["w"])
    before = seen.tobytes()
    for t in range(2):
        ours, theirs = there.step(put(draw(2 + t))), here.step(draw(2 + t))
        assert seen.tobytes() == before
    assert ours["w"].unsafe_buffer_pointer() != seen.ctypes.data
    np.testing.assert_allclose(ours["w"], theirs["w"], rtol=1e-5)


@needs_compiler
def test_an_error_that_was_not_raised_yet_is_raised_when_memory_moves(cupy: Any) -> None:
    there, here = pair(put, True)
    bad = draw(1)
    bad["w"][0, 0] = np.nan
    there.step(put(bad))
    seen = np.asarray(there.params["w"])
    with pytest.raises(NonFiniteError, match="'w' was not finite in an earlier step"):
        there.step(put(draw(2)))
    assert_close(there.params, draw(0))
    assert_close(there.step(put(draw(3))), here.step(draw(3)))
    assert there.steps == 1 and seen.tobytes() == draw(0)["w"].tobytes()


@needs_compiler
def test_thousands_of_arrays_go_by_parts(cupy: Any) -> None:
    params = [np.full(3, k, np.float32) for k in range(600)]
    grads = [np.full(3, 1 + k % 5, np.float32) for k in range(600)]
    here = LARS(params, **OPTIONS).step(grads)
    for donate in (False, True):
        optimizer = LARS(put(params), donate=donate, **OPTIONS)
        optimizer.step(put(grads))
        np.testing.assert_allclose(optimizer.params, here, rtol=1e-6)


def test_arrays_that_jax_refuses_to_donate_are_copied() -> None:
    """As it does on a device if another library sees it; here because it is given twice."""
    token, x = jax.device_put(np.uint32(0), jax.devices()[0]), jnp.ones(3)
    token, (y,) = donate_arrays(token, [x], [x])
    assert y.tolist() == [1, 1, 1] and not x.is_deleted() and int(token) == 1
    token, (y,) = donate_arrays(token, [x], [None, y])
    assert y.tolist() == [1, 1, 1] and x.is_deleted()
    y.delete()
    with pytest.raises((RuntimeError, ValueError), match="deleted"):
        donate_arrays(token, [y], [])


def test_without_cupy_it_is_said_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_buffers, "is_cuda", lambda device: True)
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(ImportError, match=r"pip install 'lars-array\[cuda12\]'.*lars_jax\.lars"):
        LARS(put(draw(0)), lr=0.1)


def test_a_device_that_is_not_cudas_is_refused(cupy: Any) -> None:
    cupy.cuda.runtime.is_hip = True
    with pytest.raises(TypeError, match=r"can't be stepped by CuPy, use lars_jax\.lars: .*ROCm"):
        LARS(put(draw(0)), lr=0.1)


DEVICES = """
import jax, jax.numpy as jnp, lars_jax, numpy as np, pytest, sys
first, second = jax.devices()
with pytest.raises(TypeError, match="parameter 'w' must lie on the first CPU device or on one CUDA device"):
    lars_jax.LARS({"w": jax.device_put(jnp.ones(2), second)}, lr=0.1)
mesh = jax.sharding.Mesh(np.array(jax.devices()), "x")
split = jax.device_put(jnp.ones(2), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x")))
with pytest.raises(TypeError, match="else use lars_jax.lars"):
    lars_jax.LARS({"w": split}, lr=0.1)
lars_jax._buffers.is_cuda = lambda device: True
with pytest.raises(TypeError, match="parameters must lie on one device, else use lars_jax.lars; 'v' lies on"):
    lars_jax.LARS({"v": jnp.ones(2), "w": jax.device_put(jnp.ones(2), second)}, lr=0.1)
lars_jax._buffers.is_cuda = lambda device: False
optimizer = lars_jax.LARS({"w": jnp.ones(2)}, lr=0.1)
for g in (split, jax.device_put(jnp.ones(2), second)):
    with pytest.raises(TypeError, match="the gradient of 'w' must lie on the parameters' device .*, else use"):
        optimizer.step({"w": g})
assert "cupy" not in sys.modules
"""


def test_other_devices_are_refused_and_cupy_is_not_imported() -> None:
    command = [sys.executable, "-W", "error", "-c", DEVICES]
    environment = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    assert run.returncode == 0, run.stderr


def test_cupy_has_what_is_asked_of_it() -> None:
    cupy = pytest.importorskip("cupy")
    for name in ("Device", "UnownedMemory", "MemoryPointer"):
        assert hasattr(cupy.cuda, name), name
    for name in ("asarray", "asnumpy", "empty", "from_dlpack", "zeros", "ndarray"):
        assert hasattr(cupy, name), name
    memory = cupy.cuda.UnownedMemory(256, 24, None, 0)
    view = cupy.ndarray((2, 3), np.float32, cupy.cuda.MemoryPointer(memory, 0))
    assert view.data.ptr == 256 and view.shape == (2, 3)
