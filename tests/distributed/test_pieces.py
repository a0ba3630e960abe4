"""Layers in pieces on several processes take the steps of whole layers, with one sum over the processes a step."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pieces import (
    CUTS,
    OPTIONS,
    SECOND,
    STEPS,
    Pieces,
    assert_models_close,
    assert_same_telemetry,
    cut,
    model,
    trained_whole,
)
from processes import Ranks

from lars_array import LARS
from lars_array.kernels import NUMPY_KERNELS as KERNELS

# What a step is made of in different ways, and how many sums over the processes each step takes.
VARIANTS: dict[str, tuple[dict[str, Any], int]] = {
    "flash": ({}, 1),
    "propagate": ({"nonfinite": "propagate"}, 1),
    "no momentum": ({"momentum": 0, "always_adapt": True}, 1),
    "nesterov": ({"nesterov": True}, 1),
    "third sum": ({"rule": "optax"}, 1),
    "third sum of updates": ({"rule": "simclr-popular"}, 1),
    "previous rate": ({"rule": "nvidia", "lr": lambda step: 0.1 / (1 + step)}, 1),
    "clipped": ({"max_grad_norm": 0.5}, 1),
    "clipped, rescaled": ({"max_grad_norm": 0.5, "rescale_grad": 0.25, "nonfinite": "propagate"}, 1),
    "clipped, third sum": ({"max_grad_norm": 0.5, "rule": "optax"}, 2),
    "clipped, third sum, propagate": ({"max_grad_norm": 0.5, "rule": "optax", "nonfinite": "propagate"}, 2),
}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_pieces_are_stepped_as_whole_layers_are(variant: str, kernel: str) -> None:
    options, calls = VARIANTS[variant]
    theirs, whole = trained_whole(kernel=kernel, **options)
    for ends in CUTS.values():
        pieces = Pieces(ends, kernel=kernel, **options)
        for seed in range(1, STEPS + 1):
            pieces.step(model(seed))
        assert_models_close(pieces.joined(), theirs, 1e-12)
        assert_same_telemetry(pieces, whole)
        assert pieces.ranks.calls == 1 + calls * STEPS, "the first call compares the layers"
        assert pieces.ranks.sum_over().shapes[1:] == calls * STEPS * [(4 + 2 + 2, 3)]


@pytest.mark.parametrize("count", [1, 2, 5])
def test_there_may_be_any_number_of_processes(count: int) -> None:
    pieces = Pieces(np.linspace(0, 1, count + 1).tolist())
    for seed in range(1, STEPS + 1):
        pieces.step(model(seed))
    theirs, whole = trained_whole()
    assert_models_close(pieces.joined(), theirs, 1e-12)
    assert_same_telemetry(pieces, whole)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", ["f4", "f2", "c8", "c16"])
def test_all_types_may_be_cut(dtype: str, kernel: str) -> None:
    options = {"master_weights": dtype == "f2", "kernel": kernel, "max_grad_norm": 4.0}
    theirs, whole = trained_whole(dtype=dtype, **options)
    pieces = Pieces(CUTS["middle empty"], dtype=dtype, **options)
    for seed in range(1, STEPS + 1):
        pieces.step(model(seed, dtype))
    assert_models_close(pieces.joined(), theirs, {"f4": 1e-6, "c8": 1e-6, "f2": 1e-3, "c16": 1e-12}[dtype])
    assert_same_telemetry(pieces, whole, 1e-6 if dtype[1] in "48" else 1e-3)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("limit", [None, 0.5])
def test_layers_that_all_processes_hold_count_once(kernel: str, limit: float | None) -> None:
    options = {"max_grad_norm": limit, "kernel": kernel, "rule": "optax"}
    theirs, whole = trained_whole(**options)
    pieces = Pieces(whole=SECOND, **options)
    for seed in range(1, STEPS + 1):
        pieces.step(model(seed))
    assert_models_close(pieces.joined(), theirs, 1e-12)
    assert_same_telemetry(pieces, whole)
    assert set(pieces.ranks.sum_over().shapes[1:]) == {(2 + 1 + 2, 3)}, "whole layers are not sent"


def test_copies_have_the_same_bits_after_many_steps() -> None:
    pieces = Pieces(whole=SECOND, dtype="f4", max_grad_norm=0.1)
    for seed in range(200):
        pieces.step(model(seed, "f4"))
    pieces.joined()
    assert_same_telemetry(pieces)


def test_equal_numbers_are_added_in_float64() -> None:
    """A sum in float32 would stop at 2^24 squares."""
    size, ranks = 5_000_000, Ranks(4)
    p = [np.ones(size, np.float32) for _ in range(ranks.count)]
    g = np.full(size, 0.5, np.float32)

    def work(rank: int) -> Any:
        optimizer = LARS({"w": p[rank]}, lr=0.0, weight_decay=0.1, all_reduce=ranks.all_reduce(rank))
        optimizer.step({"w": g})
        return optimizer.norms()["w"]

    for found in ranks.run(work):
        np.testing.assert_allclose(found, [(4 * size) ** 0.5, 0.5 * (4 * size) ** 0.5], rtol=1e-12)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_layer_may_have_several_pieces_here_or_none(kernel: str) -> None:
    """As the slices of a flat buffer have, which begin and end within layers."""
    shapes = {"a": 11, "b": 3, "c": 6}
    ends = {0: {"a": (0, 4)}, 1: {"a": (4, 9)}, 2: {"a": (9, 11), "b": (0, 3), "c": (0, 6)}, 3: {}}
    rng = np.random.default_rng(0)
    options = OPTIONS | {"kernel": kernel, "max_grad_norm": 1.0, "rule": "optax"}
    start = {name: rng.standard_normal(size) for name, size in shapes.items()}
    grads = [{name: rng.standard_normal(size) for name, size in shapes.items()} for _ in range(STEPS)]
    theirs = {name: p.copy() for name, p in start.items()}
    whole = LARS(theirs, **options)
    for own in grads:
        whole.step(own)
    ranks = Ranks(4)

    def pieces_of(arrays: Any, rank: int) -> Any:
        """Return the pieces of a rank, each cut in two; a rank without any has an empty one."""
        parts = {"none": np.empty(0)}
        for name, (first, last) in ends[rank].items():
            middle = (first + last) // 2
            parts |= {f"{name}.0": arrays[name][first:middle].copy(), f"{name}.1": arrays[name][middle:last].copy()}
        return parts

    def work(rank: int) -> Any:
        params = pieces_of(start, rank)
        layer_of = {name: name[0] for name in params if name != "none"} | {"none": "c"}
        more = {"layer_of": layer_of, "layers": list("abc"), "all_reduce": ranks.all_reduce(rank)}
        optimizer = LARS(params, **options, **more)
        for own in grads:
            optimizer.step(pieces_of(own, rank))
        return params, optimizer.norms()

    found = ranks.run(work)
    for name, p in theirs.items():
        ours = [params[key] for params, _ in found for key in params if key.startswith(f"{name}.")]
        np.testing.assert_allclose(np.concatenate(ours), p, rtol=1e-12)
    assert {norms[key] for _, norms in found for key in norms if key[0] == "a"} == {found[0][1]["a.0"]}
    assert ranks.calls == 1 + 2 * STEPS


@pytest.mark.parametrize("kernel", KERNELS)
def test_parameters_of_one_layer_may_be_cut_too(kernel: str) -> None:
    """`layer_of` joins two parameters, each of which is cut."""
    layer_of, options = {"w": "dense", "b": "dense"}, OPTIONS | {"kernel": kernel}

    def make(params: Any, rank: int, all_reduce: Any) -> LARS:
        return LARS(params, **options, layer_of=layer_of, all_reduce=all_reduce)

    pieces = Pieces(CUTS["first empty"], make=make)
    theirs = model(0)
    whole = LARS(theirs, **options, layer_of=layer_of)
    for seed in range(1, STEPS + 1):
        pieces.step(model(seed))
        whole.step(model(seed))
    assert_models_close(pieces.joined(), theirs, 1e-12)
    assert_same_telemetry(pieces, whole)


def test_stages_with_layers_of_their_own_do_not_meet() -> None:
    """Of four processes, two hold some layers and two hold others."""
    ranks, stages = Ranks(4), {0: ("w", "b"), 1: ("u",)}
    start = model(0)

    def work(rank: int) -> Any:
        stage, place = divmod(rank, 2)
        params = {name: cut(start[name], (0, 0.5, 1), place) for name in stages[stage]}
        members = (2 * stage, 2 * stage + 1)
        optimizer = LARS(params, **OPTIONS, all_reduce=ranks.all_reduce(rank, members))
        for seed in range(1, 4 + stage):  # and another number of steps
            optimizer.step({name: cut(model(seed)[name], (0, 0.5, 1), place) for name in stages[stage]})
        return params

    found = ranks.run(work)
    for stage, names in stages.items():
        theirs = {name: start[name].copy() for name in names}
        whole = LARS(theirs, **OPTIONS)
        for seed in range(1, 4 + stage):
            whole.step({name: model(seed)[name] for name in names})
        ours = {name: np.concatenate([found[2 * stage + k][name] for k in (0, 1)]) for name in names}
        assert_models_close(ours, theirs, 1e-12)
        assert ranks.sum_over((2 * stage, 2 * stage + 1)).shapes == [(3, 3), *(3 + stage) * [(len(names) + 3, 3)]]


@pytest.mark.parametrize("limit", [None, 1.0])
def test_coefficients_of_many_layers_have_the_same_bits_on_all_threads(
    limit: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a rule that reads the last learning rate, which is another for every third layer."""
    count, rng = 10_000, np.random.default_rng(0)
    start, grads = rng.standard_normal((2, count, 3))
    results = []
    for threads, more in (
        ("1", {}),
        ("1", {"all_reduce": lambda table: None}),
        ("3", {"all_reduce": lambda table: None}),
    ):
        monkeypatch.setenv("LARS_ARRAY_THREADS", threads)
        params = list(start.copy())
        options = OPTIONS | {"rule": "nvidia", "lr": lambda step: 0.1 / (1 + step), "max_grad_norm": limit}
        optimizer = LARS(params, **options, kernel="compiled", **more)
        for absent in (3, 1, 1):
            optimizer.step([None if i % absent else g for i, g in enumerate(grads)])
        results.append(np.stack(params).tobytes())
    assert results[1] == results[2], "with several threads"
    assert limit is not None or results[0] == results[1], "with a sum over one process"
