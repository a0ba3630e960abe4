"""Steps that write the new parameters elsewhere: the bits of steps in place, and nothing else is written to."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import array_api_strict
import ml_dtypes
import numpy as np
import pytest
from assertions import assert_close, assert_same, fingerprint
from moving import HYPER, SHAPES, Pair, numbers, room_for
from references import LAYOUTS, gaussian

import lars_array.moves
from lars_array import LARS, RULES, kernels, param_groups
from lars_array.gradients import Fit
from lars_array.kernels import NUMPY_KERNELS as KERNELS
from lars_array.kernels import blocked, compiled, table

TYPES: dict[str, Any] = {
    "f8": "f8",
    "f4": "f4",
    "f2": "f2",
    "bf16": ml_dtypes.bfloat16,
    "c8": "c8",
}
WAYS: dict[str, dict[str, Any]] = {
    "raise": {},
    "propagate": {"nonfinite": "propagate"},
    "nesterov": {"nesterov": True},
    "no momentum": {"momentum": 0},
    "no momentum, propagate": {"momentum": 0, "nonfinite": "propagate"},
    "clipped": {"max_grad_norm": 0.5, "rule": "optax", "nonfinite": "propagate"},
    "masters": {"master_weights": True},
    "masters, propagate": {"master_weights": True, "nonfinite": "propagate", "momentum": 0},
    "joined": {"layer_of": {"w": "layer", "b": "layer"}},
}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("way", WAYS)
def test_a_step_elsewhere_has_the_bits_of_one_in_place(way: str, dtype: str, kernel: str) -> None:
    pair = Pair(numbers(0, TYPES[dtype]), **HYPER | WAYS[way], kernel=kernel)
    for seed in range(1, 4):
        pair.step(numbers(seed, TYPES[dtype]))


@pytest.mark.parametrize("rule", RULES)
def test_every_rule(rule: str) -> None:
    pair = Pair(numbers(0), **HYPER, rule=rule)
    for seed in range(1, 4):
        pair.step(numbers(seed))


@pytest.mark.parametrize("kernel", KERNELS)
def test_several_types_and_stacks_at_once(kernel: str) -> None:
    params = numbers(0)
    params |= {"half": gaussian(np.random.default_rng(1), (70, 3), "f2"), "w": params["w"].astype("f8")}

    def grouped(given: dict[str, Any]) -> list[dict[str, Any]]:
        stacked = {"params": {name: given[name] for name in ("w", "half")}, "layer_axes": 1, "master_weights": True}
        return [stacked, {"params": {name: p for name, p in given.items() if name not in ("w", "half")}}]

    order = ["w", "half", "b", "none", "one", "large"]
    pair = Pair({name: params[name] for name in order}, grouped, **HYPER, kernel=kernel)
    for seed in range(1, 4):
        rng = np.random.default_rng(seed)
        pair.step({name: gaussian(rng, params[name].shape, "f4") for name in order})


@pytest.mark.parametrize("kernel", KERNELS)
def test_parameters_without_a_gradient_stay(kernel: str) -> None:
    pair = Pair(numbers(0), **HYPER, kernel=kernel)
    for seed, missing in enumerate([(), ("b",), ("b", "w"), (), ("large",), ("large",), tuple(SHAPES), ()]):
        pair.step(numbers(seed) | dict.fromkeys(missing))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("there", LAYOUTS)
@pytest.mark.parametrize("here", LAYOUTS)
def test_layouts(here: str, there: str, kernel: str) -> None:
    """Of both sets of arrays, and the way back."""
    if "big-endian" in (here, there) and here != there:
        return  # another dtype
    for shape in ((5, 7, 3), (4, 1, 6), ()):
        p = gaussian(np.random.default_rng(0), shape, "f4")
        now, room, plain = LAYOUTS[here](p), LAYOUTS[there](np.zeros_like(p)), p.astype("f8")
        ours = LARS([now], **HYPER, kernel=kernel)
        theirs = LARS([plain], **HYPER, kernel="portable")
        for seed in range(1, 5):
            g = gaussian(np.random.default_rng(seed), shape, "f4")
            before = now.tobytes()
            ours.step([LAYOUTS[here](g)], out=[room])
            theirs.step([g.astype("f8")])
            assert now.tobytes() == before
            now, room = room, now
            assert_close(now, plain, 1e-6)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("of_g", ["C", "Fortran"])
def test_layouts_may_change_from_step_to_step(of_g: str, kernel: str) -> None:
    rng = np.random.default_rng(0)
    here = [gaussian(rng, shape, "f4") for shape in ((5, 7, 3), (40, 30))]
    grads = [LAYOUTS[of_g](gaussian(rng, p.shape, "f4")) for p in here]
    plain = [p.astype("f8") for p in here]
    ours, theirs = LARS(here, **HYPER, kernel=kernel), LARS(plain, **HYPER, kernel="portable")
    wide = [g.astype("f8") for g in grads]
    for layout in "C C Fortran Fortran C C unaligned C strided strided strided here C".split():
        out = None if layout == "here" else [LAYOUTS[layout](np.zeros_like(p)) for p in here]
        ours.step(grads, out=out)
        theirs.step(wide)
        for p, q in zip(ours.param_groups[0]["params"], plain, strict=True):
            assert_close(p, q, 1e-6)


def test_what_has_moved_where_it_lies_densely_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = LARS([LAYOUTS["strided"](np.ones((4, 5)))], **HYPER, kernel="compiled")
    grads = [np.ones((4, 5))]
    optimizer.step(grads)
    optimizer.step(grads, out=[np.zeros((4, 5))])
    for way in ("sums", "apply"):
        monkeypatch.delattr(blocked.Kernel, way)
    optimizer.step(grads, out=[np.zeros((4, 5))])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", ["f4", "f2"])
def test_kernels_only_read_what_moves(dtype: str, kernel: str) -> None:
    for layout in ("C", "strided"):
        p, g, v = (LAYOUTS[layout](np.ones(5, kind)) for kind in (dtype, dtype, "f4"))
        x = np.zeros(5, dtype)
        p.flags.writeable = False
        kernels.pick([p], kernel)([p], [v], np).apply([g], np.full((1, 6), 0.25), None, [x])
        np.testing.assert_array_equal(x, np.full(5, 1 - 0.25 * (0.75 + 1 + 1), dtype))


@pytest.mark.parametrize("kernel", KERNELS)
def test_what_lies_beside_is_let_be(kernel: str) -> None:
    """Columns in turn: their stretches of memory overlap, they don't."""
    for dtype in ("f4", "f2"):
        whole, grads = np.zeros((300, 6), dtype), np.ones((300, 2), dtype)
        whole[:, ::3], whole[:, 1::3] = 1, 5
        optimizer = LARS([whole[:, ::3]], **HYPER, kernel=kernel)
        for k in (2, 0, 2):
            untouched = whole[:, [c for c in range(6) if c % 3 != k]].tobytes()
            optimizer.step([grads], out=[whole[:, k::3]])
            assert whole[:, [c for c in range(6) if c % 3 != k]].tobytes() == untouched
        np.testing.assert_array_equal(whole[:, 1::3], 5)
        plain = np.ones((300, 2), dtype)
        theirs = LARS([plain], **HYPER, kernel="portable")
        for _ in range(3):
            theirs.step([grads])
        assert_close(whole[:, 2::3], plain, 1e-3)


