"""A step that one process of torch refuses or skips is refused or skipped by all: nothing changes, and it goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("torch.distributed")
if not torch.distributed.is_available() or not torch.distributed.is_gloo_available() or torch.__version__ < (2, 7):
    pytest.skip("needs gloo, and fully_shard on a CPU, which is there since torch 2.7", allow_module_level=True)

from ranks import Answers, answers  # noqa: E402

SCRIPTS = Path(__file__).with_name("scripts")
ELSEWHERE = "RefusedElsewhereError: 1 of 2 processes refused the step; nothing was changed"


@pytest.fixture(scope="module")
def found(shared_folder: Path) -> Answers:
    return answers(SCRIPTS / "on_decisions.py", 2, shared_folder)


def assert_refused(case: list[Any], *, first: str, second: str) -> None:
    """Both ranks have raised, changed nothing, and taken the next step."""
    for answer, start in zip(case, (first, second), strict=True):
        assert answer["seen"].startswith(start)
        assert answer.get("unchanged", True)
        assert answer.get("next", "stepped") == "stepped"


REFUSALS = {
    "nan, raise": (
        "NonFiniteError: the gradient of '0' is not finite on another process",
        "NonFiniteError: the gradient of '0' has 1 non-finite",
    ),
    "learning rate out of range": (ELSEWHERE, "ValueError: Invalid learning rate: -1.0"),
    "learning rate differs": ("ValueError: hyper-parameters must be the same",) * 2,
    "closure raises": (ELSEWHERE, "RuntimeError: no loss"),
    "gradient of another shape": (ELSEWHERE, "ValueError: the gradient of '0' must have the parameter's shape"),
    "missing gradient": ("ValueError: the gradient of 'b' must be given by all processes that hold a piece of it",) * 2,
    "other layers": ("ValueError: the layers must be the same on all 2 processes",) * 2,
    "other order": ("ValueError: the layers must be the same on all 2 processes",) * 2,
    "first step is refused": (ELSEWHERE, "ValueError: Invalid learning rate: -1.0"),
    "gradient on another mesh": ("ValueError: the gradient of '0' must be on the parameter's mesh",) * 2,
    "partial parameter": ("TypeError: parameter '0' of group 0 must not be a sum that is still to be made",) * 2,
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_one_rank_refuses_all_refuse(case: str, found: Answers) -> None:
    first, second = REFUSALS[case]
    assert_refused(found[case], first=first, second=second)


@pytest.mark.parametrize("case", ["nan, skip", "found_inf"])
def test_what_one_rank_skips_all_skip(case: str, found: Answers) -> None:
    for answer in found[case]:
        assert answer == {"seen": "stepped", "unchanged": True, "skipped": 1, "next": "stepped"}


def test_propagated_a_nan_reaches_all_pieces_of_its_layer(found: Answers) -> None:
    assert all(answer["seen"] == "stepped" and not answer["unchanged"] for answer in found["nan, propagate"])


def test_a_scaler_that_sees_an_infinity_on_one_rank_skips_on_all(found: Answers) -> None:
    assert found["scaler"] == [[[False, 4.0], [True, 2.0], [False, 2.0]]] * 2


def test_a_layer_without_a_gradient_anywhere_sits_out(found: Answers) -> None:
    assert all(
        answer == {"seen": "stepped", "unchanged": True, "next": "stepped"} for answer in found["missing on all"]
    )


def test_groups_that_are_added_are_agreed_on(found: Answers) -> None:
    assert all(answer == {"seen": "stepped", "norm": 2.0} for answer in found["group is added"])


def test_optimizers_share_a_group_of_processes(found: Answers) -> None:
    assert all(answer["seen"] == "stepped" and answer["norms"] == [2, 2] for answer in found["two optimizers"])


def test_a_gradient_that_is_cut_in_another_way_is_cut_anew(found: Answers) -> None:
    assert all(answer["seen"] == "stepped" for answer in found["gradient cut in another way"])


def test_ranks_outside_of_a_mesh_hold_nothing_of_its_parameters(found: Answers) -> None:
    for answer in found["outside of a mesh"]:
        assert answer["seen"] == "stepped"
        assert abs(answer["norm"] - 12**0.5) < 1e-12


def test_a_gradient_that_is_still_being_added_is_waited_for(found: Answers) -> None:
    assert all(found["gradient that is still added"])


def test_pieces_may_move_between_steps(found: Answers) -> None:
    assert all(found["moved"])


def test_a_rank_that_begins_anew_does_not_ask_the_others(found: Answers) -> None:
    assert found["one rank begins anew"] == [{"seen": "stepped", "next": "stepped"}] * 2


def test_a_gradient_that_is_to_be_added_is_reduced_in_a_graph(found: Answers) -> None:
    assert all(found["compiled with partial gradients"])


def test_the_group_of_a_parameter_group_is_kept_when_a_checkpoint_is_loaded(found: Answers) -> None:
    assert found["group of a parameter group"] == [{"saved": False, "kept": True, "seen": "stepped"}] * 2


def test_a_step_that_is_refused_after_a_change_of_layouts_sends_no_more_than_others(found: Answers) -> None:
    assert found["refused after a change"] == [{"seen": "NonFiniteError", "next": ["stepped", "stepped"]}] * 2


def test_autograd_notices_writes_to_the_tensor_and_to_its_piece(found: Answers) -> None:
    assert found["versions"] == [[True, True]] * 2


def test_a_compiled_step_is_compiled_once(found: Answers) -> None:
    assert all(answer == {"distance": 0.0, "frames": 1} for answer in found["compiled"])


@pytest.mark.parametrize("kind", ["killed", "late"])
def test_a_process_that_is_lost_leaves_the_others_unchanged(kind: str, shared_folder: Path) -> None:
    found = answers(SCRIPTS / "on_losses.py", 3, shared_folder, name=kind, lost=int(kind == "killed"))
    others = found["lost"] if kind == "killed" else [found["lost"][rank] for rank in (0, 2)]
    for answer in others:
        assert answer["seen"] in ("RuntimeError", "DistBackendError", "DistNetworkError")
        assert answer["unchanged"]
        assert answer["seconds"] < 10
