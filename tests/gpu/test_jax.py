"""`lars_jax.LARS` on a CUDA device: as on the CPU, in order with all that JAX does, and waiting for nothing."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax")
jnp = jax.numpy

from cuda_busy import busy  # noqa: E402
from jax_cuda_bodies import BODIES, OPTIONS, assert_close, bits, draw, pair  # noqa: E402

from lars_jax import LARS  # noqa: E402

pytestmark = pytest.mark.gpu

KEPT_OR_DONATED = pytest.mark.parametrize("donate", [False, True], ids=["kept", "donated"])


@pytest.fixture
def gpu() -> Iterator[Any]:
    try:
        devices = jax.local_devices(backend="gpu")
    except RuntimeError as error:
        pytest.skip(f"this JAX has no CUDA: {error}")
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield devices[0]


@pytest.fixture
def cp() -> Any:
    return pytest.importorskip("cupy")


@jax.jit
def slow(x: Any) -> Any:
    """Keep JAX busy for some tenths of a second, and return zeros."""
    return jax.lax.fori_loop(0, 1000, lambda _, y: jnp.tanh(y @ y), x)


@KEPT_OR_DONATED
@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__)
def test_on_the_gpu(body: Any, donate: bool, gpu: Any) -> None:
    body(lambda tree: jax.device_put(tree, gpu), donate)


@KEPT_OR_DONATED
def test_arrays_need_not_be_committed(donate: bool, gpu: Any) -> None:
    with jax.default_device(gpu):
        there, here = pair(lambda tree: jax.tree.map(jnp.asarray, tree), donate)
        for t in range(3):
            grads = jax.tree.map(jnp.asarray, draw(1 + t))
            assert not grads["w"].committed
            params, expected = there.step(grads), here.step(draw(1 + t))
    assert_close(params, expected)


@KEPT_OR_DONATED
@pytest.mark.parametrize("whose", ["cupy", "jax"])
def test_the_host_waits_for_nothing(whose: str, donate: bool, gpu: Any, cp: Any) -> None:
    """Steps return while CuPy, or JAX, is still at work on something before them."""
    optimizer = LARS(jax.device_put(draw(0), gpu), donate=donate, **OPTIONS)
    zeros = jax.device_put(np.zeros((4096, 4096), np.float32), gpu)
    lr = jax.device_put(np.float32(0.1), gpu)
    late = jax.jit(lambda tree, x: jax.tree.map(lambda g: g + x[0, 0].astype(g.dtype), tree))
    grads = [jax.device_put(draw(1 + t), gpu) for t in range(4)]
    optimizer.param_groups[0]["lr"] = lr
    for _ in range(2):
        at_work = slow(zeros)
        optimizer.step(late(grads[0], at_work), found_inf=at_work[0, 0])
    busy(cp, 0)
    optimizer.synchronize()
    jax.block_until_ready((grads, optimizer.params))
    at_work, done = zeros, cp.cuda.Event()
    start = time.perf_counter()
    if whose == "jax":
        at_work = slow(zeros)
    else:
        busy(cp, 1.0)
        done.record()
    for t in range(1, 4):
        params = optimizer.step(late(grads[t], at_work), found_inf=at_work[0, 0])
    elapsed = time.perf_counter() - start
    before = not (at_work.is_ready() if whose == "jax" else done.done)
    assert before, f"the device was done before the steps were given to it, which took {elapsed:.3f} s"
    assert not params["w"].is_ready()
    optimizer.synchronize()
    assert (optimizer.steps, optimizer.skipped_steps) == (5, 0)


SHAPES = [(1 << 18,), (512, 300), (64, 3, 7, 7), (1000,), ()]


@KEPT_OR_DONATED
@pytest.mark.parametrize("streams", [0, 1, 2])
@pytest.mark.parametrize("late", ["JAX", "CuPy", "neither"])
def test_steps_are_in_order_with_what_jax_does(late: str, streams: int, donate: bool, gpu: Any, cp: Any) -> None:
    """What JAX computes before and after steps, with memory that it has just freed, as if all was waited for."""
    rounds = {"JAX": 100, "CuPy": 2, "neither": 2}[late]

    def churned(p: Any) -> Any:
        return jax.lax.fori_loop(0, rounds, lambda _, y: jnp.sin(y) + 0.01 * p, p)

    gradients_of = jax.jit(lambda params: [churned(p) for p in params])
    total = jax.jit(lambda params: sum(churned(p).sum() for p in params))
    rate_at = jax.jit(lambda t: 0.1 / (1 + 0.01 * t))
    filled = jax.jit(lambda x: [jnp.full(shape, x) for shape in SHAPES])
    here = [np.random.default_rng(k).normal(size=shape).astype(np.float32) for k, shape in enumerate(SHAPES)]
    rubbish = np.full(SHAPES[0], 1e30, np.float32)
    results, reused = [], 0

    for waits in (True, False):

        def settle(waits: bool = waits) -> None:
            if waits:
                jax.block_until_ready([x for x in jax.live_arrays() if not x.is_deleted()])
                cp.cuda.Device(gpu.local_hardware_id).synchronize()

        optimizer = LARS(jax.device_put(here, gpu), donate=donate, **OPTIONS)
        totals = []
        settle()
        used = [cp.cuda.Stream(non_blocking=True) for _ in range(streams)]
        for t in range(200):
            grads = gradients_of(optimizer.params)
            freed = {g.unsafe_buffer_pointer() for g in grads}
            settle()
            with used[t % streams] if streams else nullcontext():
                if late == "CuPy":
                    busy(cp, 0.002)
                optimizer.param_groups[0]["lr"] = rate_at(np.float32(t))
                params = optimizer.step(grads)
                optimizer.param_groups[0]["lr"] = 0.0
            del grads
            settle()
            sent = jax.device_put(rubbish, gpu)  # by a copy, and by a computation
            junk = filled(1e30)
            reused += not freed.isdisjoint([x.unsafe_buffer_pointer() for x in (sent, *junk)])
            settle()
            totals.append(total(params))
            if t % 10 == 0:
                params[1].copy_to_host_async()
            if t % 50 == 49:
                totals.append(jnp.asarray(np.asarray(params[1]).sum()))
            del params, sent, junk
            settle()
        results.append(bits([optimizer.params, totals]))
        optimizer.synchronize()
        assert optimizer.steps == 200
    assert results[0] == results[1]
    assert reused, "memory of gradients was not used again, so less was tried than was meant"


def test_what_another_library_sees_is_left_to_it(gpu: Any, cp: Any) -> None:
    there, here = pair(lambda tree: jax.device_put(tree, gpu), True)
    there.step(jax.device_put(draw(1), gpu))
    here.step(draw(1))
    seen = cp.from_dlpack(there.params["w"])
    before = cp.asnumpy(seen).tobytes()
    for t in range(2):
        ours, theirs = there.step(jax.device_put(draw(2 + t), gpu)), here.step(draw(2 + t))
        assert cp.asnumpy(seen).tobytes() == before
    assert_close(ours, theirs)


@KEPT_OR_DONATED
def test_steps_need_no_more_memory_from_one_to_the_next(donate: bool, gpu: Any, cp: Any) -> None:
    gc.collect()
    base = gpu.memory_stats()["bytes_in_use"]
    params, grads = ([jax.device_put(np.ones(1 << 22, np.float32), gpu) for _ in range(4)] for _ in range(2))
    size = 4 << 24
    optimizer = LARS(params, donate=donate, **OPTIONS)
    del params
    found = []
    for _ in range(6):
        optimizer.step(grads)
        jax.block_until_ready(optimizer.params)
        found.append((gpu.memory_stats()["bytes_in_use"] - base, cp.get_default_memory_pool().used_bytes()))
    assert len(set(found[2:])) == 1, f"memory grows: {found}"
    of_jax = found[-1][0] - size  # without the gradients
    assert of_jax < (1.5 if donate else 2.5) * size, f"{of_jax} bytes for {size} of parameters"
