"""Examples for libraries that the environment of the other tests lacks."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "support"))

from example_runs import accuracy_of

LIBRARIES = ("lightning", "flax")


def assert_trains(name: str) -> None:
    """An example ends with a high test accuracy."""
    accuracy = accuracy_of(name)
    assert accuracy > 0.96, f"the accuracy is {accuracy:.4f}"


def check_digits_with_lightning() -> None:
    assert_trains("digits_lightning")


def check_digits_with_flax_nnx() -> None:
    assert_trains("digits_nnx")
