"""Pieces of layers on a GPU: sums by NCCL on one process, and steps that a CUDA graph captures with their sum."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cuda_bodies import HYPER, model
from cuda_graphs import capture, own_stream

from lars_array import LARS, RefusedElsewhereError, collectives

pytestmark = pytest.mark.gpu

OPTIONS: list[dict[str, Any]] = [{}, {"nonfinite": "skip", "rule": "optax", "max_grad_norm": 1.0}]


@pytest.fixture
def cp() -> Any:
    return pytest.importorskip("cupy")


def put(cp: Any, seed: int) -> list[Any]:
    return [cp.array(x) for x in model(seed)]


def assert_alike(cp: Any, there: list[Any], here: list[Any]) -> None:
    for p, q in zip(there, here, strict=True):
        np.testing.assert_allclose(cp.asnumpy(p), q, rtol=1e-5, atol=1e-7)


def twice(table: Any) -> None:
    """The sum over two processes that hold equal pieces."""
    table *= 2


def whole_run(steps: int, **options: Any) -> list[Any]:
    params = model(0)
    optimizer = LARS(params, **HYPER, **options, kernel="portable", all_reduce=twice)
    for seed in range(1, steps + 1):
        optimizer.step(model(seed))
    return params


@pytest.mark.parametrize("options", OPTIONS)
def test_sums_on_the_device_reach_the_step(cp: Any, options: dict[str, Any]) -> None:
    params = put(cp, 0)
    optimizer = LARS(params, **HYPER, **options, all_reduce=twice)
    for seed in range(1, 5):
        optimizer.step(put(cp, seed))
    optimizer.synchronize()
    assert (optimizer.steps, optimizer.skipped_steps) == (4, 0)
    assert_alike(cp, params, whole_run(4, **options))


@pytest.mark.parametrize("options", OPTIONS)
def test_a_graph_captures_a_step_with_its_sum(cp: Any, options: dict[str, Any]) -> None:
    """Arrays that are made between replays must not lie where these write."""
    params, grads = put(cp, 0), put(cp, 1)
    lr = cp.array(HYPER["lr"])
    optimizer = LARS(params, **HYPER | {"lr": lr}, **options, all_reduce=twice)
    with own_stream(cp) as stream:
        optimizer.step(grads)
        graph = capture(stream, optimizer.step, grads)
        others = []
        for seed in (2, 3):
            others += [cp.full(1000, seed, cp.float64) for _ in range(100)]
            for g, new in zip(grads, put(cp, seed), strict=True):
                g[...] = new
            graph.launch(stream)
            stream.synchronize()
        optimizer.step(put(cp, 4))
    optimizer.synchronize()
    assert (optimizer.steps, optimizer.skipped_steps) == (4, 0)
    assert all(float(x.min()) == float(x.max()) in (2.0, 3.0) for x in others)
    assert_alike(cp, params, whole_run(4, **options))


def test_a_replay_without_all_processes_writes_nothing(cp: Any) -> None:
    factor = cp.array(2.0)

    def add(table: Any) -> None:
        table *= factor

    params, grads = put(cp, 0), put(cp, 1)
    optimizer = LARS(params, **HYPER, all_reduce=add)
    with own_stream(cp) as stream:
        optimizer.step(grads)
        graph = capture(stream, optimizer.step, grads)
        before = [cp.asnumpy(p).tobytes() for p in params]
        factor[...] = 1.0
        graph.launch(stream)
        stream.synchronize()
        assert [cp.asnumpy(p).tobytes() for p in params] == before
        factor[...] = 2.0
        graph.launch(stream)
    with pytest.raises(RefusedElsewhereError, match="not all processes took part alike in an earlier step"):
        optimizer.synchronize()
    assert optimizer.steps == 2


@pytest.fixture
def nccl(cp: Any) -> Any:
    found = pytest.importorskip("cupy.cuda.nccl")
    if not hasattr(found, "NcclCommunicator"):
        pytest.skip("this CuPy has no NCCL")
    return collectives.nccl(found.NcclCommunicator(1, found.get_unique_id(), 0))


@pytest.mark.parametrize("captured", [False, True])
def test_nccl_adds_on_one_process(cp: Any, nccl: Any, captured: bool) -> None:
    params, here = put(cp, 0), model(0)
    optimizer = LARS(params, **HYPER, all_reduce=nccl)
    theirs = LARS(here, **HYPER, kernel="portable")
    grads = put(cp, 1)
    with own_stream(cp) as stream:
        optimizer.step(grads)
        if captured:
            graph = capture(stream, optimizer.step, grads)
        for _ in range(3):
            graph.launch(stream) if captured else optimizer.step(grads)
    optimizer.synchronize()
    for _ in range(4):
        theirs.step(model(1))
    assert (optimizer.steps, optimizer.skipped_steps) == (4, 0)
    assert_alike(cp, params, here)
