"""A step in one launch: its tasks, when it is used, and that its bits are those of three launches."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import cuda_on_cpu
import numpy as np
import pytest
from bits_cases import SCENARIOS, Scenario
from bits_runs import InPlace, taken
from cuda_bodies import BODIES, Place
from cuda_models import launched_names, numbers
from cuda_on_cpu import PAIRS, far
from hypothesis import example, given
from hypothesis import strategies as st

from lars_array import LARS, NonFiniteError
from lars_array.kernels.cuda import one_launch, tables
from lars_array.kernels.cuda.one_launch import is_wanted, one_launch_source, order_tasks, split_into_units
from lars_array.kernels.cuda.source import pair_name

pytestmark = pytest.mark.skipif(bool(cuda_on_cpu.missing()), reason=str(cuda_on_cpu.missing()))

HYPER: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4, "nonfinite": "propagate"}
ONE, THREE = ["step"], ["sums", "coefficients", "apply"]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "PIECE_LENGTH", 156)
    monkeypatch.setattr(one_launch, "UNIT_PIECES", 3)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[cuda_on_cpu.Device]:
    monkeypatch.setenv("LARS_ARRAY_CUDA", "one-launch")
    with cuda_on_cpu.pretended() as found:
        yield found


def names(device: cuda_on_cpu.Device) -> list[str]:
    """Return the names of what was launched since this was asked last, but not of what writes pointers."""
    return [name for name in launched_names(device) if name != "write_pointers"]


# --------------------------------------------------------------------------------------------------------------- tasks

LAYERS = st.lists(st.integers(0, 9), min_size=1, max_size=20).filter(any)


@given(LAYERS, st.integers(0, 2000), st.integers(1, 60))
def test_every_piece_is_measured_and_then_updated_within_the_share(layers: list[int], share: int, last: int) -> None:
    units = np.repeat(np.arange(len(layers)), layers)
    lengths = np.full(len(units), 100)
    lengths[np.cumsum(layers)[np.array(layers) > 0] - 1] = last  # the last piece of each is shorter
    tasks = order_tasks(lengths, units, share).tolist()
    assert [x for x in tasks if x >= 0] == list(range(len(units))), "each once, from the first on"
    assert [~x for x in tasks if x < 0] == list(range(len(units)))
    whole = np.bincount(units, lengths)
    measured, held = np.zeros(len(layers), int), 0
    for position, task in enumerate(tasks):
        piece = max(task, ~task)
        unit = units[piece]
        counts = lengths[piece] if whole[unit] <= share else 0
        if task >= 0:
            measured[unit] += 1
            held += counts
            assert held <= share
        else:
            assert measured[unit] == layers[unit], "all of its sums stand before it"
            held -= counts
            waiting = next(
                (x for x in tasks[position:] if x >= 0), None
            )  # it was not updated earlier than it had to be
            if waiting is not None:
                assert held + counts + lengths[waiting] * (whole[units[waiting]] <= share) > share
    assert held == 0


def test_sums_run_ahead_of_updates() -> None:
    tasks = order_tasks(np.full(6, 10), np.array([0, 0, 1, 2, 2, 3]), 40)
    assert tasks.tolist() == [0, 1, 2, 3, ~0, 4, ~1, 5, ~2, ~3, ~4, ~5]
    assert order_tasks(np.full(4, 10), np.array([0, 0, 0, 1]), 25).tolist() == [0, 1, 2, 3, ~0, ~1, ~2, ~3]


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 3)), min_size=1, max_size=40))
@example([(1, 1), *[(0, 1)] * 9])
def test_small_layers_share_a_unit(layers: list[tuple[int, int]]) -> None:
    """Layers of some pieces and some arrays."""
    pieces = [count for count, arrays in layers for _ in range(arrays)]
    starts = np.cumsum([0, *(count for count, _ in layers)])[:-1]
    firsts = [int(start) for start, (_, arrays) in zip(starts, layers) for _ in range(arrays)]
    units = split_into_units(firsts, pieces)
    layer_of = [i for i, (_, arrays) in enumerate(layers) for _ in range(arrays)]
    assert all(b - a in (0, 1) for a, b in zip([0, *units], units))
    for i, (count, _) in enumerate(layers):
        assert count == 0 or len({unit for unit, layer in zip(units, layer_of) if layer == i}) == 1
    for unit in range(units[-1] + 1):
        inside = sorted({layer for own, layer in zip(units, layer_of) if own == unit})
        counts = [layers[layer][0] for layer in inside if layers[layer][0]]
        assert len(counts) == 1 or sum(counts) <= one_launch.UNIT_PIECES
        assert counts or not any(pieces), "a unit without a piece has nothing that is measured last"


# -------------------------------------------------------------------------------------------------- when it is used


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ONE),
        ({"rule": "optax"}, ONE),
        ({"rule": "mxnet", "momentum": 0.5}, ONE),
        ({"layer_of": {"0": "a", "2": "a"}.get}, ONE),
        ({"nonfinite": "skip"}, THREE),
        ({"nonfinite": "raise"}, THREE),
        ({"max_grad_norm": 1.0}, ["sums", "gradient_norm", "coefficients", "apply"]),
    ],
)
def test_one_launch_is_for_steps_that_nothing_can_reject(device: Any, options: Any, expected: list[str]) -> None:
    optimizer = LARS({str(i): p for i, p in enumerate(numbers(0))}, **(HYPER | options))
    grads = numbers(1)
    for _ in range(3):
        optimizer.step(grads)
        found = names(device)
    assert found == expected
    allocations = device.allocations
    with cuda_on_cpu.nothing_read():
        optimizer.step(grads)
    assert device.allocations == allocations


def test_several_types_and_models_of_nothing_take_three_launches(device: Any) -> None:
    for params in ([*numbers(0), *numbers(0, dtype=np.float64)], numbers(0, [0, 0])):
        LARS(params, **HYPER).step([p * 1 for p in params])
        assert "coefficients" in names(device)
    mixed = [*numbers(0), *numbers(0, [0], np.float64)]  # an empty array has no piece whose type counts
    LARS(mixed, **HYPER).step([p * 1 for p in mixed])
    assert names(device) == ONE


def test_it_is_used_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, expected in (("", False), ("three-launches", False), ("one-launch", True)):
        monkeypatch.setenv("LARS_ARRAY_CUDA", value)
        assert is_wanted() == expected
    monkeypatch.delenv("LARS_ARRAY_CUDA")
    assert not is_wanted()
    monkeypatch.setenv("LARS_ARRAY_CUDA", "two")
    params = numbers(0)
    with (
        cuda_on_cpu.pretended(),
        pytest.raises(ValueError, match="LARS_ARRAY_CUDA must be one-launch or three-launches; got 'two'"),
    ):
        LARS(params, **HYPER).step(numbers(1))
    assert [p.tobytes() for p in params] == [p.tobytes() for p in numbers(0)]


def test_the_cache_decides_on_the_order_of_tasks(device: Any) -> None:
    """None is better than one that holds less than blocks work on at once: they would wait for each other."""
    found = []
    enough = int(7_500 / one_launch.SHARE)
    for cache, multiprocessors in ((0, 2), (enough, 2), (enough, 50)):
        device.cache_bytes, device.multiprocessors = cache, multiprocessors
        optimizer = LARS(numbers(0, [700, 300, 700, 300]), **HYPER)
        optimizer.step(numbers(1, [700, 300, 700, 300]))
        plan: Any = optimizer._stepper._programs[0]._kernel._steps[1].one_launch
        found.append(np.asarray(plan._own[0]).view(np.int32)[::2].tolist())
    assert found[0] == found[2] == [*range(14), *(~i for i in range(14))]
    assert found[1].index(~0) < 13 and sorted(found[1]) == sorted(found[0])


# ---------------------------------------------------------------------------------------------------------------- bits


def allowed(scenario: Scenario) -> bool:
    """Return whether the steps of a scenario of dense arrays take one launch."""
    options = [scenario.options, *(own for _, own in scenario.groups)]
    return (
        scenario.name != "own rule over all layers"
        and all(own.get("max_grad_norm") is None for own in options)
        and scenario.dtype != "mixed"
    )


ON_CUDA = [scenario for scenario in SCENARIOS if "cuda" in scenario.on]


@pytest.mark.parametrize("scenario", ON_CUDA, ids=lambda scenario: scenario.name)
def test_bits_are_those_of_three_launches(scenario: Scenario, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters, buffers, masters, norms, trust ratios and counts, where nothing is rejected."""
    groups = tuple((group, own | {"nonfinite": "propagate"}) for group, own in scenario.groups)
    scenario = scenario._replace(options=scenario.options | {"nonfinite": "propagate"}, groups=groups)
    found, launched = [], []
    for number, asked in enumerate(("three-launches", "one-launch", "one-launch")):
        monkeypatch.setenv("LARS_ARRAY_CUDA", asked)
        with cuda_on_cpu.pretended(order=number) as device, np.errstate(all="ignore"):
            results = taken(lambda scenario: InPlace(scenario, "cuda", place=far), scenario)
        found.append({key: x.tobytes() for key, x in results.items()})
        launched.append({name.split("_")[0] for name, _ in device.launches} - {"write"})
    assert found[0] == found[1] == found[2]
    assert launched[0] <= {"sums", "gradient", "coefficients", "apply"}
    if scenario.layout == scenario.g_layout == "C":
        assert (launched[1] == {"step"}) == allowed(scenario), launched[1]


