"""The host's part of the CUDA kernel: launches, and the tables that it writes to the device."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Iterator
from typing import Any

import cuda_on_cpu
import numpy as np
import pytest
from assertions import assert_same
from cuda_models import launched_names, numbers
from cuda_on_cpu import FarArray, far, gradients, kernel_of
from hypothesis import given
from hypothesis import strategies as st

from lars_array import LARS, RULES, NonFiniteError, Rule, kernels
from lars_array.kernels.cuda import tables
from lars_array.kernels.cuda.device import problem
from lars_array.kernels.cuda.kernel import Kernel
from lars_array.kernels.cuda.source import ELEMENTS, SLOTS, STRUCTURES, source
from lars_array.kernels.cuda.tables import PointerTable, piece_lengths, programs, split
from lars_array.kernels.tape import INPUTS, record

pytestmark = pytest.mark.skipif(bool(cuda_on_cpu.missing()), reason=str(cuda_on_cpu.missing()))

HYPER: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}
FLOAT32 = ("float32", "float32")


@pytest.fixture
def device() -> Iterator[cuda_on_cpu.Device]:
    with cuda_on_cpu.pretended() as found:
        yield found


THREE = ["sums", "coefficients", "apply"]


def test_a_step_is_three_launches_and_allocates_nothing(device: Any) -> None:
    optimizer = LARS(numbers(0), **HYPER)
    grads = numbers(1)
    optimizer.step(grads)
    launched_names(device)
    allocations = device.allocations
    for _ in range(3):
        with cuda_on_cpu.nothing_read():
            optimizer.step(grads)
        assert launched_names(device) == THREE
    assert device.allocations == allocations


def test_addresses_of_other_gradients_are_written(device: Any) -> None:
    params, here = numbers(0), [np.asarray(p).copy() for p in numbers(0)]
    optimizer, plain = LARS(params, **HYPER), LARS(here, **HYPER, kernel="portable")
    steps = [numbers(seed) for seed in range(1, 5)]  # all of them kept, so that none lies where another was
    for grads in steps:
        optimizer.step(grads)
        plain.step([np.asarray(g) for g in grads])
        assert launched_names(device) == ["write_pointers", *THREE]
    for p, q in zip(params, here, strict=True):
        np.testing.assert_array_equal(np.asarray(p), q)


def test_a_captured_step_writes_its_addresses(device: Any) -> None:
    """Else a replay would read those that later steps have left in the table."""
    optimizer = LARS(numbers(0), **HYPER)
    grads = numbers(1)
    optimizer.step(grads)
    launched_names(device)
    device.capturing = True
    optimizer.step(grads)
    assert launched_names(device) == ["write_pointers", *THREE]


def test_after_a_capture_addresses_are_always_written(device: Any) -> None:
    """A replay leaves the addresses of its own gradients in the table."""
    params, here = numbers(0), [np.asarray(p).copy() for p in numbers(0)]
    optimizer, plain = LARS(params, **HYPER), LARS(here, **HYPER, kernel="portable")
    captured, others = numbers(1), numbers(2)
    optimizer.step(captured)
    graph: list[Any] = []
    launch = device.launch
    device.capturing, device.launch = True, lambda *asked: graph.append(copy.deepcopy(asked)) or launch(*asked)
    optimizer.step(captured)
    device.capturing, device.launch = False, launch
    optimizer.step(others)
    for asked in graph:
        launch(*asked)
    optimizer.step(others)
    for grads in (captured, captured, others, captured, others):
        plain.step([np.asarray(g) for g in grads])
    assert_same([np.asarray(p) for p in params], here)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"max_grad_norm": 1.0}, ["sums", "gradient_norm", "coefficients", "apply"]),
        ({"rule": "optax"}, THREE),
        (
            {"max_grad_norm": 1.0, "rule": "optax"},
            ["sums", "gradient_norm", "sums", "coefficients", "apply"],
        ),
        ({"nonfinite": "propagate"}, THREE),
        ({"nonfinite": "skip", "momentum": 0}, THREE),
    ],
)
def test_what_is_launched(device: Any, options: dict[str, Any], expected: list[str]) -> None:
    optimizer = LARS(numbers(0), **(HYPER | options))
    grads = numbers(1)
    optimizer.step(grads)
    launched_names(device)
    optimizer.step(grads)
    assert launched_names(device) == expected


def test_parts_of_layers_cost_no_launch(device: Any) -> None:
    """But those of several types are left to arrays."""
    grads = numbers(1)
    optimizer = LARS({str(i): p for i, p in enumerate(numbers(0))}, **HYPER, layer_of={"0": "a", "2": "a"})
    optimizer.step(grads)
    launched_names(device)
    optimizer.step(grads)
    assert launched_names(device) == THREE
    assert optimizer.norms()["0"] == optimizer.norms()["2"] != optimizer.norms()["3"]
    params = {"0": far(np.ones(3)), "1": far(np.ones(5, np.float32))}
    here = {name: np.asarray(p).copy() for name, p in params.items()}
    for _ in range(2):
        LARS(params, **HYPER, layer_of=lambda name: "all").step([p * 0.5 for p in params.values()])
        LARS(here, **HYPER, layer_of=lambda name: "all", kernel="portable").step([p * 0.5 for p in here.values()])
    for name, p in here.items():
        np.testing.assert_allclose(np.asarray(params[name]), p, rtol=1e-6)


def test_groups_and_schedules_cost_no_launch(device: Any) -> None:
    params = numbers(0)
    groups = [{"params": params[:2], "rule": "timm", "lr": lambda t: 0.1 / (t + 1)}, {"params": params[2:]}]
    optimizer = LARS(groups, **HYPER)
    grads = numbers(1)
    for number in range(3):
        optimizer.step(grads)
        assert launched_names(device) == (["write_pointers"] if number == 0 else []) + THREE


def test_a_function_of_ones_own_is_brought_to_the_device_once(device: Any) -> None:
    def mine(S: Any, hyper: Any, xp: Any) -> Any:
        return RULES["flash"].function(S, hyper, xp)

    optimizer = LARS(numbers(0), **HYPER, rule=mine)
    grads = numbers(1)
    optimizer.step(grads)
    allocations = device.allocations
    optimizer.step(grads)
    assert device.allocations == allocations


def test_types_are_launched_one_after_the_other(device: Any) -> None:
    params = [*numbers(0, [5, 700]), *numbers(1, [3, 800], np.float64), *numbers(2, [0], np.float16)]
    here = [np.asarray(p).copy() for p in params]
    grads = [far(np.asarray(p) * 2) for p in params]
    LARS(params, **HYPER).step(grads)
    LARS(here, **HYPER, kernel="portable").step([np.asarray(g) for g in grads])
    for p, q in zip(params, here, strict=True):
        np.testing.assert_allclose(np.asarray(p), q, rtol=1e-6)
    launched = [name for name in launched_names(device) if name != "write_pointers"]
    assert launched == [
        "sums",
        "sums_float64_float64",
        "coefficients",
        "apply_float64_float64",
        "apply",
    ]


@pytest.mark.parametrize("policy", ["raise", "skip", "propagate"])
def test_a_model_of_nothing(device: Any, policy: str) -> None:
    optimizer = LARS(numbers(0, [0, 0]), **HYPER, nonfinite=policy)
    for _ in range(2):
        optimizer.step(numbers(0, [0, 0]))
    optimizer.synchronize()
    assert optimizer.steps == 2
    assert optimizer.state_dict()["state"]["0"]["previous_lr"] == 0.1


def test_ten_thousand_small_arrays(device: Any) -> None:
    sizes = [100] * 10_000
    params, grads = numbers(0, sizes), numbers(1, sizes)
    S = kernel_of(params, grads).sums(gradients(grads))
    expected = np.array(
        [[np.dot(x, x) for x in (np.asarray(p, np.float64), np.asarray(g, np.float64))] for p, g in zip(params, grads)]
    )
    np.testing.assert_allclose(np.asarray(S)[:, :2], expected, rtol=1e-13)
    assert dict(device.launches)["sums_float32_float32"] == 10_000
    assert launched_names(device).count("write_pointers") == -(
        -10_000 // STRUCTURES["Pointers"].fields["values"][0].shape[0]
    )


def test_any_number_of_addresses_is_written(device: Any) -> None:
    room = STRUCTURES["Pointers"].fields["values"][0].shape[0]
    for count in (1, room - 1, room, room + 1, 2 * room + 5):
        order = np.random.default_rng(0).permutation(count)
        table, addresses = PointerTable(device, order), np.arange(7, 7 + count)
        for expected in (-(-count // room), 0):
            table.write(addresses)
            assert_same(np.asarray(table.array), addresses[order].astype(np.uint64))
            assert len(launched_names(device)) == expected
        table.write(addresses, always=True)
        assert len(launched_names(device)) == -(-count // room)
        table.write(addresses[::-1])
        assert_same(np.asarray(table.array), addresses[::-1][order].astype(np.uint64))
        launched_names(device)


def test_arrays_that_are_not_dense_are_left_to_the_portable_kernel(device: Any) -> None:
    """Strided ones, and those whose gradient lies in another order; the others are launched all the same."""

    def arrays(seed: int) -> list[Any]:
        rng = np.random.default_rng(seed)
        wide, square = rng.standard_normal((6, 10)), rng.standard_normal((4, 4))
        return [far(rng.standard_normal(300)), far(wide)[:, ::2], far(square), far(np.asfortranarray(square + 1))]

    params, grads = arrays(0), arrays(1)
    grads[2] = far(np.asfortranarray(np.asarray(grads[2]))).view(FarArray)
    grads[2] = np.asfortranarray(np.asarray(grads[2])).view(FarArray)
    params[3], grads[3] = (np.asfortranarray(np.asarray(x[3])).view(FarArray) for x in (params, grads))
    here = [np.asarray(p).copy() for p in params]
    for rule in ("flash", "optax"):
        for _ in range(2):
            LARS(params, **HYPER, rule=rule).step(grads)
            LARS(here, **HYPER, rule=rule, kernel="portable").step([np.asarray(g) for g in grads])
    for p, q in zip(params, here, strict=True):
        np.testing.assert_allclose(np.asarray(p), q, rtol=1e-13)
    assert "sums_float64_float64" in launched_names(device)
    only = [far(np.ones((4, 4)))[:, ::2]]
    LARS(only, **HYPER).step([far(np.ones((4, 4)))[:, ::2]])
    assert launched_names(device) == []


def test_a_rule_without_a_tape_is_called(device: Any) -> None:
    def shared(S: Any, hyper: Any, xp: Any) -> Any:
        return RULES["flash"].function(S + 0 * xp.mean(S), hyper, xp)

    params, here = numbers(0), [np.asarray(p).copy() for p in numbers(0)]
    optimizer = LARS(params, **HYPER, rule=shared)
    plain = LARS(here, **HYPER, rule=shared, kernel="portable")
    for seed in (1, 2):
        optimizer.step(numbers(seed))
        plain.step([np.asarray(g) for g in numbers(seed)])
    for p, q in zip(params, here, strict=True):
        np.testing.assert_array_equal(np.asarray(p), q)
    assert launched_names(device)[-3:] == THREE


@pytest.mark.parametrize("policy", ["propagate", "raise"])
def test_gradients_are_not_kept(device: Any, policy: str) -> None:
    optimizer = LARS(numbers(0), **HYPER, nonfinite=policy)
    grads = numbers(1)
    for _ in range(2):
        optimizer.step(grads)
    known = [weakref.ref(g) for g in grads]
    del grads
    gc.collect()
    assert all(g() is None for g in known)


# -------------------------------------------------------------------------------------------------------------- tables


@given(st.lists(st.tuples(st.integers(0, 2**33), st.sampled_from(sorted(ELEMENTS))), min_size=1, max_size=12))
def test_pieces_cover_each_array_once(layers: list[tuple[int, str]]) -> None:
    sizes = np.array([size for size, _ in layers], np.int64)
    types = [(kind, kind) for _, kind in layers]
    table = split(sizes, types)
    assert sorted(table.order.tolist()) == list(range(len(sizes)))
    ends = []
    for number, layer in enumerate(table.order.tolist()):
        row, array = table.rows[layer], table.arrays[number]
        assert (array["row"], array["size"]) == (layer, sizes[layer])
        mine = table.pieces[row["first_piece"] : row["first_piece"] + row["pieces"]]
        assert mine["array"].tolist() == [number] * len(mine)
        assert mine["index"].tolist() == list(range(len(mine)))
        assert array["piece"] % tables.WIDTH == 0
        assert (len(mine) - 1) * array["piece"] < array["size"] <= len(mine) * array["piece"]
        assert len(mine) <= tables.MOST_PIECES
        ends.append(row["first_piece"] + row["pieces"])
    assert ends[-1] == len(table.pieces)
    assert sum(segment.pieces for segment in table.segments) == len(table.pieces)
    for segment in table.segments:
        for piece in range(segment.first, segment.first + min(segment.pieces, 3)):
            assert types[table.order[table.pieces[piece]["array"]]] == segment.types


def test_rows_of_one_layer_have_the_pieces_of_all_of_them() -> None:
    """And these are neighbours, although other rows, of the same types and of others, lie between."""
    length = tables.PIECE_LENGTH
    sizes = np.array([3 * length, 5, 2 * length, 0, length + 1], np.int64)
    types = [FLOAT32, ("float64", "float64"), FLOAT32, FLOAT32, FLOAT32]
    table = split(sizes, types, [[0, 4]])
    assert table.segments == [(FLOAT32, 0, 7), (("float64", "float64"), 7, 1)]
    assert table.rows["first_piece"][[0, 4]].tolist() == [0, 0]
    assert table.rows["pieces"].tolist() == [5, 1, 2, 0, 5]
    of_pieces = table.arrays["row"][table.pieces["array"]]
    assert of_pieces.tolist() == [0, 0, 0, 4, 4, 2, 2, 1]


def test_lengths_of_pieces_depend_on_sizes_alone() -> None:
    sizes = np.array([0, 1, 10**6, 10**9, 2**33])
    assert_same(piece_lengths(sizes)[3:4], piece_lengths(sizes[3:4]))
    assert piece_lengths(sizes)[:3].tolist() == [tables.PIECE_LENGTH] * 3


def test_programs_stand_one_after_the_other() -> None:
    rules = [RULES["flash"], RULES["optax"], RULES["bolts"]]
    tapes = [record(rule) for rule in rules]
    found = programs(rules, ["raise", "skip", "propagate"])
    assert found is not None and found.groups.dtype == STRUCTURES["Group"]
    for group, tape in zip(found.groups, tapes, strict=True):
        operations = found.operations[group["first_operation"] : group["last_operation"]]
        assert_same(operations, tape.operations.astype(np.int32))
        assert_same(found.constants[group["first_constant"] : group["last_constant"]], tape.constants)
        assert group["outputs"].tolist() == tape.outputs.tolist()
    assert found.groups["norm_of"].tolist() == [0, 1, 0]
    assert found.groups["policy"].tolist() == [0, 1, 2]
    assert len(found.operations) == len(tapes[0].operations) + len(tapes[1].operations), "each once"
    assert programs([RULES["flash"], Rule(lambda S, hyper, xp: xp.mean(S))], ["raise"] * 2) is None


def test_every_rule_has_room() -> None:
    """Registers fill the 48 KiB of shared memory that all devices have; NVRTC refuses more."""
    for name, rule in RULES.items():
        tape = record(rule)
        assert tape is not None and len(INPUTS) + len(tape.constants) + len(tape.operations) <= SLOTS, name


# --------------------------------------------------------------------------------------------------------- the source


def test_both_sides_have_the_same_structures() -> None:
    text = source([FLOAT32])
    for name, dtype in STRUCTURES.items():
        assert f"static_assert(sizeof({name}) == {dtype.itemsize}" in text
        for field in dtype.fields:
            assert f"static_assert(offsetof({name}, {field}) == {dtype.fields[field][1]}" in text
    assert STRUCTURES["Pointers"].itemsize + 8 <= 4096, "the limit of a launch"


def test_the_kernel_is_for_arrays_of_cupy() -> None:
    assert Kernel.unsupported_reason([np.ones(1)]) == "it takes CuPy arrays only, not ndarray"
    with pytest.raises(ValueError, match="kernel 'cuda' can't be used here: it takes CuPy arrays only, not ndarray"):
        LARS([np.ones(2)], lr=0.1, kernel="cuda")
    listed = dict((name, (usable, reason)) for name, usable, reason in kernels.report())
    reason = problem()
    assert listed["cuda"] == (reason is None, reason or Kernel.DESCRIPTION)


def test_gradients_of_another_width_may_have_the_strides_of_parameters(device: Any) -> None:
    p, g = far(np.ones(4)), far(np.arange(8, dtype=np.float32))[::2]
    assert p.strides == g.strides
    optimizer = LARS([p], lr=1.0)
    optimizer.step([g])
    optimizer.synchronize()
    assert np.asarray(p).tolist() == [1.0, -1.0, -3.0, -5.0]


@pytest.mark.parametrize("how", ["copied", "extended"])
def test_buffers_of_slices_that_a_rejected_step_made_do_not_count(how: str, device: Any) -> None:
    p = far(np.ones((2, 3), np.float32))
    optimizer = LARS({"w": p}, lr=0.5, momentum=0.9, dampening=0.5, layer_axes=1)
    optimizer.step([far(np.full((2, 3), np.nan, np.float32))])
    with pytest.raises(NonFiniteError):
        optimizer.synchronize()
    grads = {"w": far(np.ones((2, 3), np.float32))}
    if how == "copied":
        optimizer = copy.deepcopy(optimizer)
    else:
        optimizer.add_param_group({"params": {"v": far(np.ones(3, np.float32))}, "layer_axes": 0})
        grads["v"] = far(np.ones(3, np.float32))
    assert "momentum_buffer" not in optimizer.state_dict()["state"]["w"]
    for expected in (1.0, 1.4):
        optimizer.step(grads)
        found = np.asarray(optimizer.state_dict()["state"]["w"]["momentum_buffer"])
        np.testing.assert_allclose(found, np.full((2, 3), expected), rtol=1e-6)


def test_numbers_that_a_graph_writes_are_written_again(device: Any) -> None:
    """What is launched and written while capturing is done at a replay."""
    graph: list[Any] = []
    launch = device.launch

    class Recorded(FarArray):
        def __setitem__(self, key: Any, value: Any) -> None:
            def write() -> None:
                np.ndarray.__setitem__(self, key, value)

            graph.append(write) if device.capturing else write()

    def launching(*asked: Any) -> None:
        kept = [copy.deepcopy(x) if type(x) is np.ndarray else x for x in asked]
        graph.append(lambda: launch(*kept)) if device.capturing else launch(*kept)

    device.launch = launching
    p, grads = far(np.zeros(1)), [far(np.ones(1))]
    optimizer = LARS([p], lr=1.0, nonfinite="propagate")

    def moved(do: Any) -> float:
        before = np.asarray(p)[0]
        do()
        return round(float(before - np.asarray(p)[0]), 6)

    assert moved(lambda: optimizer.step(grads)) == 1.0
    state: Any = optimizer._state.device
    state.hyper = state.hyper.view(Recorded)
    optimizer.param_groups[0]["lr"] = 10.0
    device.capturing = True
    assert moved(lambda: optimizer.step(grads)) == 0.0
    device.capturing = False
    assert moved(lambda: optimizer.step(grads)) == 10.0
    optimizer.param_groups[0]["lr"] = 100.0
    assert moved(lambda: optimizer.step(grads)) == 100.0
    assert moved(lambda: [do() for do in graph]) == 10.0
    assert moved(lambda: optimizer.step(grads)) == 100.0
