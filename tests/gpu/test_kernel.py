"""The CUDA kernel on a GPU. ``make gpu`` runs this, and once more under NVIDIA's compute-sanitizer."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from cuda_bodies import BODIES, HYPER, Place, model
from cuda_busy import busy
from cuda_graphs import capture, own_stream
from cuda_launches import noted_launches

from lars_array import LARS, RULES, core, kernels
from lars_array.hyperparams import at_step, inputs_of
from lars_array.kernels.cuda.kernel import Kernel

pytestmark = pytest.mark.gpu


@pytest.fixture
def cp() -> Iterator[Any]:
    """CuPy; for compute-sanitizer without its pool, in which there is no end to an array."""
    import cupy

    if not os.environ.get("LARS_WITHOUT_POOL"):
        yield cupy
        return
    cupy.cuda.set_allocator(None)
    yield cupy
    cupy.cuda.set_allocator(cupy.get_default_memory_pool().malloc)


@pytest.fixture
def place(cp: Any) -> Place:
    return Place(lambda x: cp.array(x), cp.asnumpy)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return noted_launches(monkeypatch)


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__)
def test_on_the_gpu(body: Callable[[Place], None], place: Place, launches: list[str]) -> None:
    body(place)
    assert any(name.startswith("apply") for name in launches)


def test_the_kernel_is_chosen(cp: Any) -> None:
    assert kernels.choose([cp.zeros(1)]) is Kernel
    assert ("cuda", True, Kernel.DESCRIPTION) in kernels.report()


def test_bfloat16(cp: Any) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    here = [p.astype(ml_dtypes.bfloat16) for p in model(0)]
    there = [cp.array(p) for p in here]
    ours, theirs = LARS(there, **HYPER), LARS(here, **HYPER, kernel="portable")
    for seed in (1, 2):
        ours.step([cp.array(g.astype(ml_dtypes.bfloat16)) for g in model(seed)])
        theirs.step([g.astype(ml_dtypes.bfloat16) for g in model(seed)])
    for p, q in zip(there, here, strict=True):
        np.testing.assert_allclose(cp.asnumpy(p).astype("f4"), q.astype("f4"), rtol=8e-3, atol=1e-6)


def test_a_step_is_three_launches_and_allocates_nothing(cp: Any, place: Place, launches: list[str]) -> None:
    """Not even from CuPy's pool."""
    params, grads = [place.put(p) for p in model(0)], [place.put(g) for g in model(1)]
    optimizer = LARS(params, **HYPER)
    optimizer.step(grads)
    launches.clear()
    asked: list[int] = []

    class Hook(cp.cuda.memory_hook.MemoryHook):  # type: ignore[name-defined,misc]
        name = "Asked"

        def malloc_preprocess(self, **arguments: Any) -> None:
            asked.append(arguments["size"])

    with Hook():
        for _ in range(3):
            optimizer.step(grads)
    assert launches == 3 * ["sums_float32_float32", "coefficients", "apply_float32_float32"]
    assert asked == []


@pytest.mark.parametrize("options", [{}, {"nonfinite": "skip", "rule": "optax", "max_grad_norm": 1.0}])
def test_the_host_waits_for_nothing(cp: Any, place: Place, options: dict[str, Any]) -> None:
    """Steps return while the device is still at work on something before them."""
    params = [place.put(p) for p in model(0)]
    optimizer = LARS(params, **HYPER, **options)
    gradients = [[place.put(g) for g in model(seed)] for seed in range(4)]
    optimizer.step(gradients[0])
    busy(cp, 0)
    cp.cuda.get_current_stream().synchronize()
    busy(cp, 2.0)
    done = cp.cuda.Event()
    done.record()
    start = time.perf_counter()
    for seed in (1, 2, 3):
        optimizer.step(gradients[seed])
    elapsed = time.perf_counter() - start
    assert not done.done, f"the device was done before the steps were given to it, which took {elapsed:.3f} s"
    optimizer.synchronize()
    assert optimizer.steps == 4


