"""What the kernels promise beside the numbers: memory, threads, forks, and floating-point settings."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
import threading
import tracemalloc
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from references import LAYOUTS, assert_same_bits, gaussian

from benchmarks.shapes import resnet50
from lars_array import LARS
from lars_array.kernels import NUMPY_KERNELS as KERNELS
from lars_array.kernels import threads

OPTIONS: dict[str, Any] = {"lr": 0.3, "momentum": 0.9, "weight_decay": 1e-2}
# The third sum is a way of its own through memory, the second look for clipping as well.
WAYS: dict[str, dict[str, Any]] = {
    "flash": OPTIONS,
    "nesterov": OPTIONS | {"nesterov": True},
    "barlow": OPTIONS | {"rule": "barlow", "max_grad_norm": 1.0},
    "simclr-popular": OPTIONS | {"rule": "simclr-popular"},
}
MIB = 1 << 20


@pytest.fixture
def use_threads(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Set how many threads a step has."""
    return lambda count: monkeypatch.setenv("LARS_ARRAY_THREADS", str(count))


def trajectory(options: dict[str, Any], shift: int = 0) -> list[Any]:
    """Return parameters and momentum after three steps, of arrays that begin `shift` bytes into their memory."""

    def placed(x: Any) -> Any:
        y = np.zeros(x.nbytes + 64, np.uint8)[shift : shift + x.nbytes].view(x.dtype).reshape(x.shape)
        y[...] = x
        return y

    rng = np.random.default_rng(3)
    shapes = [(1 << 20,), (700, 701), (1, 3), (1_200_001,)]
    params = [placed(gaussian(rng, shape, "f4")) for shape in shapes] + [gaussian(rng, (600, 500), "f2")[:, ::2]]
    optimizer = LARS(params, **options)
    for _ in range(3):
        optimizer.step([placed(gaussian(rng, p.shape, p.dtype)) for p in params])
    return [*params, *(state["momentum_buffer"] for state in optimizer.state_dict()["state"].values())]


def assert_same_trajectory(ours: list[Any], theirs: list[Any], what: str) -> None:
    assert len(ours) == len(theirs)
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert_same_bits(a, b, f"{what}: array {i}")


def assert_allocates_little(optimizer: LARS, gradients: list[Any], limit: int = MIB) -> None:
    # Twice before, so that every thread of the pool has been given work and its scratch memory.
    optimizer.step(gradients)
    optimizer.step(gradients)
    tracemalloc.start()
    try:
        optimizer.step(gradients)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < limit, f"a step had {peak / MIB:.2f} MiB at once"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("form", ["flat", "layers"])
def test_a_step_allocates_nearly_nothing(form: str, way: str) -> None:
    shapes = resnet50()
    assert len(shapes) == 161
    assert sum(int(np.prod(shape)) for shape in shapes) == 25_557_032
    shapes = shapes if form == "layers" else [(25_557_032,)]
    params = [np.ones(shape, np.float32) for shape in shapes]
    gradients = [np.full(shape, 0.01, np.float32) for shape in shapes]
    assert_allocates_little(LARS(params, **WAYS[way]), gradients)


@pytest.mark.parametrize(("dtype", "layout"), [("f2", "C"), ("f4", "strided"), ("f4", "Fortran"), ("c8", "C")])
def test_a_step_that_casts_allocates_a_few_blocks(dtype: str, layout: str) -> None:
    # Casts go through buffers of a block each: more than 1 MiB, but nothing like the 13 MiB of the array in float32.
    p, g = (LAYOUTS[layout](np.ones((1700, 2000), dtype)) for _ in range(2))
    assert_allocates_little(LARS([p], **OPTIONS), [g], 4 * MIB)


@pytest.mark.parametrize("way", WAYS)
def test_bits_do_not_depend_on_run_threads_or_address(way: str, use_threads: Callable[[int], None]) -> None:
    use_threads(1)
    expected = trajectory(WAYS[way])
    assert_same_trajectory(trajectory(WAYS[way]), expected, "again")
    for count in (2, 7):
        use_threads(count)
        assert_same_trajectory(trajectory(WAYS[way]), expected, f"{count} threads")
    assert_same_trajectory(trajectory(WAYS[way], shift=4), expected, "shifted by an element")


