"""The schedules against formulas written here, against optax and MLPerf, and as values."""

import copy
import math
import pickle
import sys
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lars_array.schedules import linear_scaled_lr, warmup_cosine, warmup_polynomial

SCHEDULES = [
    warmup_cosine(3.2, total_steps=90, warmup_steps=20, end_lr=0.01, start_lr=0.1),
    warmup_polynomial(31.2, total_steps=90, warmup_steps=20, power=1.5, start_lr=0.1),
    warmup_cosine(1.0, total_steps=90),
    warmup_polynomial(1.0, total_steps=90, warmup_steps=90),
]

rates = st.floats(0.0, 100.0)
each_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)


@st.composite
def schedules(draw):
    total_steps = draw(st.integers(1, 500))
    fields = {
        "peak_lr": draw(rates),
        "total_steps": total_steps,
        "warmup_steps": draw(st.integers(0, total_steps)),
        "end_lr": draw(rates),
        "start_lr": draw(rates),
    }
    if draw(st.booleans()):
        return warmup_cosine(**fields)
    return warmup_polynomial(**fields, power=draw(st.floats(0.1, 8.0)))


def test_cosine_is_the_formula():
    lr = warmup_cosine(3.2, total_steps=100, warmup_steps=10, end_lr=0.2, start_lr=0.4)
    for step in range(10):
        assert lr(step) == pytest.approx(0.4 + (3.2 - 0.4) * step / 10, rel=1e-14)
    for step in range(10, 101):
        cosine = math.cos(math.pi * (step - 10) / 90)
        assert lr(step) == pytest.approx(0.2 + (3.2 - 0.2) * (1 + cosine) / 2, rel=1e-14)


def test_polynomial_is_the_formula():
    lr = warmup_polynomial(3.2, total_steps=100, warmup_steps=10, end_lr=0.2, power=3.0, start_lr=0.4)
    for step in range(10):
        assert lr(step) == pytest.approx(0.4 + (3.2 - 0.4) * step / 10, rel=1e-14)
    for step in range(10, 101):
        assert lr(step) == pytest.approx((3.2 - 0.2) * (1 - (step - 10) / 90) ** 3 + 0.2, rel=1e-14)


def test_polynomial_is_mlperf():
    """PolynomialDecayWithWarmup._get_learning_rate of mlcommons/training, retired_benchmarks/resnet-tf2."""
    train_steps, warmup_steps, peak_lr, end_lr = 200, 50, 31.2, 1e-4
    lr = warmup_polynomial(peak_lr, train_steps + 1, warmup_steps)
    for step in range(train_steps + 5):
        if step <= warmup_steps:
            expected = peak_lr * step / warmup_steps
        else:
            decay_steps = train_steps - warmup_steps + 1
            fraction = min(max(step - warmup_steps, 1), decay_steps) / decay_steps
            expected = (peak_lr - end_lr) * (1 - fraction) ** 2.0 + end_lr
        assert lr(step) == pytest.approx(expected, rel=1e-12)


def test_schedules_agree_with_optax():
    optax = pytest.importorskip("optax")
    jax = pytest.importorskip("jax")
    with jax.enable_x64(True):
        cosine = optax.warmup_cosine_decay_schedule(0.1, 3.2, warmup_steps=20, decay_steps=90, end_value=0.01)
        polynomial = optax.join_schedules(
            [optax.linear_schedule(0.1, 3.2, 20), optax.polynomial_schedule(3.2, 0.01, 1.5, 70)], [20]
        )
        ours = {"peak_lr": 3.2, "total_steps": 90, "warmup_steps": 20, "end_lr": 0.01, "start_lr": 0.1}
        for step in range(100):
            assert warmup_cosine(**ours)(step) == pytest.approx(float(cosine(step)), rel=1e-12)
            assert warmup_polynomial(**ours, power=1.5)(step) == pytest.approx(float(polynomial(step)), rel=1e-12)


@given(schedules())
def test_the_corners_are_met_exactly(lr):
    if lr.warmup_steps > 0:
        assert lr(0) == lr.start_lr
    assert lr(lr.warmup_steps) == lr.peak_lr
    assert lr(lr.total_steps + 1) == lr(10 * lr.total_steps) == lr.end_lr
    if lr.warmup_steps < lr.total_steps:
        assert lr(lr.total_steps) == lr.end_lr


@given(schedules(), st.integers(0, 600))
def test_rates_lie_between_the_corners(lr, step):
    corners = (lr.start_lr, lr.peak_lr, lr.end_lr)
    assert min(corners) * (1 - 1e-15) <= lr(step) <= max(corners) * (1 + 1e-15)


@given(schedules())
def test_rates_go_from_corner_to_corner_without_turning(lr):
    values = lr(np.arange(lr.total_steps + 2.0))
    rounding = 1e-15 * values.max()
    up, down = np.diff(values[: lr.warmup_steps + 1]), np.diff(values[lr.warmup_steps :])
    assert np.all(up * np.sign(lr.peak_lr - lr.start_lr) >= -rounding)
    assert np.all(down * np.sign(lr.end_lr - lr.peak_lr) >= -rounding)


