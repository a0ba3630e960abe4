"""Checkpoints of pieces: saved by some processes and loaded by others, and whole ones that are cut into pieces."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("torch.distributed")
if not torch.distributed.is_available() or not torch.distributed.is_gloo_available() or torch.__version__ < (2, 7):
    pytest.skip("needs gloo, and fully_shard on a CPU, which is there since torch 2.7", allow_module_level=True)

from ranks import Answers, answers  # noqa: E402

SCRIPTS = Path(__file__).with_name("scripts")
BOUND = 1e-6


@pytest.fixture(scope="module", params=[2, 4])
def found(request: pytest.FixtureRequest, shared_folder: Path) -> Answers:
    for processes in (2, 4):
        saved = answers(SCRIPTS / "on_engines.py", processes, shared_folder)
        assert set(saved["save"]) == {"saved"}
    return answers(SCRIPTS / "on_checkpoints.py", request.param, shared_folder)


@pytest.mark.parametrize("processes", [2, 4])
def test_a_distributed_checkpoint_goes_on_with_other_processes(processes: int, found: Answers) -> None:
    for answer in found[f"from {processes}"]:
        assert answer["distance"] <= BOUND
        assert answer["keys"] == [["momentum_buffer", "previous_lr"]] * 6


def test_preparing_to_load_changes_no_parameter(found: Answers) -> None:
    assert all(found["preparing changes nothing"])


@pytest.mark.parametrize("engine", ["fsdp", "tensor parallel", "hsdp", "fsdp and tensor parallel"])
def test_a_whole_checkpoint_is_cut_as_the_parameters_are(engine: str, found: Answers) -> None:
    assert max(found[f"whole into {engine}"]) <= BOUND


def test_a_whole_checkpoint_of_numpy_arrays_is_cut_too(found: Answers) -> None:
    assert max(found["whole of NumPy"]) <= BOUND


def test_pieces_are_refused_where_parameters_are_whole(found: Answers) -> None:
    for answer in found["pieces into whole"]:
        assert "got a DTensor: load it by torch.distributed.checkpoint" in answer["message"]
        assert answer["unchanged"]


def test_masters_and_buffers_are_spread_as_their_parameters(found: Answers) -> None:
    for answer in found["half precision"]:
        assert answer == {"types": ["torch.float32"], "kinds": ["DTensor"], "alike": True}
