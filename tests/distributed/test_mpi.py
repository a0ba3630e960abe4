"""`LARS` over processes of MPI, which hold pieces of its layers, against the same steps of the whole model."""

from __future__ import annotations

import json
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import launch
import numpy as np
import pytest
from filelock import FileLock

from lars_array import LARS

launch.needs_mpirun()

SCRIPTS = Path(__file__).parent / "scripts"
KERNELS = ("compiled", "blocked")
BOUND = 1e-6
HAS_BFLOAT16 = find_spec("ml_dtypes") is not None


@pytest.fixture(scope="module")
def is_compiled() -> None:
    """Compile the kernel for each type once, not in all processes at a time."""
    types = [np.float64, np.float32, np.float16, *([import_module("ml_dtypes").bfloat16] if HAS_BFLOAT16 else [])]
    options = {"weight_decay": 0.1, "master_weights": True, "kernel": "compiled", "all_reduce": lambda table: None}
    for dtype in types:
        LARS({"w": np.ones(1, dtype)}, 0.1, **options).step([np.ones(1, dtype)])


@pytest.fixture(scope="module")
def found(is_compiled: None, shared_folder: Path) -> dict[str, Any]:
    """What the script prints, which runs once for all workers of pytest-xdist."""
    place = shared_folder / "mpi.json"
    with FileLock(f"{place}.lock"):
        if not place.exists():
            run = launch.mpirun(4, SCRIPTS / "on_mpi.py")
            assert run.returncode == 0, run.stderr
            place.write_text(run.stdout)
    result: dict[str, Any] = json.loads(place.read_text())
    return result


def test_steps_of_pieces_are_those_of_the_whole_model(found: dict[str, Any]) -> None:
    rules = {"flash", "flash, clipped", "optax", "optax, clipped", "nvidia", "nvidia, clipped, propagate"}
    types = {"float64", "float16"} | ({"bfloat16"} if HAS_BFLOAT16 else set())
    others = {"flash, nesterov, skip", "with a list of layers"}
    assert found["runs"].keys() == {f"{kernel}: {name}" for kernel in KERNELS for name in rules | types | others}
    for name, run in found["runs"].items():
        assert run["distance"] <= BOUND, f"{name}: off by {run['distance']}"
        assert run["norms off"] <= BOUND, f"{name}: norms or trust ratios are off by {run['norms off']}"


def test_norms_and_whole_layers_have_the_same_bits_everywhere(found: dict[str, Any]) -> None:
    for name, run in found["runs"].items():
        assert not run["norms differ"], name
        assert not run["wholes differ"], name


def test_a_step_takes_one_collective_or_two_for_a_third_sum_of_clipped_gradients(found: dict[str, Any]) -> None:
    for name, run in found["runs"].items():
        assert run["calls"] == (2 if "optax, clipped" in name else 1), name


def test_sums_travel_in_float64_whatever_the_type_of_the_pieces(found: dict[str, Any]) -> None:
    assert {name: run["dtypes"] for name, run in found["runs"].items() if run["dtypes"] != ["float64"]} == {}
    assert found["many equal"] <= BOUND


def test_pieces_of_a_flat_vector_and_padding_of_nans(found: dict[str, Any]) -> None:
    for run in found["flat"].values():
        assert run["lengths"] == [[45, 0], [45, 0], [10, 28], [0, 0]]
        assert run["distance"] <= BOUND
        assert not run["norms differ"]


def test_processes_with_other_layers_are_refused_by_all(found: dict[str, Any]) -> None:
    message = "the layers must be the same on all 4 processes, in the same order; here they are "
    here = ["2, the first 'a', 'b'"] * 4
    here[2] = "3, the first 'a', 'c', 'd'"
    assert found["other layers"] == [message + text for text in here]


# ----------------------------------------------------------------------------------------- one is not like others

REFUSED = "RefusedElsewhereError: 1 of 4 processes refused the step; nothing was changed"
ELSEWHERE = "NonFiniteError: the gradient of 'uneven' is not finite on another process; nothing was changed (step 4)"
WHOLE = "NonFiniteError: a whole layer is not finite on another process; nothing was changed (step 4)"
NO_GRADIENT = (
    "ValueError: the gradient of 'even' must be given by all processes that hold a piece of it, or by none; "
    "nothing was changed"
)

SHAPE = "ValueError: the gradient of 'uneven' must have the parameter's shape (2, 5); got (9, 9)"
NAN = "NonFiniteError: the gradient of 'uneven' has 10 non-finite entries of 10; nothing was changed (step 4)"
NAN_IN_WHOLE = "NonFiniteError: the gradient of 'whole' has 12 non-finite entries of 12; nothing was changed (step 4)"

RATE = (
    "ValueError: hyper-parameters must be the same on all processes, such as a learning rate that follows a loss; "
    "nothing was changed"
)
NEGATIVE = "ValueError: Invalid learning rate: -1.0 (parameter group 0)"

# The error of most processes, "" where they skip the step, and that of one.
WRONG: dict[str, tuple[str, int, str]] = {
    "learning rate": (RATE, 3, RATE),
    "negative learning rate": (REFUSED, 3, NEGATIVE),
    "shape": (REFUSED, 1, SHAPE),
    "nan, raise": (ELSEWHERE, 2, NAN),
    "nan, skip": ("", 2, ""),
    "nan in a whole layer": (WHOLE, 2, NAN_IN_WHOLE),
    "no gradient": (NO_GRADIENT, 0, NO_GRADIENT),
    "found_inf": ("", 3, ""),
}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", WRONG)
def test_all_processes_raise_or_skip_and_change_nothing(found: dict[str, Any], kernel: str, name: str) -> None:
    most, rank, own = WRONG[name]
    errors = [most] * 4
    errors[rank] = own
    ranks = found["wrong"][kernel][name]["ranks"]
    assert [row["error"] for row in ranks] == errors
    assert not any(row["changed"] for row in ranks)
    assert [row["skipped"] for row in ranks] == [0 if most else 1] * 4
    assert max(row["seconds"] for row in ranks) < 1


@pytest.mark.parametrize("kernel", KERNELS)
def test_steps_after_it_are_those_of_the_whole_model(found: dict[str, Any], kernel: str) -> None:
    assert found["wrong"][kernel].keys() == WRONG.keys()
    for name, run in found["wrong"][kernel].items():
        assert run["distance"] <= BOUND, f"{name}: off by {run['distance']}"
        assert run["calls"] == 1 + 1 / 8, name
        assert not run["norms differ"]


def test_the_others_wait_for_a_process_that_comes_late(found: dict[str, Any]) -> None:
    run = found["late"]
    assert min(run["seconds"]) >= 2.9
    assert run["distance"] <= BOUND
    assert run["calls"] == 1


def test_survivors_of_a_killed_process_raise_and_have_changed_nothing(is_compiled: None, tmp_path: Path) -> None:
    run = launch.mpirun(4, SCRIPTS / "on_mpi_killed.py", tmp_path, options=("--with-ft", "ulfm"))
    expected = {"failed": True, "changed": False, "survivors": 3, "steps": 6, "agree": True}
    results = {int(path.stem): json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert results.keys() == {0, 2, 3}, run.stderr
    assert list(results.values()) == [[expected, expected]] * 3
