"""Norms are good to 1e-6, and nearly always to 1e-7, whatever the arrays hold."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from lars_array import LARS, sums
from lars_array.kernels import NUMPY_KERNELS as KERNELS
from lars_array.kernels import choose
from lars_array.kernels.base import Gradients, KernelArrays

PROMISED = 1e-6
AIM = 1e-7
N = 300_001  # more than a block, and no multiple of anything

RNG = np.random.default_rng(7)
SEED = RNG.bit_generator.state


@pytest.fixture(autouse=True)
def the_same_numbers_for_each_test() -> None:
    RNG.bit_generator.state = SEED


def exact_squares(*terms: tuple[float, Any]) -> float:
    """Return the sum over (weight x + …)², each of them in longdouble, added without error."""
    total = sum(np.longdouble(weight) * x.astype(np.longdouble) for weight, x in terms)
    return math.fsum((total**2).astype(np.float64).tolist())


def assert_relative(ours: float, theirs: float, allowed: float, what: str) -> None:
    error = abs(ours - theirs) / theirs if theirs else abs(ours)
    assert error <= allowed, f"{what}: {ours} for {theirs}, a relative error of {error:.2e}"


def kernel_sums(kernel: str, p: Any, g: Any, operand: Any = None, v: Any = None) -> Any:
    """Return the three sums of one layer by a kernel, or by `core.sums`."""
    if operand is not None:
        operand = tuple(None if x is None else np.array([x], float) for x in operand)
    if kernel == "core":
        return sums([p], [g], [v], operand, xp=np)[0]
    own = choose([p], kernel)(KernelArrays([p], [g], [v], [None]), np)
    address = np.array([g.__array_interface__["data"][0]])
    return own.sums(Gradients(address, lambda: [g]), operand)[0]


def assert_norms(p: Any, g: Any, allowed: float = AIM) -> None:
    """Hold the norms that every path has of p and g against exact ones."""
    want = math.sqrt(exact_squares((1, p))), math.sqrt(exact_squares((1, g)))
    for kernel in KERNELS:
        # The step itself must not matter: at a learning rate of 0 nothing moves, and extremes can't overflow.
        optimizer = LARS({"w": p.copy()}, lr=0.0, weight_decay=1e-4, kernel=kernel)
        optimizer.step({"w": g})
        for ours, theirs, name in zip(optimizer.norms()["w"], want, ("parameter", "gradient"), strict=True):
            assert_relative(ours, theirs, allowed, f"{kernel}, norm of the {name}")
    for ours, theirs in zip(np.sqrt(kernel_sums("core", p, g))[:2], want, strict=True):
        assert_relative(ours, theirs, allowed, "core")


def gaussian(scale: float, size: int = N) -> Any:
    return (RNG.standard_normal(size) * scale).astype(np.float32)


def mixed() -> Any:
    """Numbers of all magnitudes that float32 has, beside each other."""
    return (RNG.standard_normal(N) * 10.0 ** RNG.uniform(-40, 37, N)).astype(np.float32)


def alternating(huge: float, tiny: float) -> Any:
    return np.tile(np.array([huge, tiny], np.float32), N // 2)


DATA: dict[str, Callable[[], Any]] = {
    "gaussian": lambda: gaussian(1.0),
    "uniform": lambda: RNG.random(N).astype(np.float32),
    "1e30": lambda: gaussian(1e30),
    "1e-30": lambda: gaussian(1e-30),
    "subnormal": lambda: gaussian(1e-41),
    "the least": lambda: np.full(N, 1e-45, np.float32),
    "the largest": lambda: np.full(N, np.finfo(np.float32).max, np.float32),
    "mixed": mixed,
    "huge and tiny": lambda: alternating(1e30, 1e-30),
    "squares at the top of float32": lambda: gaussian(5e18),
    "squares at the bottom of float32": lambda: gaussian(3e-19),
    "squares that are subnormal": lambda: np.full(N, 1.3e-21, np.float32),
    "squares below the threshold": lambda: alternating(1e-14, 1e-20),
    "one that counts": lambda: np.concatenate([np.full(N, 1e-3, np.float32), np.float32([1e4])]),
    "last block tiny": lambda: np.concatenate([gaussian(1e20), gaussian(1e-25)]),
    "equal": lambda: np.full(N, 0.1, np.float32),
}


@pytest.mark.parametrize("name", DATA)
def test_norms_of_float32(name: str) -> None:
    x = DATA[name]()
    other = gaussian(1.0, x.size)
    assert_norms(x, other)
    assert_norms(other, x)


@pytest.mark.parametrize("size", [1, 127, 128, 1023, 1024, 1025, 1152, 8191, 8193, 262_145])
@pytest.mark.parametrize("scale", [1.0, 1e25, 1e-25])
def test_norms_of_sizes_around_the_borders(size: int, scale: float) -> None:
    assert_norms(gaussian(scale, size), gaussian(scale, size))


def test_norms_of_67_million_equal_elements() -> None:
    # Where torch.norm is 3 % off. One array is p and g, read only, to save memory.
    n = 67_108_864
    x = np.full(n, 0.1, np.float32)
    want = math.sqrt(n) * float(np.float32(0.1))
    S = np.sqrt(kernel_sums("blocked", x, x, (1.0, 1e-4, None)))
    assert_relative(S[0], want, AIM, "p")
    assert_relative(S[1], want, AIM, "g")
    assert_relative(S[2], want * (1 + 1e-4), PROMISED, "g + w p")
    for ours in np.sqrt(kernel_sums("core", x, x))[:2]:
        assert_relative(ours, want, AIM, "core")
    optimizer = LARS({"w": x}, lr=0.0, weight_decay=1e-4)
    optimizer.step({"w": np.broadcast_to(np.float32(0.1), n)})  # no memory either, and other strides
    for ours in optimizer.norms()["w"]:
        assert_relative(ours, want, AIM, "optimizer.norms()")


def test_norms_of_float16_beyond_its_range() -> None:
    x = np.full(N, 60_000, np.float16)
    assert math.sqrt(exact_squares((1, x))) > 65_504 * 100
    assert_norms(x, (RNG.standard_normal(N) * 30_000).clip(-65_000, 65_000).astype(np.float16))
    assert_norms(np.full(N, 6e-8, np.float16), x)  # its least number


def test_norms_of_zeros() -> None:
    zeros, ones = np.zeros(N, np.float32), np.ones(N, np.float32)
    assert_norms(zeros, zeros)
    assert_norms(zeros, ones)
    assert_norms(-zeros, ones)


def test_norms_of_complex_numbers_count_both_parts() -> None:
    z = (gaussian(1e30) + 1j * gaussian(1e-30)).astype(np.complex64)
    for kernel in (*KERNELS, "core"):
        S = kernel_sums(kernel, z, z[::-1].copy())
        want = exact_squares((1, z.real)) + exact_squares((1, z.imag))
        assert_relative(math.sqrt(S[0]), math.sqrt(want), AIM, kernel)
        assert_relative(math.sqrt(S[1]), math.sqrt(want), AIM, kernel)


def test_float64_loses_nothing() -> None:
    x = RNG.standard_normal(N) * 1e100
    for kernel in (*KERNELS, "core"):
        assert_relative(math.sqrt(kernel_sums(kernel, x, x)[0]), math.sqrt(exact_squares((1, x))), 1e-14, kernel)


def assert_third_norm(
    p: Any, g: Any, gamma: float, w: float, allowed: float, h: float | None = None, v: Any = None
) -> None:
    terms = [(gamma, g), (w, p)] + ([] if h is None else [(h, v)])
    want = math.sqrt(exact_squares(*terms))
    for kernel in (*KERNELS, "core"):
        ours = math.sqrt(kernel_sums(kernel, p, g, (gamma, w, h), v)[2])
        assert_relative(ours, want, allowed, f"{kernel}, third norm")


# How much is left of the decay: from all of it, over the border where float32 is given up, to rounding alone.
@pytest.mark.parametrize("left", [1.0, 0.5, 0.35, 0.34, 0.33, 0.3, 0.2, 0.1, 1e-2, 1e-4, 1e-6, 0.0])
@pytest.mark.parametrize("w", [1e-4, 0.3])
def test_third_norm_near_cancellation(left: float, w: float) -> None:
    p = gaussian(1.0)
    assert_third_norm(p, (-(1 - left) * w * p).astype(np.float32), 1.0, w, PROMISED)
    equal = np.full(N, 0.1, np.float32)  # errors that all go one way
    assert_third_norm(equal, (-(1 - left) * w * equal).astype(np.float32), 1.0, w, PROMISED)


def test_third_norm_where_only_one_block_cancels() -> None:
    p = gaussian(1.0)
    g = (-1e-4 * p).astype(np.float32)
    g[: N // 8] = 1.0
    assert_third_norm(p, g, 1.0, 1e-4, PROMISED)
    few = (-1e-4 * p).astype(np.float32)
    few[::50] += np.float32(1e-5)
    assert_third_norm(p, few, 1.0, 1e-4, PROMISED)


def test_third_norm_of_an_update_that_momentum_cancels() -> None:
    p, g = gaussian(1.0), gaussian(1.0)
    v = (-(g.astype(np.float64) + 1e-4 * p) / 0.9).astype(np.float32)
    assert_third_norm(p, g, 1.0, 1e-4, PROMISED, 0.9, v)
    assert_third_norm(p, (-1e-4 * p).astype(np.float32), 1.0, 1e-4, PROMISED, 0.9, gaussian(1e-7))
    assert_third_norm(p, (-1e-4 * p).astype(np.float32), 1.0, 1e-4, PROMISED, 0.9, gaussian(1e7))


@pytest.mark.parametrize("gamma", [1.0, 1 / 65_536, -3e-5, 1e4])
@pytest.mark.parametrize("scale", [1.0, 1e30, 1e-30, 1e-36])
def test_third_norm_of_rescaled_extremes(gamma: float, scale: float) -> None:
    p, g = gaussian(scale), gaussian(scale)
    assert_third_norm(p, g, gamma, 1e-4, PROMISED)
    assert_third_norm(p, g, gamma, 0.0, PROMISED)


def test_third_norm_below_the_normal_numbers_of_float32() -> None:
    # A gradient behind a loss scale, all of whose terms leave the normal range once they are rescaled.
    assert_third_norm(gaussian(1e-38), gaussian(1e-38), 1 / 65_536, 1e-5, PROMISED)


def test_third_norm_beyond_the_range_of_float32() -> None:
    largest = np.full(N, 3e38, np.float32)
    assert_third_norm(largest, largest, 1.0, 1.0, PROMISED)
    assert_third_norm(largest, -largest, 1.0, 1.0, 0.0)
    assert_third_norm(largest, gaussian(1.0), 1e4, 1e4, PROMISED)
