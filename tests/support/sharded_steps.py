"""Run by `adapters/jax/test_sharding.py` in a process of its own, where the CPU is eight devices; prints JSON.

It sets nothing in JAX by itself, since whoever looks for examples in it imports it.
"""

from __future__ import annotations

import json
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from lars_jax import LarsState, lars

SHAPES = {"matrix": (16, 8), "bias": (8,), "conv": (3, 3, 8, 16), "stack": (8, 4, 8), "odd": (3,)}
FIRST = {"matrix": P("x"), "bias": P("x"), "conv": P(None, None, "x"), "stack": P("x"), "odd": P()}
LAST = {"matrix": P(None, "x"), "bias": P(), "conv": P(None, None, None, "x"), "stack": P(None, None, "x"), "odd": P()}
TWO = {"matrix": P("x", "y"), "bias": P("x"), "conv": P(None, None, ("x", "y")), "stack": P("y"), "odd": P()}
OPTAX = {"rule": "optax", "nesterov": True}
BOUNDED = {"max_grad_norm": 1.0, "nonfinite": "skip"}
STACKED = {"layer_axes": {"matrix": 0, "bias": 0, "conv": 0, "stack": 1, "odd": 0}}
JOINED = {"layer_of": {"matrix": 1, "bias": 1}}


def draw(seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in SHAPES.items()}


def step_of(solver: Any) -> Any:
    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = solver.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def distance(ours: Any, theirs: Any) -> float:
    arrays = (map(np.asarray, jax.tree.leaves(tree)) for tree in (ours, theirs))
    # Not by max, which may pass over a NaN.
    return float(np.max([np.max(np.abs(a - b)) / np.max(np.abs(b)) for a, b in zip(*arrays, strict=True)]))


def collectives(compiled: Any) -> dict[str, int]:
    text = compiled.as_text()
    names = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")
    return {name: found for name in names if (found := len(re.findall(rf" {name}(?:-start)?\(", text)))}


def names_in(spec: Any) -> tuple[str, ...]:
    return tuple(name for entry in spec if entry for name in (entry if isinstance(entry, tuple) else (entry,)))


def run(mesh: Any, specs: Any, options: dict[str, Any], *, mapped: bool = False) -> dict[str, Any]:
    """Take three steps sharded, and unsharded."""
    params, plain = draw(0), lars(0.1, weight_decay=0.1, **options)
    theirs, their_state, unsharded = params, plain.init(params), jax.jit(step_of(plain))
    for t in range(3):
        theirs, their_state = unsharded(theirs, their_state, draw(1 + t))
    shardings = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    everywhere = NamedSharding(mesh, P())
    of_state = LarsState(everywhere, shardings, everywhere, everywhere)
    if mapped:
        axis_name = {name: names_in(spec) for name, spec in specs.items()}
        solver = lars(0.1, weight_decay=0.1, axis_name=axis_name, **options)
        state_specs = LarsState(P(), specs, P(), P())
        layout = {"in_specs": (specs, state_specs, specs), "out_specs": (specs, state_specs)}
        step = jax.jit(jax.shard_map(step_of(solver), mesh=mesh, **layout))
    else:
        step = jax.jit(step_of(plain), out_shardings=(shardings, of_state))
    ours, state = jax.device_put(params, shardings), jax.device_put(plain.init(params), of_state)
    compiled = step.lower(ours, state, ours).compile()
    for t in range(3):
        # XLA's threads for CPUs may deadlock on steps that are queued.
        ours, state = jax.block_until_ready(step(ours, state, jax.device_put(draw(1 + t), shardings)))
    found = distance((ours, state.trace), (theirs, their_state.trace))
    return {"distance": found, "collectives": collectives(compiled), "compilations": step._cache_size()}


def run_pmap() -> float:
    """Return how far a step of eight replicas is from that of one, gradients being means over the replicas."""
    solver, params = lars(0.1, weight_decay=0.1), draw(0)
    grads = [draw(10 + k) for k in range(8)]

    def step(params: Any, state: Any, grads: Any) -> Any:
        return step_of(solver)(params, state, jax.lax.pmean(grads, "replica"))

    stacked = jax.tree.map(lambda *g: jnp.stack(g), *grads)
    ours, _ = jax.pmap(step, axis_name="replica", in_axes=(None, None, 0))(params, solver.init(params), stacked)
    mean = jax.tree.map(lambda g: jnp.mean(g, axis=0), stacked)
    theirs, _ = jax.jit(step_of(solver))(params, solver.init(params), mean)
    return distance(ours, jax.tree.map(lambda p: jnp.stack([p] * 8), theirs))


def main() -> None:
    auto = AxisType.Auto
    line = jax.make_mesh((8,), ("x",), axis_types=(auto,))
    plane = jax.make_mesh((2, 4), ("x", "y"), axis_types=(auto, auto))
    runs = {
        "line, first axes": run(line, FIRST, {}),
        "line, last axes": run(line, LAST, OPTAX | JOINED),
        "line, last axes, stacked": run(line, LAST, STACKED | BOUNDED),
        "line, first axes, stacked": run(line, FIRST, STACKED),
        "plane": run(plane, TWO, {}),
        "line, mapped": run(line, LAST, BOUNDED, mapped=True),
        "plane, mapped": run(plane, TWO, OPTAX | JOINED, mapped=True),
        "line, mapped, stacked": run(line, LAST, STACKED, mapped=True),
        "plane, mapped, clipped": run(plane, TWO, OPTAX | BOUNDED, mapped=True),
    }
    print(json.dumps({"runs": runs, "pmap": run_pmap()}))


if __name__ == "__main__":
    main()
