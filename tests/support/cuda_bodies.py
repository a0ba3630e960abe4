"""What is asked of the CUDA kernel wherever it runs: the tests on a GPU, and the same on the CPU without one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from lars_array import LARS, RULES, NonFiniteError, Recorder

__all__ = ["BODIES", "Place", "model"]

HYPER: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3, "trust_coefficient": 0.02}

# Odd sizes, none, one, and more than one piece.
SHAPES = [(64, 3, 7, 7), (64,), (0,), (), (1000, 33), (3, 5), (16385,), (70001,)]


class Place(NamedTuple):
    """Where arrays lie.

    Parameters
    ----------
    put : callable
        Copies a NumPy array there.
    get : callable
        Returns a NumPy array of one from there.
    """

    put: Callable[[Any], Any]
    get: Callable[[Any], Any]


def model(seed: int, dtype: Any = np.float32) -> list[Any]:
    """Return NumPy arrays of all shapes."""
    rng = np.random.default_rng(seed)
    return [np.asarray(rng.standard_normal(shape), dtype) for shape in SHAPES]


def _misaligned(place: Place, x: Any) -> Any:
    """Return a copy of `x` that begins one element behind an aligned place."""
    flat = place.put(np.concatenate([np.zeros(1, x.dtype), x.reshape(-1)]))
    return flat[1:].reshape(x.shape)


def _ulps(ours: Any, theirs: Any, scale: Any) -> float:
    """Return the largest difference in units of the last place of the terms that the results are sums of."""
    size = np.maximum(np.abs(theirs), scale)
    unit = np.spacing(size.astype(theirs.dtype))
    difference = np.abs(ours.astype(np.float64) - theirs.astype(np.float64))
    return float(np.max(difference / unit.astype(np.float64), initial=0))


def agrees_with_numpy(place: Place) -> None:
    """Each rule, one step at a time from the same state: at most 2 ulp of the larger of parameter and update."""
    for rule in sorted(RULES):
        here, buffers = model(0), None
        for seed in (1, 2):
            there = [place.put(p) for p in here]
            grads = model(seed)
            ours, theirs = LARS(there, **HYPER, rule=rule), LARS(here, **HYPER, rule=rule, kernel="portable")
            if buffers is not None:
                for optimizer, put in ((ours, place.put), (theirs, np.array)):
                    state = optimizer.state_dict()
                    for name, own in state["state"].items():
                        own |= {"momentum_buffer": put(buffers[int(name)]), "previous_lr": 0.1}
                    optimizer.load_state_dict(state)
            before = [p.copy() for p in here]
            ours.step([place.put(g) for g in grads])
            theirs.step(grads)
            state, known = ours.state_dict()["state"], theirs.state_dict()["state"]
            for i, (p, q, old) in enumerate(zip(there, here, before, strict=True)):
                assert _ulps(place.get(p), q, np.abs(old)) <= 2, f"{rule}: parameter {i}"
                v = known[str(i)].get("momentum_buffer")
                if v is not None:
                    scale = (
                        np.abs(grads[i]) * np.max(np.abs(v), initial=0) / max(np.max(np.abs(grads[i]), initial=0), 1e-9)
                    )
                    assert _ulps(place.get(state[str(i)]["momentum_buffer"]), v, scale) <= 4, f"{rule}: buffer {i}"
            buffers = [known[str(i)].get("momentum_buffer") for i in range(len(here))]
            buffers = None if any(v is None for v in buffers) else [v.copy() for v in buffers]


def runs_are_alike(place: Place) -> None:
    """To the last bit, also where arrays begin at odd places."""
    results = []
    for put in (place.put, place.put, lambda x: _misaligned(place, x)):
        params = [put(p) for p in model(0)]
        optimizer = LARS(params, **HYPER, rule="optax", max_grad_norm=1.0)
        for seed in (1, 2, 3):
            optimizer.step([put(g) for g in model(seed)])
        results.append(b"".join(place.get(p).tobytes() for p in params))
    assert results[0] == results[1] == results[2]


def other_types_agree_with_numpy(place: Place) -> None:
    for dtype, allowed in ((np.float64, 1e-13), (np.float16, 2e-3), (np.complex64, 1e-5), (np.complex128, 1e-13)):
        here = model(0, dtype)
        there = [place.put(p) for p in here]
        ours, theirs = LARS(there, **HYPER), LARS(here, **HYPER, kernel="portable")
        for seed in (1, 2):
            ours.step([place.put(g) for g in model(seed, dtype)])
            theirs.step(model(seed, dtype))
        for p, q in zip(there, here, strict=True):
            worst = np.max(np.abs(place.get(p).astype("c16") - q.astype("c16")), initial=0)
            assert worst <= allowed * np.max(np.abs(q), initial=1), dtype


def several_types_at_once(place: Place) -> None:
    here = [model(0, dtype)[k] for k, dtype in enumerate([np.float32, np.float64, np.float16, np.float32])]
    there = [place.put(p) for p in here]
    ours, theirs = LARS(there, **HYPER), LARS(here, **HYPER, kernel="portable")
    ours.step([place.put(p) for p in here])
    theirs.step([p.copy() for p in here])
    for p, q in zip(there, here, strict=True):
        np.testing.assert_allclose(place.get(p), q, rtol=2e-3 if q.dtype == np.float16 else 1e-6)


def half_precision_with_masters_and_wide_gradients(place: Place) -> None:
    """float32 copies of float16 parameters; gradients of another type; and one too large for the parameter's type."""
    for p_type, g_type, options in (
        (np.float16, np.float16, {"master_weights": True}),
        (np.float16, np.float32, {"master_weights": True, "rule": "optax"}),
        (np.float16, np.float32, {}),
        (np.float32, np.float64, {}),
        (np.float64, np.float16, {}),
    ):
        here = model(0, p_type)
        there = [place.put(p) for p in here]
        ours = LARS(there, **HYPER, **options, nonfinite="skip")
        theirs = LARS(here, **HYPER, **options, nonfinite="skip", kernel="portable")
        for seed in (1, 2, 3):
            ours.step([place.put(g) for g in model(seed, g_type)])
            theirs.step(model(seed, g_type))
        if g_type == np.float64:
            large = model(4, g_type)
            large[0][0, 0, 0, 0] = 1e100
            ours.step([place.put(g) for g in large])
            theirs.step(large)
            ours.synchronize()
            assert ours.skipped_steps == theirs.skipped_steps == 1
        allowed = 2e-3 if p_type == np.float16 else 1e-6
        for p, q in zip(there, here, strict=True):
            worst = np.max(np.abs(place.get(p).astype("f8") - q.astype("f8")), initial=0)
            assert worst <= allowed * np.max(np.abs(q), initial=1), (p_type, g_type)


