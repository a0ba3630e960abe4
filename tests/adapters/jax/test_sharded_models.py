"""`lars_jax.lars` for a model whose parameters are split over devices, of one process and of two."""

from __future__ import annotations

import socket
from typing import Any

import jax
import pytest
from devices import printed_by

# How many all-reduces a step takes. The third sum of optax's rule is of clipped gradients, so it waits for the norm of
# all of them. Kernels that are split along both axes are summed over one mesh axis after the other: one of the two over
# "model" and "data", the other over "data" and "model", which makes three in a row.
ALL_REDUCES = {
    "FSDP, flash, whole gradients": 1,
    "FSDP, flash, clipped": 1,
    "FSDP, optax, whole gradients": 1,
    "FSDP, optax, clipped": 2,
    "FSDP, nvidia, whole gradients": 1,
    "FSDP, nvidia, clipped": 1,
    "tensor parallel, flash, clipped": 1,
    "tensor parallel, optax, clipped": 2,
    "tensor parallel, nvidia, clipped": 1,
    "uneven, flash, clipped": 1,
    "uneven, optax, clipped": 2,
    "uneven, nvidia, clipped": 1,
    "FSDP and tensor parallel, flash, whole gradients": 3,
    "FSDP and tensor parallel, flash, clipped": 3,
    "FSDP and tensor parallel, optax, whole gradients": 3,
    "FSDP and tensor parallel, optax, clipped": 6,
    "FSDP and tensor parallel, nvidia, whole gradients": 3,
    "FSDP and tensor parallel, nvidia, clipped": 3,
}
# Those of `optax.lars`.
OF_OPTAX = {
    "FSDP, optax.lars, whole gradients": 7,
    "FSDP, optax.lars, clipped": 8,
    "FSDP and tensor parallel, optax.lars, whole gradients": 12,
    "FSDP and tensor parallel, optax.lars, clipped": 15,
}


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    (result,) = printed_by("sharded_models.py", 8)
    runs: dict[str, Any] = result["runs"]
    return runs


@pytest.fixture(scope="module")
def of_both() -> list[dict[str, Any]]:
    with socket.create_server(("localhost", 0)) as free:
        address = f"localhost:{free.getsockname()[1]}"
    results = printed_by("sharded_models.py", 2, [(address, "0"), (address, "1")])
    assert [result["processes"] for result in results] == [2, 2]
    return [result["runs"] for result in results]


def assert_unsharded(runs: dict[str, Any]) -> None:
    for name, run in runs.items():
        assert run["distance"] <= 1e-6, f"{name}: off by {run['distance']}"


def assert_same_copies(*of_processes: dict[str, Any]) -> None:
    """Raise if two devices that have the same part of an array have other bits of it."""
    for name in of_processes[0]:
        digests: dict[str, set[str]] = {}
        for runs in of_processes:
            for part, found in runs[name]["digests"].items():
                digests.setdefault(part, set()).update(found)
        differing = [part for part, found in digests.items() if len(found) > 1]
        assert not differing, f"{name}: copies differ of {differing}"


def test_twenty_steps_on_eight_devices_are_those_on_one(found: dict[str, Any]) -> None:
    assert found.keys() == ALL_REDUCES.keys() | OF_OPTAX.keys()
    assert_unsharded(found)


def test_devices_with_the_same_part_have_the_same_bits(found: dict[str, Any]) -> None:
    assert_same_copies(found)


@pytest.mark.skipif(jax.__version_info__ < (0, 7, 2), reason="XLA joins all-reduces since JAX 0.7.2")
def test_the_number_of_all_reduces_beside_that_of_optax(found: dict[str, Any]) -> None:
    for name, expected in (ALL_REDUCES | OF_OPTAX).items():
        assert found[name]["all-reduces"] == expected, f"{name}: {found[name]['all-reduces']} all-reduces"


def test_steps_of_two_processes_are_those_of_one(of_both: list[dict[str, Any]]) -> None:
    for runs in of_both:
        assert_unsharded(runs)


def test_two_processes_have_the_same_bits(of_both: list[dict[str, Any]]) -> None:
    for name in of_both[0]:
        assert of_both[0][name]["digests"].keys() & of_both[1][name]["digests"].keys(), f"{name}: nothing is on both"
    assert_same_copies(*of_both)
