"""torch's memory, streams and graphs, under the CUDA kernel by way of DLPack."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
from cuda_bodies import HYPER, model

from lars_array import LARS

pytestmark = pytest.mark.gpu


@pytest.fixture
def torch() -> Any:
    found = pytest.importorskip("torch")
    if not found.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    return found


@contextlib.contextmanager
def torchs_stream(torch: Any) -> Iterator[None]:
    """Have CuPy launch on torch's current stream."""
    import cupy

    stream = torch.cuda.current_stream()
    if hasattr(cupy.cuda.Stream, "from_external"):
        with cupy.cuda.Stream.from_external(stream):
            yield
    else:
        with cupy.cuda.ExternalStream(stream.cuda_stream):
            yield


def tensors(torch: Any, seed: int) -> list[Any]:
    return [torch.as_tensor(x, device="cuda") for x in model(seed)]


def views(xs: list[Any]) -> list[Any]:
    import cupy

    return [cupy.from_dlpack(x) for x in xs]


def test_a_graph_of_torch_takes_steps(torch: Any) -> None:
    results = []
    for captured in (False, True):
        params, grads, lr = tensors(torch, 0), tensors(torch, 1), torch.tensor(0.1, device="cuda", dtype=torch.float64)
        torch.cuda.synchronize()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side), torchs_stream(torch):
            (rate,) = views([lr])
            optimizer = LARS(views(params), **HYPER | {"lr": rate}, nonfinite="skip")
            known = views(grads)
            optimizer.step(known)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        if captured:
            with torch.cuda.graph(graph), torchs_stream(torch):
                optimizer.step(known)
        for k in range(3):
            lr.fill_(0.1 / (k + 1))
            if captured:
                graph.replay()
            else:
                with torchs_stream(torch):
                    optimizer.step(known)
        torch.cuda.synchronize()
        optimizer.synchronize()
        assert (optimizer.steps, optimizer.skipped_steps) == (4, 0)
        results.append(b"".join(p.cpu().numpy().tobytes() for p in params))
    assert results[0] == results[1]


def test_steps_are_ordered_with_torchs_work(torch: Any) -> None:
    """Gradients made, and parameters used, by torch on a stream of its own: nobody waits on the host."""
    results = []
    for wait in (False, True):
        params = tensors(torch, 0)
        torch.cuda.synchronize()
        side = torch.cuda.Stream()
        with torch.cuda.stream(side), torchs_stream(torch):
            optimizer = LARS(views(params), **HYPER)
            for seed in (1, 2, 3):
                grads = [torch.sin(x) for x in tensors(torch, seed)]
                if wait:
                    torch.cuda.synchronize()
                optimizer.step(views(grads))
                if wait:
                    torch.cuda.synchronize()
                for p in params:
                    p.mul_(0.99)
        torch.cuda.synchronize()
        results.append(b"".join(p.cpu().numpy().tobytes() for p in params))
    assert results[0] == results[1]
