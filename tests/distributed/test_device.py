"""Pieces of layers on devices: the host waits for nothing but the first comparison of the layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from distant_pieces import Distant
from pieces import (
    CUTS,
    OPTIONS,
    SECOND,
    assert_models_close,
    assert_same_telemetry,
    groups_of,
    model,
    trained_whole,
)
from pretended_devices import DEVICES, Device, pretended

from lars_array import LARS


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    yield from pretended(request.param, monkeypatch)


VARIANTS: dict[str, dict[str, Any]] = {
    "flash": {},
    "propagate": {"nonfinite": "propagate"},
    "skip": {"nonfinite": "skip", "momentum": 0},
    "third sum": {"rule": "optax"},
    "previous rate": {"rule": "nvidia", "lr": lambda step: 0.1 / (1 + step), "dampening": 0.5},
    "clipped": {"max_grad_norm": 0.5, "rescale_grad": 0.25},
    "clipped, third sum": {"max_grad_norm": 0.5, "rule": "optax"},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("ends", ["uneven", "middle empty"])
def test_a_step_reads_nothing_and_is_that_of_whole_layers(device: Device, ends: str, variant: str) -> None:
    options = VARIANTS[variant]
    pieces = Distant(device, CUTS[ends], **options)
    for seed in range(1, 6):
        pieces.step(model(seed))
    theirs, whole = trained_whole(5, **options)
    assert_models_close(pieces.joined(), theirs, 1e-12)
    assert_same_telemetry(pieces, whole)
    assert pieces.synchronized() == [None] * 3 and pieces.counts() == [(5, 0)] * 3
    assert pieces.ranks.calls == 1 + 5 * (1 + (variant == "clipped, third sum"))


@pytest.mark.parametrize("limit", [None, 0.5])
def test_layers_that_all_processes_hold_count_once(device: Device, limit: float | None) -> None:
    pieces = Distant(device, whole=SECOND, max_grad_norm=limit)
    for seed in range(1, 4):
        pieces.step(model(seed))
    theirs, whole = trained_whole(3, max_grad_norm=limit)
    assert_models_close(pieces.joined(), theirs, 1e-12)
    assert_same_telemetry(pieces, whole)


def test_parts_of_layers_and_missing_gradients(device: Device) -> None:
    """Two parameters are one layer, two others are another that is whole, and empty pieces have no gradients."""
    layer_of = {"w": "first", "u": "first", "b": "second", "s": "second"}

    def make(params: Any, rank: int, all_reduce: Any) -> LARS:
        groups = groups_of(params, all_reduce=None, **adapted)
        return LARS(groups, **OPTIONS, layer_of=layer_of, all_reduce=all_reduce)

    adapted = {"adapt": True, "weight_decay": 0.1}
    pieces = Distant(device, CUTS["middle empty"], whole=SECOND, make=make)
    theirs = model(0)
    whole = LARS(groups_of(theirs, **adapted), **OPTIONS, layer_of=layer_of)

    def step(rank: int, optimizer: LARS, grads: Any) -> None:
        optimizer.step({n: g if 0 not in g.shape else None for n, g in grads.items()})

    for seed in range(1, 5):
        assert pieces.outcomes(step, model(seed)) == [None] * 3
        whole.step(model(seed))
    assert_models_close(pieces.joined(), theirs, 1e-12)


def test_a_step_is_three_launches_beside_the_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    for device in pretended("cuda", monkeypatch):
        pieces = Distant(device, (0, 1))
        pieces.step(model(1))
        launcher = pieces.optimizers[0]._stepper._programs[0]._kernel.Device
        launcher.launches.clear()
        for seed in (2, 3):
            pieces.step(model(seed))
        names = [name.split("_")[0] for name, _ in launcher.launches if name != "write_pointers"]
        assert names == 2 * ["sums", "coefficients", "apply"]


def test_half_precision_has_masters(device: Device) -> None:
    try:
        device.put(np.ones(1, "f2"))
    except TypeError as error:
        pytest.skip(f"this library has no half precision: {error}")
    pieces = Distant(device, dtype="f2", master_weights=True)
    pieces.is_ready = True
    for seed in range(1, 5):
        pieces.is_ready = seed > 2  # the host waits for the step that makes masters
        pieces.step(model(seed, "f2"))
    theirs, _ = trained_whole(4, dtype="f2", master_weights=True)
    assert_models_close(pieces.joined(), theirs, 2e-3)
