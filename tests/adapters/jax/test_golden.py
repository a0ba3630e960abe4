"""Every trajectory of the original implementations, through `lars_jax.lars`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_cases import Call, Case, call_of, read_cases

from lars_jax import lars

CASES = [case for case in read_cases() if not case.name.startswith("negative/")]


@pytest.fixture(autouse=True)
def strict_in_64_bits() -> Iterator[None]:
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


def run(case: Case, call: Call) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the parameters after every step, and the buffers: one transformation for layers with the same options."""
    layers, lrs = case.data["layers"], jnp.asarray(case.data["lr"])
    params = {layer["name"]: array(layer["initial"], layer) for layer in layers}
    solvers: list[tuple[dict[str, Any], list[str]]] = []
    for layer, options in zip(layers, call.options, strict=True):
        for known, names in solvers:
            if known == options:
                names.append(layer["name"])
                break
        else:
            solvers.append((options, [layer["name"]]))
    trajectory, buffers = [], {}
    transformations = [
        (lars(lambda t: lrs[t], **{"momentum": 0.0, **rest}, trust_ratio_mask=adapt), names)
        for options, names in solvers
        for rest, adapt in [({key: x for key, x in options.items() if key != "adapt"}, options["adapt"])]
    ]
    states = [solver.init({name: params[name] for name in names}) for solver, names in transformations]
    for flats in case.data["grads"]:
        grads = {layer["name"]: gradient(flat, layer, call) for flat, layer in zip(flats, layers, strict=True)}
        for k, (solver, names) in enumerate(transformations):
            mine = {name: params[name] for name in names}
            updates, states[k] = solver.update({name: grads[name] for name in names}, states[k], mine)
            params |= {name: p if updates[name] is None else p + updates[name] for name, p in mine.items()}
        trajectory.append(dict(params))
    for (_, names), state in zip(transformations, states, strict=True):
        buffers |= {name: None if state.trace is None else state.trace[name] for name in names}
    return trajectory, buffers


def array(flat: Any, layer: dict[str, Any]) -> Any:
    return jnp.asarray(np.reshape(np.asarray(flat, np.float64), layer["shape"]))


def gradient(flat: Any, layer: dict[str, Any], call: Call) -> Any:
    if flat is None and call.missing_is_zero:
        flat = np.zeros(len(layer["initial"]))
    return None if flat is None else array(flat, layer)


def assert_near(ours: Any, theirs: list[float], what: str) -> None:
    """Compare relative to the largest entry of the layer."""
    worst = np.max(np.abs(np.asarray(ours).reshape(-1) - np.asarray(theirs)))
    assert worst <= 1e-12 * np.max(np.abs(np.asarray(theirs))), f"{what}: off by {worst}"


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_the_transformation_reproduces_the_original(case: Case) -> None:
    call = call_of(case)
    trajectory, buffers = run(case, call)
    for step, (ours, theirs) in enumerate(zip(trajectory, case.data["params"], strict=True)):
        for layer, flat in zip(case.data["layers"], theirs, strict=True):
            assert_near(ours[layer["name"]], flat, f"{case.name}: {layer['name']} after step {step + 1}")
    for layer, flat in zip(case.data["layers"], case.data["momentum"], strict=True):
        if flat is not None:
            ours = buffers[layer["name"]]
            assert ours is not None, f"{case.name}: no buffer for {layer['name']}"
            assert_near(call.buffer_sign * ours, flat, f"{case.name}: momentum of {layer['name']}")
