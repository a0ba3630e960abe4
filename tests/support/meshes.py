"""Run by `adapters/jax/test_refused.py` in a process of its own, where the CPU is four devices; prints JSON."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from lars_jax import LARS, lars


def draw(seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    shapes = {"stack": (4, 4, 2), "b": (4,), "c": (3,)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def eager(mesh: Any, donate: bool) -> dict[str, Any]:
    """Return what became of calls under a mesh of devices that are not those of the parameters alone."""
    given = jax.tree.map(jnp.asarray, draw(0))
    optimizer, plain = (LARS(jax.tree.map(jnp.copy, given), lr=0.1, momentum=0.9, donate=donate) for _ in range(2))
    grads = jax.tree.map(jnp.asarray, draw(1))
    before = optimizer.params
    refused = 0
    with jax.set_mesh(mesh):
        for call in (
            lambda: optimizer.step(grads),
            lambda: optimizer.replace_params(given),
            lambda: LARS(given, lr=0.1),
        ):
            try:
                call()
            except ValueError as error:
                refused += "can't run under jax.set_mesh of other devices: call it outside" in str(error)
    unchanged = optimizer.steps == 0 and optimizer.params is before and not before["b"].is_deleted()
    pairs = zip(jax.tree.leaves(optimizer.step(grads)), jax.tree.leaves(plain.step(grads)), strict=True)
    return {"refused": refused, "unchanged": unchanged, "went on": all(bool((a == b).all()) for a, b in pairs)}


def explicit(line: Any, plane: Any) -> Iterator[tuple[str, float]]:
    """Yield how far steps of leaves that are sharded along their layers are from those of whole ones."""
    cases = [(line, P("x"), 1), (line, P(None, "x"), 1), (line, P("x"), 2), (plane, P("x", "y"), 1)]
    cases += [(plane, P("x", "y"), 2), (plane, P(("x", "y")), 1)]
    for mesh, spec, axes in cases:
        options: dict[str, Any] = {"weight_decay": 0.1, "rule": "simclr-popular", "max_grad_norm": 1.0}
        solver = lars(0.1, layer_axes={"stack": axes, "b": 1, "c": 0}, **options)

        def step(params: Any, state: Any, grads: Any) -> Any:
            return solver.update(grads, state, params)  # noqa: B023

        specs = {"stack": spec, "b": P("x"), "c": P()}
        params, grads = draw(0), draw(1)
        expected = step(params, solver.init(params), grads)[0]
        sharded = [
            {name: jax.device_put(x[name], NamedSharding(mesh, specs[name])) for name in x} for x in (params, grads)
        ]
        for name, function, context in (
            ("eager", step, contextlib.nullcontext()),
            ("jit", jax.jit(step), contextlib.nullcontext()),
            ("set_mesh", jax.jit(step), jax.set_mesh(mesh)),
        ):
            with context:
                found, state = function(sharded[0], solver.init(sharded[0]), sharded[1])
            for array, p in ((found["stack"], "stack"), (found["b"], "b"), (state.trace["stack"], "stack")):
                assert array.sharding.is_equivalent_to(sharded[0][p].sharding, array.ndim), array.sharding
            distance = max(float(np.max(np.abs(found[x] - expected[x]))) for x in found)
            yield f"{name}, {spec}, {axes}", distance / max(float(np.max(np.abs(x))) for x in expected.values())


def main() -> None:
    # The devices share a pool of threads. Where several collective operations are queued, as by operations outside of
    # jax.jit, each may wait for threads that the other has.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    kinds = AxisType.Explicit
    line = jax.make_mesh((4,), ("x",), axis_types=(kinds,))
    plane = jax.make_mesh((2, 2), ("x", "y"), axis_types=(kinds, kinds))
    print(
        json.dumps({"eager": {str(x): eager(line, x) for x in (False, True)}, "explicit": dict(explicit(line, plane))})
    )


if __name__ == "__main__":
    main()
