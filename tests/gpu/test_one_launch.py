"""A step in one launch on a GPU, whose blocks wait for each other there: beside the same steps in three launches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from cuda_bodies import BODIES, HYPER, Place, model
from cuda_graphs import capture, own_stream
from cuda_launches import noted_launches

from lars_array import LARS
from lars_array.kernels.cuda import one_launch
from lars_array.kernels.cuda.one_launch import order_tasks

pytestmark = pytest.mark.gpu

# Layers of one piece and of hundreds: more than the cache of any GPU holds, and more than its blocks work on at once.
LARGE = [(64,), (5_000_000,), *[(256,), (600_000,)] * 20, (20_000_000,), *[(1000,)] * 50, (3, 7), (2_000_003,)]


@pytest.fixture
def cp() -> Any:
    return pytest.importorskip("cupy")


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return noted_launches(monkeypatch)


def run(cp: Any, monkeypatch: pytest.MonkeyPatch, asked: str, steps: int, shapes: Any = None, **options: Any) -> bytes:
    """Return all that steps leave: parameters, and the norms of the last step."""
    monkeypatch.setenv("LARS_ARRAY_CUDA", asked)
    random = cp.random.RandomState(0)

    def arrays() -> list[Any]:
        return [random.standard_normal(shape, dtype=cp.float32) for shape in shapes or [x.shape for x in model(0)]]

    params, grads = {str(i): p for i, p in enumerate(arrays())}, arrays()
    optimizer = LARS(params, **HYPER | {"lr": 0.01}, nonfinite="propagate", **options)
    for number in range(steps):
        optimizer.step({str(i): g * (1 + number % 3) for i, g in enumerate(grads)})
    optimizer.synchronize()
    assert optimizer.steps == steps
    norms = np.array(list(optimizer.norms().values()))
    return norms.tobytes() + b"".join(cp.asnumpy(p).tobytes() for p in params.values())


OPTIONS = {"flash": {}, "mxnet": {"rule": "mxnet"}, "joined layers": {"layer_of": {"0": "a", "4": "a"}.get}}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_bits_are_those_of_three_launches(
    cp: Any, monkeypatch: pytest.MonkeyPatch, launches: Sequence[str], options: dict[str, Any]
) -> None:
    results = [run(cp, monkeypatch, asked, 20, **options) for asked in ("three-launches", "one-launch")]
    assert results[0] == results[1]
    assert launches.count("step_float32_float32") == 20


@pytest.mark.parametrize("blocks", [1, 2, 20])
def test_any_grid_and_share_of_the_cache_will_do(cp: Any, monkeypatch: pytest.MonkeyPatch, blocks: int) -> None:
    """20 blocks each are more than a multiprocessor can run at once: some begin when others have ended."""
    expected = run(cp, monkeypatch, "three-launches", 10, LARGE)
    monkeypatch.setattr(one_launch, "BLOCKS", blocks)
    for share in (0, 6_000_000, 60_000_000, 600_000_000):
        monkeypatch.setattr(
            one_launch, "order_tasks", lambda lengths, units, _, share=share: order_tasks(lengths, units, share)
        )
        assert run(cp, monkeypatch, "one-launch", 10, LARGE) == expected


def test_a_graph_replays_the_launch(cp: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for asked in ("three-launches", "one-launch"):
        monkeypatch.setenv("LARS_ARRAY_CUDA", asked)
        params, grads = [cp.array(p) for p in model(0)], [cp.array(g) for g in model(1)]
        optimizer = LARS(params, **HYPER, nonfinite="propagate")
        with own_stream(cp) as stream:
            optimizer.step(grads)
            graph = capture(stream, optimizer.step, grads)
            for _ in range(50):
                graph.launch(stream)
            optimizer.step(grads)
        optimizer.synchronize()
        assert optimizer.steps == 52
        results.append(b"".join(cp.asnumpy(p).tobytes() for p in params))
    assert results[0] == results[1]


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__)
def test_bodies_are_right_where_one_launch_is_asked_for(body: Any, cp: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LARS_ARRAY_CUDA", "one-launch")
    body(Place(lambda x: cp.array(x), cp.asnumpy))
