"""The comparison of two checkouts: that it runs, and reports right. What it measures is not tested."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import benchmarks.__main__ as command
import lars_array
from benchmarks import compare
from benchmarks.compare_worker import Worker
from benchmarks.comparisons import COMPARISONS, DEFAULT, PEER, Comparison, chosen, kept_bytes
from benchmarks.contestant import Run

CHECKOUT = Path(lars_array.__file__).parents[1]
LARS = "small: lars_array, raise"


def test_two_checkouts_are_compared(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Both are this one."""
    pytest.importorskip("torch")
    file = tmp_path / "found.json"
    arguments = [str(CHECKOUT), str(CHECKOUT), "--case", "small: lars_[at]*", "--rounds", "3", "--json", str(file)]
    assert command.main(["compare", *arguments]) == 0
    out, err = capfd.readouterr()
    names = chosen(["small: lars_[at]*"])
    assert len(names) == 3
    assert [line.split("|")[1].strip() for line in out.splitlines()[2:]] == names
    assert [line.partition(":")[0] for line in err.splitlines()] == ["small"] * 3
    document = json.loads(file.read_text())
    assert list(document["comparisons"]) == names and document["rounds"] == 3
    for one in document["comparisons"].values():
        assert one["old"]["median_ms"] > 0 and one["new"]["median_ms"] > 0
        low, high = one["ratio"]["quartiles"]
        assert low <= one["ratio"]["median"] <= high
    assert str(CHECKOUT.parent) not in file.read_text()


def test_a_folder_without_a_library_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        command.main(["compare", str(CHECKOUT), str(tmp_path)])
    assert "has no lars_array" in capsys.readouterr().err


@pytest.mark.parametrize("case", ["small: *jax*", "host-161"])
def test_all_others_run_as_well(case: str) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("jax")
    worker = Worker()
    for name in chosen([case]):
        first = worker.answer({"do": "build", "name": name})
        assert set(first["seconds"]) == ({"", PEER} if case == "host-161" else {""}), first
        found = worker.answer({"do": "time", "count": 2, "clock": "cpu"})
        assert all(x > 0 for x in found["seconds"].values()) and found["seconds"].keys() == first["seconds"].keys()
        assert worker.answer({"do": "drop"}) == {}


def test_gradients_of_the_host_cases_move() -> None:
    torch = pytest.importorskip("torch")
    for build in (COMPARISONS["host-161: lars_torch"].build, COMPARISONS["host-161: lars_torch"].peer):
        assert build is not None
        seen: list[Any] = []
        params = [np.ones(64, np.float32) for _ in range(3)]
        run = build(params, [np.full(64, 0.5, np.float32) for _ in range(3)])
        optimizer: Any = run.step.__self__  # type: ignore[attr-defined]
        for _ in range(3):
            run.before()
            tensors = [p for group in optimizer.param_groups for p in group["params"]]
            seen.append([p.grad.data_ptr() for p in tensors])
            assert all(torch.equal(p.grad, torch.full((64,), 0.5)) for p in tensors)
            run.step()
        assert all(a != b for before, after in pairwise(seen) for a, b in zip(before, after))


def test_memory_is_what_is_kept_beside_the_arrays() -> None:
    found = kept_bytes([(10, 10)] * 300)
    assert 0 < found < 10_000


class Told:
    """A process that answers what it was told to, and notes what it was asked."""

    def __init__(self, *answers: dict[str, Any]) -> None:
        self.answers, self.asked = [*answers], Counter[str]()

    def ask(self, what: str, **more: Any) -> None:
        self.asked[what] += 1

    def answer(self) -> dict[str, Any]:
        return self.answers.pop(0)


def times(*seconds: float, peer: float | None = None) -> list[dict[str, Any]]:
    return [{"seconds": {"": x} | ({} if peer is None else {PEER: peer})} for x in seconds]


def test_ratios_are_those_of_the_same_round() -> None:
    old, new = Told(*times(9.0, 1.0, 2.0, 4.0), {}), Told(*times(9.0, 1.0, 3.0, 8.0), {})
    found: Any = compare.compared(old, new, LARS, 3)  # type: ignore[arg-type]
    assert found["ratio"] == {"median": 1.5, "quartiles": [1.25, 1.75]}
    assert (found["old"]["median_ms"], found["new"]["median_ms"]) == (2000.0, 3000.0)
    assert old.asked == new.asked == {"build": 1, "time": 3, "drop": 1}


def test_ratios_to_a_peer_are_those_of_the_same_process() -> None:
    old, new = Told(*times(1.0, 1.0, peer=0.5), {}), Told(*times(1.0, 3.0, peer=1.0), {})
    found: Any = compare.compared(old, new, "host-161: lars_torch", 1)  # type: ignore[arg-type]
    assert (found["old_to_peer"]["median"], found["new_to_peer"]["median"]) == (2.0, 3.0)
    cells = [cell.strip() for cell in compare.markdown({"host": found}).splitlines()[2].split("|")]
    assert cells[2:] == ["3.000", "3.000 – 3.000", "3.000", "1,000", "3,000", "ms", "2.00 (2.00)", "3.00 (3.00)", ""]


def test_what_fails_is_in_the_table() -> None:
    old, new = Told({"failed": "ValueError: no"}), Told({"skipped": "no torch"})
    found: Any = compare.compared(old, new, LARS, 3)  # type: ignore[arg-type]
    assert found == {"failed": "old: ValueError: no"}
    memory: Any = compare.compared(Told({"bytes": 200.0}), Told({"bytes": 300.0}), "memory: lars_array", 3)  # type: ignore[arg-type]
    lines = compare.markdown({"a": found, "b": memory}).splitlines()
    assert [cell.strip() for cell in lines[2].split("|")[1:7]] == ["b", "1.500", "1.500 – 1.500", "–", "200", "300"]
    assert lines[3:] == ["", "* a: failed: old: ValueError: no"]


def test_a_worker_tells_what_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(params: list[Any], grads: list[Any]) -> Run:
        raise RuntimeError("not today")

    monkeypatch.setitem(COMPARISONS, "x", Comparison(lambda: [(3,)], fails))
    monkeypatch.setitem(COMPARISONS, "y", Comparison(lambda: [(3,)] * 9, fails, most_arrays=8))
    assert Worker().answer({"do": "build", "name": "x"}) == {"failed": "RuntimeError: not today"}
    assert Worker().answer({"do": "build", "name": "y"}) == {"skipped": "compiling 9 arrays takes too long"}


def test_cases_are_chosen_by_name_and_by_pattern() -> None:
    assert chosen(["memory", "tiny: *lars, jitted"]) == ["tiny: lars_jax.lars, jitted", "memory: lars_array"]
    assert {name.partition(":")[0] for name in chosen(DEFAULT)} == set(DEFAULT)
    with pytest.raises(ValueError, match=r"case must be one of resnet50, vit-b, tiny, small, host-1.*; got 'large'"):
        chosen(["large"])
    for arguments in (["--case", "large"], ["--rounds", "0"]):
        with pytest.raises(SystemExit, match="2"):
            command.main(["compare", str(CHECKOUT), str(CHECKOUT), *arguments])
