"""Stacked parameters of which each slice is a layer, and parameters that are one layer together."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
from assertions import assert_close, assert_refused, assert_same, to_numpy

from lars_array import LARS, NonFiniteError, init, lars_step, update
from lars_array.kernels import NUMPY_KERNELS

OPTIONS: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "trust_coefficient": 0.1}
CASES = [{}, {"rule": "simclr-popular", "max_grad_norm": 1.0}, {"rule": "optax", "nesterov": True}]
KERNELS = ["compiled", "blocked", "portable"]


def draw(seed: int, *shape: int, dtype: Any = np.float64) -> Any:
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def in_slices(w: Any) -> dict[str, Any]:
    return {f"w[{i}, {j}]": w[i, j] for i in range(w.shape[0]) for j in range(w.shape[1])}


@pytest.mark.parametrize("options", CASES, ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, np.complex64])
def test_a_stack_is_its_slices(options: dict[str, Any], kernel: str, dtype: Any) -> None:
    stacked, b = draw(0, 2, 3, 4, 5, dtype=dtype), draw(1, 6, dtype=dtype)
    apart, c = stacked.copy(), b.copy()
    ours = LARS([{"params": {"w": stacked}, "layer_axes": 2}, {"params": {"b": b}}], kernel=kernel, **OPTIONS | options)
    theirs = LARS({**in_slices(apart), "b": c}, kernel=kernel, **OPTIONS | options)
    for t in range(4):
        g, h = draw(10 + t, 2, 3, 4, 5, dtype=dtype), draw(20 + t, 6, dtype=dtype)
        ours.step({"w": None if t == 2 else g, "b": h})
        theirs.step({**dict.fromkeys(in_slices(g)), "b": h} if t == 2 else {**in_slices(g), "b": h})
    assert_same([stacked, b], [apart, c])
    assert ours.norms() == theirs.norms() and ours.trust_ratios() == theirs.trust_ratios()
    mine, other = ours.state_dict()["state"], theirs.state_dict()["state"]
    assert_same(in_slices(mine["w"]["momentum_buffer"]), {n: other[n]["momentum_buffer"] for n in in_slices(apart)})
    assert mine.keys() == {"w", "b"}


@pytest.mark.parametrize("xp", ["numpy", "strict", "torch", "jax"], indirect=True)
@pytest.mark.parametrize("options", CASES, ids=str)
def test_the_pure_functions_take_stacks(options: dict[str, Any], xp: Any) -> None:
    w, b = draw(0, 2, 3, 4), draw(1, 5)
    options = OPTIONS | options
    groups: Any = [{"params": {"w": xp.asarray(w)}, "layer_axes": 2}, {"params": {"b": xp.asarray(b)}}]
    apart: Any = {name: xp.asarray(x) for name, x in {**in_slices(w), "b": b}.items()}
    ours, theirs = init(groups), init(apart)
    for t in range(3):
        g, h = draw(10 + t, 2, 3, 4), draw(20 + t, 5)
        groups, ours = update(groups, {"w": xp.asarray(g), "b": xp.asarray(h)}, ours, **options)
        grads = {name: xp.asarray(x) for name, x in {**in_slices(g), "b": h}.items()}
        apart, theirs = update(apart, grads, theirs, **options)
    for name, x in in_slices(to_numpy(groups[0]["params"]["w"])).items():
        assert_close(x, apart[name], 1e-12)
    assert_close(groups[1]["params"]["b"], apart["b"], 1e-12)
    assert tuple(ours.first.shape) == (2,)


def test_one_step_takes_a_stack() -> None:
    p, g = draw(0, 3, 4), draw(1, 3, 4)
    whole, buffer = lars_step(p, g, layer_axes=1, **OPTIONS)
    for i in range(3):
        new_p, new_v = lars_step(p[i], g[i], **OPTIONS)
        assert_same([whole[i], buffer[i]], [new_p, new_v])
    alone = lars_step(p[1, 2:3], g[1, 2:3], **OPTIONS)[0]
    assert_close(lars_step(p, g, layer_axes=2, **OPTIONS)[0][1, 2:3], alone)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("options", CASES, ids=str)
def test_parts_of_a_layer_are_the_layer(options: dict[str, Any], kernel: str) -> None:
    whole = draw(0, 3, 4, 5)
    parts = {name: x.copy() for name, x in zip("qkv", whole, strict=True)}
    single = whole[0].copy()
    ours = LARS({**parts, "z": single}, layer_of=dict.fromkeys("qkv", "attention"), kernel=kernel, **OPTIONS | options)
    other = single.copy()
    theirs = LARS({"w": whole, "z": other}, kernel=kernel, **OPTIONS | options)
    for t in range(3):
        g, h = draw(10 + t, 3, 4, 5), draw(20 + t, 4, 5)
        ours.step({**dict(zip("qkv", g, strict=True)), "z": h})
        theirs.step({"w": g, "z": h})
    for name, x in zip("qkv", whole, strict=True):
        assert_close(parts[name], x, 1e-12)
        assert ours.norms()[name] == pytest.approx(theirs.norms()["w"], rel=1e-12)
        assert ours.trust_ratios()[name] == pytest.approx(theirs.trust_ratios()["w"], rel=1e-12)
    assert_close(single, other, 1e-12)
    pure = dict(zip("qkv", draw(0, 3, 4, 5), strict=True))
    state = init(pure)
    by_function = {"layer_of": lambda name: "attention"}
    once, _ = update(pure, dict(zip("qkv", draw(10, 3, 4, 5), strict=True)), state, **OPTIONS | by_function)
    first = draw(0, 3, 4, 5)
    LARS([first], **OPTIONS).step([draw(10, 3, 4, 5)])
    for name, x in zip("qkv", first, strict=True):
        assert_close(once[name], x, 1e-12)


def test_stacks_of_one_layer_join_slice_by_slice() -> None:
    w, b, g, h = draw(0, 3, 4), draw(1, 3, 2), draw(2, 3, 4), draw(3, 3, 2)
    together = np.concatenate([w, b], axis=1)
    LARS([{"params": {"t": together}, "layer_axes": 1}], **OPTIONS).step([np.concatenate([g, h], axis=1)])
    LARS({"w": w, "b": b}, layer_axes=1, layer_of={"w": 0, "b": 0}, **OPTIONS).step({"w": g, "b": h})
    assert_close(np.concatenate([w, b], axis=1), together, 1e-12)


@pytest.mark.parametrize("kernel", KERNELS)
def test_what_is_saved_is_of_the_whole_parameter(kernel: str) -> None:
    def made(p: Any) -> LARS:
        return LARS([{"params": {"w": p}, "layer_axes": 1}], kernel=kernel, **OPTIONS)

    p = draw(0, 3, 5)
    first = made(p)
    first.step([draw(1, 3, 5)])
    copies = [copy.deepcopy(first), pickle.loads(pickle.dumps(first)), made(p.copy()), made(p.copy())]
    copies[2].load_state_dict(first.state_dict())
    views = first.state_views()
    assert np.shares_memory(views["w"]["momentum_buffer"], first.state_views(wait=False)["w"]["momentum_buffer"])
    copies[3].attach_state({"w": {**views["w"], "momentum_buffer": views["w"]["momentum_buffer"].copy()}})
    first.step([draw(2, 3, 5)])
    for other in copies:
        other.step([draw(2, 3, 5)])
        assert_same(other.param_groups[0]["params"][0], p)
        assert_same(other.state_dict()["state"], first.state_dict()["state"])
    unstacked = LARS({"w": p.copy()}, **OPTIONS)
    unstacked.load_state_dict(first.state_dict())
    assert unstacked.param_groups[0]["layer_axes"] == 0


def test_odd_stacks() -> None:
    empty, numbers = np.zeros((0, 4)), draw(0, 4)
    optimizer = LARS({"e": empty, "n": numbers}, layer_axes=1, **OPTIONS)
    grads = draw(1, 4)
    expected = np.concatenate([lars_step(numbers[i : i + 1], grads[i : i + 1], **OPTIONS)[0] for i in range(4)])
    optimizer.step({"e": empty.copy(), "n": grads})
    assert_close(numbers, expected)
    assert list(optimizer.norms()) == ["e", "n[0]", "n[1]", "n[2]", "n[3]"]
    assert optimizer.state_dict()["state"]["e"]["momentum_buffer"].shape == (0, 4)
    fortran, grads = np.asfortranarray(draw(0, 3, 4)), draw(1, 3, 4)
    expected = [lars_step(p, g, **OPTIONS)[0] for p, g in zip(fortran.copy(), grads, strict=True)]
    LARS({"f": fortran}, layer_axes=1, **OPTIONS).step({"f": grads})
    assert_close(fortran, np.array(expected))


def test_what_is_not_finite_is_named() -> None:
    w, x, y = draw(0, 3, 4), draw(1, 4), draw(2, 4)
    groups = [{"params": {"w": w}, "layer_axes": 1}, {"params": {"x": x, "y": y}}]
    optimizer = LARS(groups, layer_of={"x": 1, "y": 1}, lr=0.1)
    g = draw(3, 3, 4)
    g[1, 2] = np.nan
    message = "the gradient of 'w[1]' has 1 non-finite entries of 4; nothing was changed (step 0)"
    assert_refused(lambda: optimizer.step([g, x + 1, y + 1]), NonFiniteError, message, w, x, y)
    bad = np.full(4, np.inf)
    message = "the gradient of 'y' has 4 non-finite entries of 4; nothing was changed (step 0)"
    assert_refused(lambda: optimizer.step([w + 1, x + 1, bad]), NonFiniteError, message, w, x, y)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"layer_axes": 2}, ValueError, "layer_axes must be at most the 1 axes of 'b'; got 2"),
        ({"layer_axes": -1}, ValueError, "layer_axes must be at least 0; got -1"),
        ({"layer_axes": True}, TypeError, "layer_axes must be an integer; got True"),
        ({"layer_axes": 1.0}, TypeError, "layer_axes must be an integer; got 1.0"),
        ({"layer_of": {"c": 1}}, ValueError, "layer_of must hold names of parameters; got 'c'"),
        ({"layer_of": 3}, TypeError, "layer_of must be a mapping or a function from names to layers; got 3"),
        ({"layer_of": lambda name: [1]}, TypeError, "layer_of must give names of layers, or None; got [1]"),
        (
            {"layer_axes": 1, "layer_of": lambda name: "all"},
            ValueError,
            "parameters joined into one layer must have the same leading axes; in 'all' 'w' has (2,) and 'b' has (3,)",
        ),
    ],
)
def test_refusals(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    params = {"w": np.ones((2, 2)), "b": np.ones(3)}
    assert_refused(lambda: LARS(params, lr=0.1, **options), kind, message)
    call = {"lr": 0.1, **options}
    assert_refused(lambda: update(params, params, init(params), **call), kind, message)


def test_the_axes_stay_what_they_were() -> None:
    w = np.ones((2, 2))
    optimizer = LARS([w], lr=0.1)
    optimizer.param_groups[0]["layer_axes"] = 1
    message = "layer_axes of parameter group 0 must stay what it was, 0; got 1"
    assert_refused(lambda: optimizer.step([np.ones((2, 2))]), ValueError, message, w)
    stacked = LARS([w], lr=0.1, layer_axes=1)
    message = "the gradient of '0' must have the parameter's shape (2, 2); got (3, 2)"
    assert_refused(lambda: stacked.step([np.ones((3, 2))]), ValueError, message, w)


@pytest.mark.parametrize("kernel", NUMPY_KERNELS)
def test_a_stacked_parameter_that_was_changed_in_place_is_refused(kernel: str) -> None:
    """Its rows are views of what it was."""
    p = np.ones((2, 3))
    optimizer = LARS({"w": p}, 0.5, momentum=0.9, layer_axes=1, kernel=kernel)
    optimizer.step([np.ones((2, 3))])
    before = p.copy()
    p.flags.writeable = False
    with pytest.raises(ValueError, match=r"^parameter 'w' must be writable; got a read-only array$"):
        optimizer.step([np.ones((2, 3))])
    p.flags.writeable = True
    np.testing.assert_array_equal(p, before)
    for shape in [(3, 2), (50_000, 3), (2, 3, 1)]:
        q = np.ones((2, 3))
        optimizer = LARS({"w": q}, 0.5, layer_axes=1, kernel=kernel)
        optimizer.step([np.ones((2, 3))])
        q.resize(shape, refcheck=False)
        before = q.copy()
        with pytest.raises(ValueError, match=r"^parameter 'w' was modified in place: expected shape"):
            optimizer.step([np.ones(shape)])
        np.testing.assert_array_equal(q, before)
