"""Networks that torch's engines have spread over processes step as the whole one does, with one collective."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("torch.distributed")
if not torch.distributed.is_available() or not torch.distributed.is_gloo_available() or torch.__version__ < (2, 7):
    pytest.skip("needs gloo, and fully_shard on a CPU, which is there since torch 2.7", allow_module_level=True)

from ranks import Answers, answers  # noqa: E402

SCRIPT = Path(__file__).parent / "scripts" / "on_engines.py"
RULES = ("flash", "optax", "nvidia", "clipped", "clipped, third sum")
ENGINES = ("fsdp", "tensor parallel", "hsdp", "fsdp and tensor parallel")
BOUND = 1e-6


@pytest.fixture(scope="module", params=[2, 4])
def found(request: pytest.FixtureRequest, shared_folder: Path) -> Answers:
    return answers(SCRIPT, request.param, shared_folder)


def assert_same_on_all(answers: list[Any]) -> None:
    """All ranks answer the same, bit for bit."""
    assert all(answer == answers[0] for answer in answers)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_spread_network_steps_as_the_whole_one(engine: str, rule: str, found: Answers) -> None:
    case = found[f"{engine}: {rule}"]
    assert max(answer["distance"] for answer in case) <= BOUND
    assert_same_on_all([(answer["norms"], answer["ratios"]) for answer in case])
    assert len(case[0]["norms"]) == 6


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_step_needs_one_collective(engine: str, rule: str, found: Answers) -> None:
    """Two, where gradients are clipped before a third sum.

    The first step needs one more to agree on the layers, and one to compare copies of pieces.
    """
    expected = 2 if rule == "clipped, third sum" else 1
    for answer in found[f"{engine}: {rule}"]:
        assert answer["later"] == [expected]
        has_copies = engine == "hsdp" or (engine == "fsdp and tensor parallel" and len(found["two meshes"]) > 2)
        assert answer["first"] == expected + 1 + has_copies


@pytest.mark.parametrize("engine", ["hsdp", "fsdp and tensor parallel"])
def test_replicas_have_the_same_bits(engine: str, found: Answers) -> None:
    """Of a plane of 2 x n processes, with the first half of the ranks in the first row."""
    for rule in RULES:
        sums = [answer["replicas"] for answer in found[f"{engine}: {rule}"]]
        if engine == "hsdp":
            half = len(sums) // 2
            assert sums[:half] == sums[half:]


@pytest.mark.parametrize("other", ["torch_optimizer", "timm"])
def test_others_need_a_collective_for_each_norm(other: str, found: Answers) -> None:
    for answer in found[f"collectives of {other}"]:
        assert answer >= 5, "no longer what docs/scaling.md says"


def test_pieces_of_fsdp_1_need_their_group(found: Answers) -> None:
    case = found["fsdp 1"]
    assert max(answer["distance"] for answer in case) <= BOUND
    assert all(answer["later"] == [1] for answer in case)
    assert sum(answer["without"] for answer in case), "no piece was empty"


def test_ranks_with_other_parameters_clip_by_the_norm_of_all(found: Answers) -> None:
    assert max(found["zero redundancy, norm group"]) <= BOUND
    assert min(found["zero redundancy"]) > 1e-5, "the test sees nothing"
    assert max(answer["distance"] for answer in found["pipeline"]) <= BOUND


def test_a_nan_in_one_stage_skips_the_step_of_all_stages(found: Answers) -> None:
    assert all(answer == [0, 1, 1] for answer in found["pipeline with a nan"])


CUTS = (
    "middle axis",
    "last axis",
    "stacked, cut along its layers",
    "stacked, cut within its layers",
    "stacked, on a plane",
    "partial gradient",
    "replicated gradient",
    "replicated parameter",
)


@pytest.mark.parametrize("cut", CUTS)
def test_any_cut_of_a_parameter_and_of_its_gradient_will_do(cut: str, found: Answers) -> None:
    assert max(answer["distance"] for answer in found[cut]) <= BOUND


def test_unrelated_meshes_and_plain_parameters_are_clipped_together(found: Answers) -> None:
    assert max(answer["distance"] for answer in found["two meshes"]) <= BOUND


def test_copies_that_differ_are_refused_at_the_first_step(found: Answers) -> None:
    for answer in found["other copies"] if len(found["other copies"]) > 2 else ():
        assert answer.startswith("'1' must be the same on processes that hold copies of it; nothing was changed")
        assert answer.endswith("True")


def test_engines_are_known_by_their_marks(found: Answers) -> None:
    for answer in found["marks"]:
        assert "shard_group" in answer["fsdp"] and "use_orig_params=True" in answer["flat"]
        assert "fairscale" in answer["fairscale"] and "ZeRO-3" in answer["deepspeed 3"]
        assert "Megatron" in answer["megatron"] and "flat tensor in the place of" in answer["deepspeed"]