@pytest.mark.parametrize("kernel", KERNELS)
def test_in_place_and_elsewhere_in_turn(kernel: str) -> None:
    pair = Pair(numbers(0), **HYPER, kernel=kernel)
    for seed in range(1, 7):
        if seed % 3:
            pair.step(numbers(seed))
        else:
            for optimizer in (pair.plain, pair.moving):
                optimizer.step(numbers(seed))
            pair.assert_same()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("missing", [(), ("b",)])
def test_options_may_change_once_parameters_have_moved(missing: tuple[str, ...], kernel: str) -> None:
    """Which has the kernel made anew, of the arrays as they are then."""
    pair = Pair(numbers(0, "f2"), **HYPER | {"momentum": 0}, kernel=kernel)
    for seed, change in enumerate([{}, {}, {"momentum": 0.9}, {"master_weights": True}, {"momentum": 0}]):
        for optimizer in (pair.plain, pair.moving):
            optimizer.param_groups[0].update(change)
        pair.step(numbers(seed, "f2") | dict.fromkeys(missing))


def test_a_checkpoint_and_copies_in_between() -> None:
    pair = Pair(numbers(0), **HYPER)
    pair.step(numbers(1))
    for optimizer in (pair.plain, pair.moving):
        optimizer.load_state_dict(optimizer.state_dict())
    pair.step(numbers(2))
    for copied in (copy.deepcopy(pair.moving), pickle.loads(pickle.dumps(pair.moving))):
        mine = dict(zip(SHAPES, copied.param_groups[0]["params"]))
        assert all(mine[name] is not p for name, p in pair.now.items())
        room = room_for(mine)
        copied.step(numbers(3), out=room)
        theirs = copy.deepcopy(pair.plain)
        theirs.step(numbers(3))
        assert_same(list(room.values()), theirs.param_groups[0]["params"])
    pair.step(numbers(3))
    for optimizer in (pair.plain, pair.moving):
        more = {"params": {"more": np.ones(3, "f4")}}
        optimizer.add_param_group(more)
        for found in (pair.staying, pair.now) if optimizer is pair.plain else (pair.now,):
            found["more"] = optimizer.param_groups[1]["params"][0]
    pair.staying["more"], pair.room["more"] = pair.plain.param_groups[1]["params"][0], np.zeros(3, "f4")
    pair.step(numbers(4) | {"more": np.ones(3, "f4")})