def test_another_process_gives_the_same_bits() -> None:
    code = (
        "import numpy as np; from lars_array import LARS\n"
        "rng = np.random.default_rng(0); p = rng.random(1_500_001, dtype=np.float32)\n"
        "o = LARS([p], lr=0.3, momentum=0.9, weight_decay=0.01, rule='barlow')\n"
        "for _ in range(2): o.step([rng.random(p.shape, dtype=np.float32)])\n"
        "import hashlib; print(hashlib.sha256(p.tobytes()).hexdigest())"
    )
    outputs = {
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout for _ in "ab"
    }
    assert len(outputs) == 1


def test_optimizers_in_several_python_threads(use_threads: Callable[[int], None]) -> None:
    use_threads(2)
    expected = {way: trajectory(options) for way, options in WAYS.items()}
    results: dict[tuple[str, int], Any] = {}

    def work(way: str, number: int) -> None:
        results[way, number] = trajectory(WAYS[way])

    workers = [threading.Thread(target=work, args=(way, number)) for way in WAYS for number in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=60)
    assert len(results) == len(workers)
    for (way, _), result in results.items():
        assert_same_trajectory(result, expected[way], way)


def _in_child(queue: Any) -> None:
    queue.put([x.tobytes() for x in trajectory(WAYS["barlow"])])


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="a platform without fork")
def test_a_forked_child_can_step(use_threads: Callable[[int], None]) -> None:
    use_threads(3)
    expected = [x.tobytes() for x in trajectory(WAYS["barlow"])]
    assert threads._pool.count > 0, "the parent should have threads that the child lacks"
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that one forks although there are threads is the very point
        child = context.Process(target=_in_child, args=(queue,))
        child.start()
    try:
        assert queue.get(timeout=60) == expected
        child.join(timeout=60)
        assert child.exitcode == 0
    finally:
        child.kill()
        child.join()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", ["f4", "f2", "f8", "c8"])
def test_floating_point_errors_of_the_users_setting_stop_nothing(dtype: str, kernel: str) -> None:
    # Powers of ten that underflow when squared, scaled or rounded, beside ones that do not.
    least = {"f2": 6e-8, "f4": 1e-44, "f8": 5e-324, "c8": 1e-44}[dtype]
    start = [
        np.full(2000, 1.0, dtype),
        np.full(2000, least, dtype),
        np.zeros(3, dtype),
        np.full((50, 50), least, dtype).T,
    ]
    gradients = [np.full(2000, 0.3, dtype), np.full(2000, least, dtype), np.ones(3, dtype), np.zeros((50, 50), dtype)]
    results = []
    for setting in ("warn", "raise"):
        params = [p.copy() for p in start]
        optimizer = LARS(
            params, lr=1e-3, momentum=0.9, weight_decay=1e-4, kernel=kernel, rule="barlow", max_grad_norm=1e-3
        )
        with warnings.catch_warnings(), np.errstate(all=setting):
            warnings.simplefilter("ignore")
            before = np.geterr()
            for _ in range(3):
                optimizer.step(gradients)
            assert np.geterr() == before
            assert optimizer.norms() and optimizer.trust_ratios()
        assert optimizer.steps == 3
        results.append(params)
    assert_same_trajectory(*results, f"{dtype}, {kernel}")


@pytest.mark.parametrize("kernel", KERNELS)
def test_overflow_of_the_result_is_no_half_step(kernel: str) -> None:
    # The coefficients are finite, one sum of p and its update is not: float16 has no room for it.
    params = [np.ones(3, np.float16), np.full(3, 65_000, np.float16), np.ones(3, np.float16)]
    optimizer = LARS(params, lr=1.0, kernel=kernel)
    with np.errstate(all="raise"):
        optimizer.step([np.ones(3, np.float16), np.full(3, -65_000, np.float16), np.ones(3, np.float16)])
    assert optimizer.steps == 1
    assert not np.any(params[0]) and not np.any(params[2])