def gradients_may_move(place: Place) -> None:
    here = model(0)
    there = [place.put(p) for p in here]
    ours, theirs = LARS(there, **HYPER), LARS(here, **HYPER, kernel="portable")
    kept = [place.put(g) for g in model(9)]
    for seed in range(4):
        ours.step([place.put(g) for g in model(seed)] if seed % 2 else kept)
        theirs.step(model(seed) if seed % 2 else model(9))
    for p, q in zip(there, here, strict=True):
        np.testing.assert_allclose(place.get(p), q, rtol=1e-5, atol=1e-7)


def nothing_is_written_where_something_is_not_finite(place: Place) -> None:
    for policy in ("skip", "raise"):
        params = [place.put(p) for p in model(0)]
        optimizer = LARS({str(i): p for i, p in enumerate(params)}, **HYPER, nonfinite=policy)
        optimizer.step([place.put(g) for g in model(1)])
        before = [place.get(p).tobytes() for p in params]
        broken = model(2)
        broken[4][999, 32] = np.nan
        optimizer.step([place.put(g) for g in broken])
        assert [place.get(p).tobytes() for p in params] == before
        said = ""
        try:
            optimizer.synchronize()
        except NonFiniteError as error:
            said = str(error)
        expected = "the norm of the gradient of '4' was not finite in an earlier step, which changed nothing"
        assert said == (expected if policy == "raise" else "")
        assert (optimizer.steps, optimizer.skipped_steps) == (1, int(policy == "skip"))
        optimizer.step([place.put(g) for g in model(3)])
        assert [place.get(p).tobytes() for p in params] != before


def hyper_parameters_may_lie_there(place: Place) -> None:
    here = model(0)
    there, lr = [place.put(p) for p in here], place.put(np.array(0.0))
    ours, theirs = LARS(there, **HYPER | {"lr": lr}), LARS(here, **HYPER, kernel="portable")
    found = place.put(np.array(0.0, np.float32))
    for seed, value in enumerate((0.1, 0.05, 0.2)):
        lr[...], theirs.param_groups[0]["lr"] = value, value
        ours.step([place.put(g) for g in model(seed)], found_inf=found)
        theirs.step(model(seed))
    found[...] = 1
    ours.step([place.put(g) for g in model(7)], found_inf=found)
    ours.synchronize()
    assert (ours.steps, ours.skipped_steps) == (3, 1)
    for p, q in zip(there, here, strict=True):
        np.testing.assert_allclose(place.get(p), q, rtol=1e-5, atol=1e-7)