def test_a_graph_takes_steps(cp: Any, place: Place) -> None:
    """As many steps in a graph as without one end in the same bits; the learning rate lies on the device."""
    results = []
    for captured in (False, True):
        params, grads = [place.put(p) for p in model(0)], [place.put(g) for g in model(1)]
        lr = place.put(np.array(0.1))
        optimizer = LARS(params, **HYPER | {"lr": lr}, nonfinite="skip")
        with own_stream(cp) as stream:
            optimizer.step(grads)
            if captured:
                graph = capture(stream, optimizer.step, grads)
                optimizer.step([place.put(g) for g in model(1)])  # elsewhere: the graph must not follow
            for k in range(3):
                lr[...] = 0.1 / (k + 1)
                if captured and k > 0:
                    graph.launch(stream)
                elif not captured:
                    optimizer.step(grads)
        optimizer.synchronize()
        results.append(b"".join(place.get(p).tobytes() for p in params))
        assert optimizer.skipped_steps == 0
    assert results[0] == results[1]


def test_a_skipped_step_of_a_graph_is_counted(cp: Any, place: Place) -> None:
    params, grads = [place.put(p) for p in model(0)], [place.put(g) for g in model(1)]
    optimizer = LARS(params, **HYPER, nonfinite="skip")
    with own_stream(cp) as stream:
        optimizer.step(grads)
        graph = capture(stream, optimizer.step, grads)
        before = [place.get(p).tobytes() for p in params]
        grads[0][0, 0, 0, 0] = np.nan
        graph.launch(stream)
        stream.synchronize()
        assert [place.get(p).tobytes() for p in params] == before
        grads[0][0, 0, 0, 0] = 1.0
        optimizer.step(grads)
    assert optimizer.skipped_steps == 1


def test_streams_and_devices_are_the_callers(cp: Any, place: Place) -> None:
    results = []
    for number in range(min(cp.cuda.runtime.getDeviceCount(), 2)):
        with cp.cuda.Device(number):
            params, grads = [place.put(p) for p in model(0)], [place.put(g) for g in model(1)]
            cp.cuda.get_current_stream().synchronize()
        optimizer = LARS(params, **HYPER)  # whichever device is current
        for _ in range(2):
            optimizer.step(grads)
        optimizer.synchronize()
        results.append([place.get(p).tobytes() for p in params])
        assert optimizer.state_dict()["state"]["0"]["momentum_buffer"].device.id == number
    assert all(result == results[0] for result in results)


def test_an_array_of_more_than_two_to_the_31_elements(cp: Any) -> None:
    size = 2**31 + 12_345
    if cp.cuda.runtime.memGetInfo()[0] < 5 * size:
        pytest.skip("it takes 10 GB")
    p, g = cp.zeros(size, cp.float16), cp.zeros(size, cp.float16)
    p[:3], g[:3], p[-3:], g[-3:] = 1, 2, 3, 4
    optimizer = LARS([p], lr=0.5, nonfinite="skip")
    optimizer.step([g])
    norms = optimizer.norms()["0"]
    assert (norms.parameter, norms.gradient) == (30**0.5, 60**0.5)
    assert cp.asnumpy(p[:4]).tolist() == [0, 0, 0, 0]
    assert cp.asnumpy(p[-4:]).tolist() == [0, 1, 1, 1]


def test_parameters_that_overlap_are_refused(cp: Any) -> None:
    memory = cp.zeros(10)
    with pytest.raises(ValueError, match="must not overlap"):
        LARS([memory[:6], memory[4:]], lr=0.1)
    p = memory[:5]
    optimizer = LARS([p], lr=0.1)
    with pytest.raises(ValueError, match="must not share memory"):
        optimizer.step([memory[2:7]])


def test_coefficients_have_the_bits_of_numpys(cp: Any, place: Place) -> None:
    """The tape, in double precision, from the same sums."""
    for rule in sorted(RULES):
        params, grads = [place.put(p) for p in model(0)], [place.put(g) for g in model(1)]
        optimizer = LARS(params, **HYPER, rule=rule, nonfinite="propagate")
        optimizer.step(grads)
        program: Any = optimizer._stepper._programs[0]
        tables = program._kernel._steps[1]
        S, gamma, C = map(place.get, (tables.S, tables.gamma, tables.C))
        group, count = at_step(HYPER | {"rule": rule}, 0), len(params)
        inputs = inputs_of([group], [0] * count, [True] * count, [0.0] * count, like=S, xp=np)
        theirs = core.coefficients(S, inputs.hyper, inputs.rules, gamma, xp=np)
        assert C.tobytes() == theirs.tobytes(), rule