def test_most_scenarios_take_one_launch() -> None:
    assert sum(map(allowed, ON_CUDA)) > 80
    assert {(s.dtype, s.g_dtype or s.dtype) for s in ON_CUDA if allowed(s)} >= set(PAIRS)


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__)
def test_bodies_of_the_tests_on_a_gpu(body: Any, device: Any) -> None:
    """Those that may reject steps take three launches, here too."""
    body(Place(far, np.asarray))


def test_a_rejected_step_leaves_nothing_to_the_next(device: Any) -> None:
    """In the same tables. Its error comes later, and is not that of what the next step finds."""
    params, here = numbers(0), [np.asarray(p).copy() for p in numbers(0)]
    optimizer = LARS({str(i): p for i, p in enumerate(params)}, **HYPER | {"nonfinite": "raise"})
    plain = LARS(here, **HYPER, kernel="portable")
    bad = numbers(1)
    bad[2][3] = np.nan
    optimizer.step(bad)
    names(device)
    optimizer.param_groups[0]["nonfinite"] = "propagate"
    for seed in (2, 3):
        optimizer.step(numbers(seed))
        plain.step([np.asarray(g) for g in numbers(seed)])
        assert names(device) == ONE
    with pytest.raises(NonFiniteError, match="the norm of the gradient of '2' was not finite in an earlier step"):
        optimizer.synchronize()
    assert (optimizer.steps, optimizer.skipped_steps) == (2, 0)
    for p, q in zip(params, here, strict=True):
        np.testing.assert_allclose(np.asarray(p), q, rtol=1e-6)


def test_a_graph_replays_the_launch(device: Any) -> None:
    """The same arguments again and again: counters are as they were."""
    params, others = numbers(0), numbers(0)
    optimizer, plain = LARS(params, **HYPER), LARS(others, **HYPER)
    grads = numbers(1)
    optimizer.step(grads)
    graph: list[Any] = []
    launch = device.launch
    device.capturing, device.launch = True, lambda *asked: graph.append(copy.deepcopy(asked))
    optimizer.step(grads)
    device.capturing, device.launch = False, launch
    for _ in range(3):
        for asked in graph:
            launch(*asked)
    assert [name for name, *_ in graph] == ["write_pointers", "step_float32_float32"]
    for _ in range(4):
        plain.step(grads)
    assert [p.tobytes() for p in params] == [p.tobytes() for p in others]


def test_the_source_has_a_kernel_for_each_two_types() -> None:
    text = one_launch_source(PAIRS)
    for pair in PAIRS:
        assert text.count(f"void __launch_bounds__(THREADS) {pair_name('step', *pair)}(Model m, Plan plan)") == 1
