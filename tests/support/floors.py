"""The order of the library's modules: each stands on a floor, and imports from the floors below."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from benchmarks.imports import imported, modules

__all__ = ["FLOORS", "floor_of", "violations"]

# Of a module or of a whole package; of two that fit the longer one counts. A name is `lars_array`'s unless it is here.
FLOORS = {
    **dict.fromkeys(("_interrupts", "_messages", "_version", "_heat_maps"), 0),
    **dict.fromkeys(("_arrays", "layers", "schedules"), 1),
    **dict.fromkeys(("collectives", "core", "nonfinite"), 2),
    **dict.fromkeys(("rules", "hyperparams", "telemetry", "kernels"), 3),
    "state": 4,
    **dict.fromkeys(("_stepper", "functional", "param_groups", "recorder"), 5),
    **dict.fromkeys(("optimizer", "testing"), 6),
    **dict.fromkeys(("__init__", "files", "info", "__main__"), 7),
    **dict.fromkeys(("lars_torch", "lars_jax"), 8),
}

# Packages whose modules may import each other, and floors whose modules may; though not in a circle.
OWN = ("hyperparams", "kernels", "state", "_stepper", "files", "testing", "lars_torch", "lars_jax")
OPEN = (7,)

# What a module or a package may import of none of these, whatever their floors.
NEVER = {"kernels": ("state", "hyperparams", "optimizer"), "core": ("kernels",)}

ADAPTERS = ("lars_torch", "lars_jax")
BESIDE_THE_FACE = ("core", "_stepper", "_arrays", "hyperparams", "layers", "state.memory", "state.checkpoint")
MOST_BESIDE_THE_FACE = 7


def violations(checkout: Path) -> list[str]:
    """Return in words what is not in order.

    Parameters
    ----------
    checkout : Path
        The folder that `lars_array` and `adapters` are in.
    """
    known = modules(checkout)
    graph = {_short(name): {_short(x) for x in imported(name, known)} for name in known}
    found = [line for name, targets in graph.items() for line in _of_module(name, targets)]
    beside = {x for name, targets in graph.items() if _within(name, *ADAPTERS) for x in targets}
    beside = {x for x in beside if not _within(x, *ADAPTERS) and x != "__init__"}
    if len(beside) > MOST_BESIDE_THE_FACE:
        found.append(f"adapters import {len(beside)} modules beside lars_array itself: {', '.join(sorted(beside))}")
    return sorted(found) + _circle(graph)


def floor_of(name: str) -> int | None:
    """Return the floor of a module, without the `lars_array` before it; None if it has none."""
    fitting = [place for place in FLOORS if _within(name, place)]
    return FLOORS[max(fitting, key=len)] if fitting else None


def _of_module(name: str, targets: set[str]) -> Iterator[str]:
    own = floor_of(name)
    if own is None:
        yield f"{name} has no floor"
        return
    for target in targets - {name}:
        floor = floor_of(target)
        together = any(_within(name, package) and _within(target, package) for package in OWN)
        together = together or (own == floor and own in OPEN)
        if floor is not None and not together and floor >= own:
            yield f"{name} (floor {own}) imports {target} (floor {floor})"
        for place, excluded in NEVER.items():
            if _within(name, place) and _within(target, *excluded):
                yield f"{name} imports {target}, which {place} never does"
        if _within(name, *ADAPTERS) and not together and target not in ("__init__", *BESIDE_THE_FACE):
            yield f"{name} imports {target}, which adapters don't"


def _circle(graph: Mapping[str, set[str]]) -> list[str]:
    """Return the first circle, if there is one. A package that imports its own modules is imported before them."""
    try:
        TopologicalSorter({name: targets - {name} for name, targets in graph.items()}).prepare()
    except CycleError as error:
        return [f"a circle: {' <- '.join(error.args[1])}"]
    return []


def _short(name: str) -> str:
    return "__init__" if name == "lars_array" else name.removeprefix("lars_array.")


def _within(name: str, *places: str) -> bool:
    return any(name == place or name.startswith(f"{place}.") for place in places)
