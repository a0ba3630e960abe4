"""Every example is short, says how to run it, and shows what it is for; tests/distributed runs those of processes."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from example_runs import EXAMPLES, accuracy_of, run_example

PAGE = Path(__file__).resolve().parents[2] / "docs" / "examples.md"
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_short_and_says_how_to_run_it(name: str) -> None:
    source = EXAMPLES[name].read_text()
    assert len(source.splitlines()) < 60
    assert f"examples/{name}.py" in (ast.get_docstring(ast.parse(source)) or "")


def test_the_page_links_every_example_once() -> None:
    assert sorted(re.findall(r"\]\(\.\./examples/(\w+)\.py\)", PAGE.read_text())) == sorted(EXAMPLES)


@pytest.mark.parametrize("name", ["digits_equinox", "digits_lightning", "digits_nnx"])
def test_a_framework_trains(name: str) -> None:
    assert accuracy_of(name, **NO_GPU, JAX_PLATFORMS="cpu") > 0.96


def test_the_example_for_cupy_trains_on_numpy_without_a_gpu_and_prints_so() -> None:
    assert accuracy_of("digits_cupy", **NO_GPU) > 0.96
    assert run_example("digits_cupy", **NO_GPU).startswith("NumPy, because CuPy ")


@pytest.mark.gpu
def test_the_example_for_cupy_trains_on_a_gpu() -> None:
    assert accuracy_of("digits_cupy") > 0.96
    assert run_example("digits_cupy").startswith("CuPy on ")


def test_features_learned_without_labels_are_better_than_pixels_and_those_of_the_untrained_encoder() -> None:
    pixels, untrained, trained = map(float, re.findall(r" (\d\.\d{4})", run_example("ssl_torch", **NO_GPU)))
    assert trained > max(pixels + 0.05, untrained + 0.15, 0.9)


def test_a_moved_script_takes_the_steps_of_the_original() -> None:
    printed = run_example("moving_barlow_twins")
    found = re.findall(r"^(.+): loss (\S+), later (\S+); parameters differ by (\S+) of their norms$", printed, re.M)
    assert [script for script, *_ in found] == ["Barlow Twins", "VICReg"]
    for _, before, later, apart in found:
        assert float(later) < float(before) and float(apart) < 1e-12