@each_schedule
@pytest.mark.parametrize("kind", ["int64", "int32", "float64", "float32"])
def test_array_steps_give_arrays_of_their_namespace(xp, schedule, kind):
    steps = [0, 1, 19, 20, 21, 55, 90, 91]
    values = schedule(xp.asarray(steps, dtype=getattr(xp, kind)))
    default = xp.asarray(0.0).dtype
    assert type(values) is type(xp.asarray(0.0))
    assert values.dtype == (getattr(xp, kind) if kind.startswith("float") else default)
    tolerance = 1e-12 if values.dtype == xp.float64 else 1e-5
    assert [float(value) for value in values] == pytest.approx([schedule(step) for step in steps], rel=tolerance)
    assert schedule(xp.asarray(7)).shape == ()


@each_schedule
@pytest.mark.parametrize("wide", [True, False])
def test_a_traced_step_gives_the_same(schedule, wide):
    jax = pytest.importorskip("jax")
    with jax.enable_x64(wide):
        traced = jax.jit(schedule)
        for step in (0, 1, 19, 20, 21, 55, 90, 91):
            assert float(traced(step)) == pytest.approx(schedule(step), rel=1e-12 if wide else 1e-5)


@each_schedule
def test_a_schedule_is_a_value(schedule):
    for twin in (
        copy.deepcopy(schedule),
        pickle.loads(pickle.dumps(schedule)),
        eval(repr(schedule)),  # The repr is the call that makes it.
    ):
        assert twin == schedule
        assert hash(twin) == hash(schedule)
    assert [other for other in SCHEDULES if other == schedule] == [schedule]
    with pytest.raises(AttributeError):
        schedule.peak_lr = 1.0


def test_numpy_numbers_become_python_numbers():
    schedule = warmup_cosine(np.float32(0.5), np.int64(9), warmup_steps=np.int32(3), end_lr=Fraction(1, 4))
    assert repr(schedule) == "warmup_cosine(peak_lr=0.5, total_steps=9, warmup_steps=3, end_lr=0.25, start_lr=0.0)"
    assert type(schedule(np.int64(4))) is float
    assert type(warmup_polynomial(1, 9, power=np.float32(3.0)).power) is float


def test_linear_scaling():
    assert linear_scaled_lr(0.1, 8192) == pytest.approx(3.2, rel=1e-15)
    assert linear_scaled_lr(0.3, 4096, base_batch_size=4096) == 0.3


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"peak_lr": -1.0}, ValueError, "peak_lr must be finite and at least 0, got -1.0"),
        ({"peak_lr": math.nan}, ValueError, "peak_lr must be finite and at least 0, got nan"),
        ({"end_lr": math.inf}, ValueError, "end_lr must be finite and at least 0, got inf"),
        ({"start_lr": "0"}, TypeError, "start_lr must be a real number, got '0'"),
        ({"peak_lr": True}, TypeError, "peak_lr must be a real number, got True"),
        ({"total_steps": 0}, ValueError, "total_steps must be at least 1, got 0"),
        ({"total_steps": 10.0}, TypeError, "total_steps must be an integer, got 10.0"),
        ({"warmup_steps": -1}, ValueError, "warmup_steps must be at least 0, got -1"),
        ({"warmup_steps": 11}, ValueError, "warmup_steps must be at most total_steps=10, got 11"),
        ({"power": 0}, ValueError, "power must be finite and more than 0, got 0"),
        ({"power": math.nan}, ValueError, "power must be finite and more than 0, got nan"),
    ],
    ids=str,
)
def test_arguments_are_checked(arguments, error, message):
    for schedule in (warmup_polynomial, warmup_cosine) if "power" not in arguments else (warmup_polynomial,):
        with pytest.raises(error, match=f"^{message}$"):
            schedule(**{"peak_lr": 1.0, "total_steps": 10, **arguments})


@pytest.mark.parametrize(
    ("step", "error", "message"),
    [
        (-1, ValueError, "step must be at least 0, got -1"),
        (True, TypeError, "step must be an integer, got True"),
        (1.5, TypeError, "step must be an integer or an array, got 1.5"),
        ("1", TypeError, "step must be an integer or an array, got '1'"),
    ],
)
def test_the_step_is_checked(step, error, message):
    with pytest.raises(error, match=f"^{message}$"):
        warmup_cosine(1.0, 10)(step)


@pytest.mark.parametrize("name", ["base_lr", "batch_size", "base_batch_size"])
def test_linear_scaling_checks_its_arguments(name):
    with pytest.raises(ValueError, match=f"^{name} must be .*at least [01], got -1$"):
        linear_scaled_lr(**{"base_lr": 0.1, "batch_size": 256, name: -1})


@pytest.mark.parametrize("name", ["total_steps", "warmup_steps"])
def test_counts_are_those_that_the_machine_can_hold(name):
    steps = {"total_steps": sys.maxsize} | {name: sys.maxsize + 1}
    with pytest.raises(ValueError) as caught:
        warmup_cosine(1.0, **steps)
    assert str(caught.value) == f"{name} must be at most {sys.maxsize}, got {sys.maxsize + 1}"
