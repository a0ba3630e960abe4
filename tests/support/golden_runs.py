"""Runs of the golden cases by `LARS` and by `update`, and the comparison with the originals."""

from __future__ import annotations

from typing import Any

import numpy as np
from golden_cases import Call, Case, read_cases

from lars_array import LARS, init, update

CASES = read_cases()
POSITIVE = [case for case in CASES if not case.name.startswith("negative/")]
NEGATIVE = [case for case in CASES if case.name.startswith("negative/")]


def run_in_place(
    case: Case, call: Call, xp: Any, dtype: str, kernel: str | None = None
) -> tuple[list[Any], dict[str, Any]]:
    """Return the parameters after every step, and the momentum buffers, of `LARS`."""
    params = _arrays(case, [layer["initial"] for layer in case.data["layers"]], xp, dtype)
    names = [layer["name"] for layer in case.data["layers"]]
    groups = [{"params": {name: p}} | options for name, p, options in zip(names, params, call.options, strict=True)]
    optimizer = LARS(groups, lr=0.0, kernel=kernel)
    trajectory = []
    for lr, grads in zip(case.data["lr"], case.data["grads"], strict=True):
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step(_gradients(case, call, grads, xp, dtype))
        trajectory.append([_numpy(p).copy() for p in params])
    state = optimizer.state_dict()["state"]
    return trajectory, {name: state[name].get("momentum_buffer") for name in names}


def run_functional(case: Case, call: Call, xp: Any, dtype: str) -> tuple[list[Any], dict[str, Any]]:
    """Return the same of `init` and `update`."""
    params = _arrays(case, [layer["initial"] for layer in case.data["layers"]], xp, dtype)
    names = [layer["name"] for layer in case.data["layers"]]
    groups: Any = [
        {"params": {name: p}} | options for name, p, options in zip(names, params, call.options, strict=True)
    ]
    state = init(groups)
    trajectory = []
    for lr, grads in zip(case.data["lr"], case.data["grads"], strict=True):
        groups, state = update(groups, _gradients(case, call, grads, xp, dtype), state, lr=lr)
        trajectory.append([_numpy(group["params"][name]) for name, group in zip(names, groups, strict=True)])
    return trajectory, state.momentum_buffers


def assert_reproduces(case: Case, call: Call, trajectory: list[Any], buffers: dict[str, Any], tolerance: float) -> None:
    """Compare with the original, relative to the largest entry of the layer."""
    layers = case.data["layers"]
    for step, (ours, theirs) in enumerate(zip(trajectory, case.data["params"], strict=True)):
        for layer, a, b in zip(layers, ours, theirs, strict=True):
            assert_close(a, b, tolerance, f"{case.name}: {layer['name']} after step {step + 1}")
    for layer, theirs in zip(layers, case.data["momentum"], strict=True):
        if theirs is not None:
            ours = buffers[layer["name"]]
            assert ours is not None, f"{case.name}: no momentum buffer for {layer['name']}"
            assert_close(
                call.buffer_sign * _numpy(ours), theirs, tolerance, f"{case.name}: momentum of {layer['name']}"
            )


def assert_close(ours: Any, theirs: list[float], tolerance: float, what: str) -> None:
    theirs_array = np.asarray(theirs)
    worst = np.max(np.abs(ours.reshape(-1) - theirs_array))
    assert worst <= tolerance * np.max(np.abs(theirs_array)), f"{what}: off by {worst}"


def _arrays(case: Case, flats: list[Any], xp: Any, dtype: str) -> list[Any]:
    shapes = [tuple(layer["shape"]) for layer in case.data["layers"]]
    kind = getattr(xp, dtype)
    return [
        None if flat is None else xp.reshape(xp.asarray(flat, dtype=kind), shape)
        for flat, shape in zip(flats, shapes, strict=True)
    ]


def _gradients(case: Case, call: Call, grads: list[Any], xp: Any, dtype: str) -> list[Any]:
    if call.missing_is_zero:
        sizes = [len(layer["initial"]) for layer in case.data["layers"]]
        grads = [[0.0] * size if flat is None else flat for flat, size in zip(grads, sizes, strict=True)]
    return _arrays(case, grads, xp, dtype)


def _numpy(x: Any) -> Any:
    return x if isinstance(x, np.ndarray) else np.from_dlpack(x)


def names(cases: list[Case]) -> list[str]:
    return [case.name for case in cases]