def layers_may_lie_otherwise(place: Place) -> None:
    rng = np.random.default_rng(0)
    wide, square = rng.standard_normal((40, 60)), rng.standard_normal((33, 33))
    here = [wide[:, ::2].copy(), square.copy(), square.copy()]
    there = [place.put(wide)[:, ::2], place.put(square).T, place.put(square)]
    here[1] = here[1].T.copy()
    grads = [rng.standard_normal(p.shape) for p in here]
    ours, theirs = LARS(there, **HYPER), LARS(here, **HYPER, kernel="portable")
    for _ in range(2):
        ours.step([place.put(grads[0]), place.put(grads[1]), place.put(grads[2].T).T])
        theirs.step(grads)
    for p, q in zip(there, here, strict=True):
        np.testing.assert_allclose(place.get(p), q, rtol=1e-12)


def ten_thousand_small_arrays(place: Place) -> None:
    rng = np.random.default_rng(0)
    params, grads = (rng.standard_normal((10_000, 7)).astype(np.float32) for _ in range(2))
    together = place.put(params)
    there, here = [together[i] for i in range(len(params))], list(params.copy())
    placed = place.put(grads)
    LARS(there, **HYPER).step([placed[i] for i in range(len(grads))])
    LARS(here, **HYPER, kernel="portable").step(list(grads))
    np.testing.assert_allclose(place.get(together), np.stack(here), rtol=1e-6)


def slices_and_parts_of_layers(place: Place) -> None:
    """A stacked parameter, and two parameters that are one layer, in the three launches of any model."""
    rng = np.random.default_rng(0)
    shapes = {"stack": (3, 40, 7), "weight": (90, 11), "other": (5,), "bias": (90,)}

    def arrays(scale: float) -> dict[str, Any]:
        return {name: (scale * rng.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()}

    for rule in ("flash", "optax"):
        here = arrays(1.0)
        there = {name: place.put(p) for name, p in here.items()}
        both = []
        for params, options in ((there, {}), (here, {"kernel": "portable"})):
            groups = [{"params": {"stack": params["stack"]}, "layer_axes": 1}]
            groups.append({"params": {name: p for name, p in params.items() if name != "stack"}})
            layer_of = {"weight": "dense", "bias": "dense"}
            both.append(LARS(groups, **HYPER, rule=rule, layer_of=layer_of, max_grad_norm=20.0, **options))
        for _ in range(3):
            grads = arrays(0.3)
            both[0].step({name: place.put(g) for name, g in grads.items()})
            both[1].step(grads)
        for name, p in here.items():
            np.testing.assert_allclose(place.get(there[name]), p, rtol=1e-5, atol=1e-7)
        ours, theirs = (optimizer.trust_ratios() for optimizer in both)
        assert ours.keys() == theirs.keys() and ours["weight"] == ours["bias"] != ours["other"]
        np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=1e-6)


def state_goes_from_here_to_there(place: Place) -> None:
    """A checkpoint is arrays: what NumPy has saved is loaded after its buffers were brought over."""
    here = model(0)
    theirs = LARS(here, **HYPER, rule="nvidia", kernel="portable")
    theirs.step(model(1))
    there = [place.put(p) for p in here]
    ours, state = LARS(there, **HYPER, rule="nvidia"), theirs.state_dict()
    for own in state["state"].values():
        own["momentum_buffer"] = place.put(own["momentum_buffer"])
    ours.load_state_dict(state)
    theirs.step(model(2))
    ours.step([place.put(g) for g in model(2)])
    for p, q in zip(there, here, strict=True):
        np.testing.assert_allclose(place.get(p), q, rtol=1e-5, atol=1e-7)
    assert ours.state_dict()["steps"] == 2


def recorded_steps_are_those_of_the_host(place: Place) -> None:
    """With a step that only the device knows to be skipped, and later steps that overwrite its sums."""
    here = model(0)
    there = [place.put(p) for p in here]
    ours, theirs = (LARS(params, **HYPER, max_grad_norm=1.0, nonfinite="skip") for params in (there, here))
    far, near = Recorder(ours), Recorder(theirs)
    for seed in range(1, 6):
        grads = [g * np.float32(np.nan if seed == 3 else seed) for g in model(seed)]
        theirs.step(grads)
        near.record()
        ours.step(list(map(place.put, grads)))
        far.record()
    assert far.steps.tolist() == near.steps.tolist() == [0, 1, 2, 3]
    assert far.layers == near.layers
    for name in ("parameter_norms", "gradient_norms", "trust_ratios"):
        np.testing.assert_allclose(getattr(far, name), getattr(near, name), 1e-6, err_msg=name)


BODIES = [
    agrees_with_numpy,
    runs_are_alike,
    other_types_agree_with_numpy,
    several_types_at_once,
    half_precision_with_masters_and_wide_gradients,
    gradients_may_move,
    nothing_is_written_where_something_is_not_finite,
    hyper_parameters_may_lie_there,
    layers_may_lie_otherwise,
    slices_and_parts_of_layers,
    ten_thousand_small_arrays,
    state_goes_from_here_to_there,
    recorded_steps_are_those_of_the_host,
]