def test_out_goes_in_the_order_in_which_parameters_were_given() -> None:
    params = [np.ones(3), np.ones((2, 2)), np.ones(4)]  # in two groups, the matrix first
    there = [np.zeros_like(p) for p in params]
    optimizer = LARS(param_groups(params, weight_decay=0.1), lr=0.5)
    optimizer.step([p * k for k, p in enumerate(params, 1)], out=iter(there))
    optimizer.step([p * 0 for p in params], out=[np.zeros_like(p) for p in params])
    plain = LARS(param_groups(params, weight_decay=0.1), lr=0.5)
    plain.step([p * k for k, p in enumerate(params, 1)])
    assert_same(there, params)


def test_a_closure_may_give_the_gradients() -> None:
    p, q = np.ones(3), np.zeros(3)
    assert LARS([p], lr=0.5).step(closure=lambda: (3.0, [p]), out=[q]) == 3.0
    assert_same([p, q], [np.ones(3), np.full(3, 0.5)])


# ------------------------------------------------------------------------------------------------------ what it costs


@pytest.mark.parametrize("nonfinite", ["raise", "propagate"])
def test_nothing_is_planned_anew(nonfinite: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair(numbers(0), **HYPER, nonfinite=nonfinite, kernel="compiled")
    for seed in (1, 2):
        pair.step(numbers(seed))

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("something was found out again")

    for owner, name in (
        (compiled.Kernel, "_arrange"),
        (compiled.Kernel, "_is_dense"),
        (table.Table, "__init__"),
        (lars_array.memory.Spans, "__init__"),
        (lars_array.moves, "bounds"),
        (lars_array.moves, "_check_array"),
        (Fit, "__init__"),
    ):
        monkeypatch.setattr(owner, name, refuse)
    for seed in (3, 4, 5):
        pair.room = room_for(pair.room)  # addresses that nobody has seen
        pair.step(numbers(seed))


@pytest.mark.parametrize("kernel", ["compiled", "blocked"])
def test_nothing_of_the_parameters_size_is_allocated(kernel: str) -> None:
    import tracemalloc

    params, grads, room = ([np.full((1 << 20,), x, "f4")] for x in (1, 0.1, 0))
    optimizer = LARS(params, **HYPER, kernel=kernel)
    for _ in range(2):
        optimizer.step(grads, out=room)
        params, room = room, params
    tracemalloc.start()
    try:
        optimizer.step(grads, out=room)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20


# ------------------------------------------------------------------------------------------------------ other libraries


@pytest.mark.parametrize("library", ["torch", "strict"])
def test_arrays_of_other_libraries(library: str) -> None:
    torch = pytest.importorskip("torch")
    put = torch.tensor if library == "torch" else lambda x: array_api_strict.asarray(x, copy=True)
    here = numbers(0, "f8")
    sets = [{name: put(p) for name, p in x.items()} for x in (here, room_for(here))]
    ours, theirs = LARS(sets[0], **HYPER), LARS(here, **HYPER, kernel="portable")
    for seed in (1, 2, 3):
        grads = numbers(seed, "f8")
        before = fingerprint(sets[0])
        ours.step({name: put(g) for name, g in grads.items()}, out=sets[1])
        theirs.step(grads)
        assert fingerprint(sets[0]) == before
        sets.reverse()
        for name, p in here.items():
            assert_close(sets[0][name], p)
    sets[1]["b"] = sets[0]["w"]
    with pytest.raises(ValueError, match="out of 'b' must have the parameter's shape"):
        ours.step({name: put(g) for name, g in grads.items()}, out=sets[1])
    sets[1] |= {"b": sets[0]["b"]}
    with pytest.raises(ValueError, match="out of 'b' must not share memory with parameter 'b'"):
        ours.step({name: put(g) for name, g in grads.items()}, out=sets[1])
