"""Run by `adapters/jax/test_sharded_models.py` in a process of its own, or two, where the CPU is several devices.

Takes steps of a small model whose parameters are split, and the same on one device; prints JSON.
"""

from __future__ import annotations

import functools
import hashlib
import json
import sys
from collections.abc import Sequence
from itertools import product
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.tree_util import keystr, tree_leaves_with_path, tree_map_with_path
from sharded_steps import collectives, step_of

import lars_jax

STEPS = 20
SHAPES = {
    "up": {"kernel": (16, 64), "bias": (64,)},
    "down": {"kernel": (64, 24), "bias": (24,)},
    "out": {"kernel": (24, 11), "bias": (11,)},
}
SPECS = {
    "FSDP": {
        "up": {"kernel": P("data"), "bias": P("data")},
        "down": {"kernel": P("data"), "bias": P("data")},
        "out": {"kernel": P("data"), "bias": P()},
    },
    "tensor parallel": {
        "up": {"kernel": P(None, "model"), "bias": P("model")},
        "down": {"kernel": P("model"), "bias": P()},
        "out": {"kernel": P(), "bias": P()},
    },
    "FSDP and tensor parallel": {
        "up": {"kernel": P("data", "model"), "bias": P("model")},
        "down": {"kernel": P("model", "data"), "bias": P()},
        "out": {"kernel": P("data"), "bias": P()},
    },
    # Eleven over eight devices are five pairs and a single one; two devices have nothing.
    "uneven": {name: {"kernel": P(None, "data"), "bias": P("data")} for name in SHAPES},
}
RULES = ("flash", "optax", "nvidia")
MAX_GRAD_NORM = 10.0  # a fifth of the norm of the gradients


def draw(seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        name: {leaf: rng.normal(size=shape).astype(np.float32) for leaf, shape in leaves.items()}
        for name, leaves in SHAPES.items()
    }


def solver_of(rule: str, clips: bool) -> Any:
    """Return `lars` with a rule, or `optax.lars`, for two groups: biases are neither decayed nor adapted."""
    rate = optax.linear_schedule(0.02, 0.1, 10)
    options = {"trust_coefficient": 0.1, **lars_jax.param_groups(draw(0), 0.01)}
    if rule != "optax.lars":
        return lars_jax.lars(rate, rule=rule, max_grad_norm=MAX_GRAD_NORM if clips else None, **options)
    solver = optax.lars(rate, **options)
    return optax.chain(optax.clip_by_global_norm(MAX_GRAD_NORM), solver) if clips else solver


@functools.cache
def unsharded(rule: str, clips: bool) -> dict[str, Any]:
    """Return the parameters and the state after all steps on one device, by their paths."""
    solver = solver_of(rule, clips)
    step, params = jax.jit(step_of(solver)), draw(0)
    state = solver.init(params)
    for t in range(STEPS):
        params, state = step(params, state, draw(1 + t))
    return {keystr(path): np.asarray(x) for path, x in tree_leaves_with_path((params, state))}


def run(layout: str, rule: str, clips: bool, *, devices: Sequence[Any], axis_type: Any = AxisType.Auto) -> Any:
    specs, solver = SPECS[layout], solver_of(rule, clips)
    shape = (2, len(devices) // 2) if "tensor" in layout else (len(devices),)
    mesh = Mesh(np.reshape(devices, shape), ("data", "model")[: len(shape)], axis_types=(axis_type,) * len(shape))
    of_path = dict(tree_leaves_with_path(specs, is_leaf=lambda x: isinstance(x, P)))

    def shardings(tree: Any) -> Any:
        """Return those of parameters, also within a state, where everything else is on all devices."""
        return tree_map_with_path(lambda path, _: NamedSharding(mesh, of_path.get(path[-2:], P())), tree)

    def step(*arguments: Any) -> Any:
        if layout == "uneven":  # Only within a jitted function may lengths be uneven.
            arguments = jax.lax.with_sharding_constraint(arguments, shardings(arguments))
        return step_of(solver)(*arguments)

    def given(*trees: Any) -> Any:
        where = shardings(trees)
        if layout == "uneven":
            where = jax.tree.map(lambda _: NamedSharding(mesh, P()), trees)
        # Not by device_put, which would compare what the processes have.
        return jax.tree.map(lambda x, s: jax.make_array_from_callback(x.shape, s, lambda i: x[i]), trees, where)

    found = given(draw(0), jax.tree.map(np.asarray, solver.init(draw(0))))
    kept = jax.tree.map(lambda x: x.sharding, found)
    compiled = jax.jit(step, out_shardings=kept).lower(*found, *given(draw(1))).compile()
    for t in range(STEPS):
        # XLA's threads for CPUs may deadlock on steps that are queued.
        found = jax.block_until_ready(compiled(*found, *given(draw(1 + t))))
    return compared(found, unsharded(rule, clips)) | {"all-reduces": collectives(compiled).get("all-reduce", 0)}


def compared(ours: Any, theirs: dict[str, Any]) -> dict[str, Any]:
    """Return how far the parts in this process are from the whole arrays, and the digests of each part's copies."""
    distances: list[Any] = []
    digests: dict[str, set[str]] = {}
    for path, x in tree_leaves_with_path(ours):
        whole = theirs[keystr(path)].astype(np.float64)
        for part in x.addressable_shards:
            values = np.asarray(part.data)
            off = np.max(np.abs(values - whole[part.index]), initial=0.0)
            distances.append(off / (np.max(np.abs(whole)) or 1.0))
            digests.setdefault(f"{keystr(path)} {part.index}", set()).add(hashlib.sha256(values.tobytes()).hexdigest())
    found = {name: sorted(of_copies) for name, of_copies in digests.items()}
    return {"distance": float(np.max(distances)), "digests": found}


def of_one_process() -> dict[str, Any]:
    """Return the runs on eight devices by their names."""
    whole_table = product(("FSDP", "FSDP and tensor parallel"), (*RULES, "optax.lars"), (False, True))
    cases = [(case, AxisType.Auto) for case in (*whole_table, *product(("uneven",), RULES, (True,)))]
    cases += [(case, AxisType.Explicit) for case in product(("tensor parallel",), RULES, (True,))]
    return {named(case): run(*case, devices=jax.devices(), axis_type=kind) for case, kind in cases}


def of_one_of_two(address: str, number: str) -> dict[str, Any]:
    """Return the runs on two devices here and two of the other process."""
    jax.distributed.initialize(address, 2, int(number), initialization_timeout=60)
    # In this order both axes of a plane cross from one process to the other.
    devices = [jax.devices()[i] for i in (0, 2, 3, 1)]
    pairs = [("FSDP", "flash"), ("tensor parallel", "optax"), *product(("FSDP and tensor parallel",), RULES[:2])]
    return {named((*pair, True)): run(*pair, True, devices=devices) for pair in pairs}


def named(case: tuple[str, str, bool]) -> str:
    layout, rule, clips = case
    return f"{layout}, {rule}, {'clipped' if clips else 'whole gradients'}"


if __name__ == "__main__":
    found = of_one_of_two(*sys.argv[1:]) if sys.argv[1:] else of_one_process()
    # On a line of its own: gloo prints too.
    print(f"\n{json.dumps({'processes': jax.process_count(), 'runs': found})}")
