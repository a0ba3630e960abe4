"""The benchmark: that it counts, checks and reports right. What it measures is not tested."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import benchmarks.__main__ as command
from benchmarks import after_work, cpu, growth, memory, pieces, plot, results, table
from benchmarks.arrays import BLOCK, GRADIENT, PARAMETER, blocks, make
from benchmarks.cases import CASES, GROUPS, GROWTH, Case, chosen
from benchmarks.check import RATIOS, Truth, WrongArithmeticError
from benchmarks.contestant import FLOOR, LIMIT, Contestant, Run, UnavailableError
from benchmarks.contestants import CPU, LIMIT_NAME, REFERENCE
from benchmarks.growth import growing
from benchmarks.machine import machine, plain, versions
from benchmarks.parties import parties
from benchmarks.peers import flat_pass, optax_lars, our_lars, our_update
from benchmarks.shapes import flat
from benchmarks.timing import REST, interleaved, ratios, summary
from lars_array import LARS

SHAPES = [(7, 3), (5,), (), (40, 40)]
SMALL = Case("small", lambda: list(SHAPES), rounds=2)
BLOCKED = Contestant("lars_array blocked", our_lars.blocked, in_place=True)
LIMIT_HERE = Contestant(LIMIT_NAME, flat_pass.build, "sgd", LIMIT, in_place=True)


# ------------------------------------------------------------------------------------------------------------- cases


@pytest.mark.parametrize(
    ("name", "arrays", "elements"),
    [
        ("resnet50", 161, 25_557_032),
        ("vit-b", 152, 86_567_656),
        ("alexnet", 16, 61_100_840),
        ("tiny", 10_000, 1_000_000),
        ("flat-100m", 1, 100_000_000),
    ],
)
def test_size_of_a_case(name: str, arrays: int, elements: int) -> None:
    assert (len(CASES[name].sizes), sum(CASES[name].sizes)) == (arrays, elements)


def test_groups_of_cases() -> None:
    assert chosen(["growth", "resnet50", "tiny", "resnet50"]) == ["resnet50", "tiny", "growth"]
    assert chosen(["all"]) == GROUPS["all"] == [*CASES, "growth"]
    assert [sum(case.sizes) for case in GROWTH.values()] == [10**6, 10**7, 10**8, 10**9]
    with pytest.raises(ValueError, match=r"^case must be one of resnet50, .*; got 'resnet'$"):
        chosen(["resnet"])


def test_arrays_are_the_same_in_blocks() -> None:
    shapes = [(3, 4), (BLOCK // 8 + 1, 9)]
    for kind in (PARAMETER, GRADIENT):
        for layer, array in enumerate(make(shapes, kind)):
            assert (array.shape, array.dtype) == (shapes[layer], np.float32)
            np.testing.assert_array_equal(np.concatenate(list(blocks(layer, kind, array.size))), array.reshape(-1))
    assert make([(4,)], PARAMETER)[0][0] != make([(4,)], GRADIENT)[0][0]


def test_names_of_contestants_are_unique() -> None:
    assert len({contestant.name for contestant in CPU}) == len(CPU)
    assert {REFERENCE, LIMIT_NAME} <= {contestant.name for contestant in CPU}
    assert {contestant.rule for contestant in CPU} <= set(RATIOS)


# ------------------------------------------------------------------------------------------------------------ timing


class Machine:
    """A clock that only steps and sleep move."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def run(self, name: str, seconds: list[float]) -> Run:
        left = iter(seconds)

        def step() -> None:
            self.log.append(name)
            self.now += next(left)

        def before() -> None:
            self.now += 100

        return Run(step, list, before)

    def sleep(self, seconds: float) -> None:
        assert seconds == REST
        self.now += seconds


def test_rounds_are_interleaved() -> None:
    clock = Machine()
    given = {name: [float(10 * k + i) for i in range(9)] for k, name in enumerate("abc")}
    runs = {name: clock.run(name, seconds) for name, seconds in given.items()}
    measured = interleaved(runs, 8, clock=lambda: clock.now, sleep=clock.sleep)
    for name, seconds in given.items():
        assert measured[name] == pytest.approx(seconds[1:])  # the first is not counted
    rounds = [clock.log[i : i + 3] for i in range(0, 27, 3)]
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
    assert {order[0] for order in rounds} == {"a", "b", "c"}


def test_summary() -> None:
    # Powers of two, so that nothing is rounded.
    assert summary([4, 1, 2, 3, 16]) == {"median_ms": 3000, "quartiles_ms": [2000, 4000], "fastest_ms": 1000}
    assert summary([0.5])["quartiles_ms"] == [500, 500]


def test_ratios_are_of_the_same_round() -> None:
    # The machine was slow in the last round: medians of times would say 2/3.
    assert ratios([1, 2, 30], [2, 4, 3]) == {"median": 0.5, "quartiles": [0.5, 5.25]}


# ------------------------------------------------------------------------------------------------------------- check


def stepped(build: Any, steps: int = 3, shapes: list[Any] = SHAPES) -> list[Any]:
    run = build(make(shapes, PARAMETER), make(shapes, GRADIENT))
    for _ in range(steps):
        run.step()
    return run.parameters()


@pytest.mark.parametrize(
    ("build", "rule", "other"),
    [
        (our_lars.blocked, "flash", "optax"),
        (partial(our_update.build, donate=False), "flash", "optax"),
        (partial(optax_lars.build, donate=True), "optax", "flash"),
        (flat_pass.build, "sgd", "flash"),
    ],
)
def test_check_accepts_what_is_right(build: Any, rule: str, other: str) -> None:
    shapes = SHAPES[:2]
    params = stepped(build, shapes=shapes)
    Truth(shapes).check(params, rule, 3)
    with pytest.raises(WrongArithmeticError, match=r"^array 0 of shape"):
        Truth(shapes).check(params, other, 3)


def ours(**changed: Any) -> Any:
    hyper = {"lr": 1.0, "momentum": 0.9, "weight_decay": 1e-4, "trust_coefficient": 1e-3} | changed

    def build(params: list[Any], grads: list[Any]) -> Run:
        optimizer = LARS(params, **hyper)
        return Run(lambda: optimizer.step(grads), lambda: params)

    return build


@pytest.mark.parametrize("rule", sorted(RATIOS))
def test_check_agrees_with_the_rules_of_lars_array(rule: str) -> None:
    shapes = [(7, 3), (40, 40)]  # no vectors: pytorch_optimizer leaves them to SGD
    options = {"adapt": False} if rule == "sgd" else {"rule": rule}
    Truth(shapes).check(stepped(ours(**options), shapes=shapes), rule, 3)


def test_check_knows_that_kozistr_leaves_vectors_to_sgd() -> None:
    shapes = [(40,)]
    params = stepped(ours(adapt=False, weight_decay=0), shapes=shapes)
    Truth(shapes).check(params, "kozistr", 3)


@pytest.mark.parametrize(
    "wrong",
    [
        {"weight_decay": 0},
        {"weight_decay": 2e-4},
        {"momentum": 0.89},
        {"dampening": 0.1},
        {"nesterov": True},
        {"lr": 1.001},
        {"trust_coefficient": 1.001e-3},
        {"adapt": False},
        {"rule": "optax"},
    ],
)
def test_check_refuses_what_is_wrong(wrong: dict[str, Any]) -> None:
    with pytest.raises(WrongArithmeticError, match="is off by"):
        Truth(SHAPES).check(stepped(ours(**wrong)), "flash", 3)


def test_check_looks_at_every_element() -> None:
    shapes = [(BLOCK + 3,)]
    truth = Truth(shapes)
    run = ours()(make(shapes, PARAMETER), make(shapes, GRADIENT))
    run.step()
    (p,) = run.parameters()
    truth.check([p], "flash", 1)
    for bad in (make(shapes, PARAMETER)[0][-1], np.nan):
        p[-1] = bad
        with pytest.raises(WrongArithmeticError):
            truth.check([p], "flash", 1)
    with pytest.raises(WrongArithmeticError, match="other shapes"):
        truth.check([p[:3]], "flash", 1)


# ------------------------------------------------------------------------------------------------------------- suite


def nothing_is_done(params: list[Any], grads: list[Any]) -> Run:
    return Run(lambda: None, lambda: params)


def unavailable(params: list[Any], grads: list[Any]) -> Run:
    raise UnavailableError("needs /usr/local/bin/something, which is not here\nand more")


def not_installed(params: list[Any], grads: list[Any]) -> Run:
    import no_such_library  # noqa: F401

    raise AssertionError


def measured(*contestants: Contestant) -> dict[str, Any]:
    return cpu.measure("small", SMALL, contestants, 2, reasons=cpu.absent(contestants), with_memory=False)


def test_smoke(capsys: pytest.CaptureFixture[str]) -> None:
    slow = Contestant(REFERENCE, our_lars.blocked)
    case = measured(BLOCKED, slow, LIMIT_HERE)
    assert (case["arrays"], case["elements"]) == (4, 1627)
    assert case["parties"] == [[BLOCKED.name, REFERENCE, LIMIT_NAME]]
    assert (case["skipped"], case["failed"]) == ({}, {})
    assert list(case["contestants"]) == [BLOCKED.name, REFERENCE, LIMIT_NAME]
    assert case["contestants"][REFERENCE]["ratio"]["median"] == 1
    assert case["contestants"][LIMIT_NAME]["ratio_to_limit"]["quartiles"] == [1, 1]
    assert all(row["median_ms"] > 0 for row in case["contestants"].values())
    assert "small: flat pass: ready" in capsys.readouterr().err


def test_who_is_absent_is_named_with_the_reason() -> None:
    many = Contestant("compiles", nothing_is_done, most_arrays=3)
    case = measured(BLOCKED, Contestant("a", unavailable), Contestant("b", not_installed), many)
    assert case["skipped"] == {
        "a": "needs something, which is not here",
        "b": "No module named 'no_such_library'",
        "compiles": "compiling 4 arrays takes too long; the most is 3",
    }
    assert list(case["contestants"]) == [BLOCKED.name]
    assert case["contestants"][BLOCKED.name]["ratio"] is None


def test_a_kernel_that_is_not_here_is_named() -> None:
    def build(params: list[Any], grads: list[Any]) -> Run:
        return our_lars._build(params, grads, kernel="magic")

    assert "got 'magic'" in measured(Contestant("magic", build))["skipped"]["magic"]


def test_who_is_wrong_is_not_timed() -> None:
    case = measured(Contestant("idle", nothing_is_done), LIMIT_HERE)
    assert list(case["contestants"]) == [LIMIT_NAME]
    assert case["failed"]["idle"].startswith("WrongArithmeticError: array 0 of shape (7, 3) is off by ")


def test_without_memory_for_all_they_meet_in_parties(monkeypatch: pytest.MonkeyPatch) -> None:
    # Three copies of 1627 numbers of 4 bytes each are needed, and room is for three contestants.
    monkeypatch.setattr(cpu, "available_bytes", lambda: 70_000)
    asked: list[str] = []

    def build(params: list[Any], grads: list[Any]) -> Run:
        asked.append("limit")
        return flat_pass.build(params, grads)

    others = [Contestant(f"blocked {k}", our_lars.blocked, in_place=True) for k in range(3)]
    big = Contestant("big", our_lars.blocked, copies=9, in_place=True)
    huge = Contestant("huge", our_lars.blocked, copies=12, in_place=True)
    limit = Contestant(LIMIT_NAME, build, "sgd", LIMIT, in_place=True)
    case = cpu.measure("small", SMALL, [*others, big, huge, limit], 2, with_memory=False)
    assert case["parties"] == [[LIMIT_NAME, "blocked 0", "blocked 1"], ["big"], ["huge"], [LIMIT_NAME, "blocked 2"]]
    assert list(case["contestants"]) == ["blocked 0", "blocked 1", "blocked 2", "big", LIMIT_NAME]
    assert case["skipped"] == {"huge": "needs 0.0 GB, 0.0 GB are free"}
    assert len(asked) == 2
    for name, row in case["contestants"].items():
        assert (row["ratio_to_limit"] is None) == (name == "big")


@given(copies=st.lists(st.integers(1, 12), min_size=1, max_size=12), room=st.integers(1, 40), limit=st.integers(1, 12))
def test_everyone_is_in_one_party_and_those_compared_to_in_all_that_are_several(
    copies: list[int], room: int, limit: int
) -> None:
    who = [Contestant(f"{k}", our_lars.blocked, copies=n) for k, n in enumerate(copies)]
    always = Contestant("limit", our_lars.blocked, copies=limit)
    found = parties([*who, always], ["limit"], lambda party: sum(c.copies for c in party), room)
    met = [c.name for party in found for c in party if c is not always]
    assert sorted(met) == sorted(c.name for c in who)
    assert any(always in party for party in found)
    for party in found:
        assert len(set(party)) == len(party)
        assert len(party) == 1 or (always in party and sum(c.copies for c in party) <= room)


def test_growth(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = {f"growth-{n}": Case("one array", partial(flat, 1000 * n), 2) for n in (1, 2, 4)}
    monkeypatch.setattr(growth, "available_bytes", lambda: 2 * 4 * 3 * 3000)  # for the first two
    who = growing([*CPU, Contestant("lars_array idle", nothing_is_done)], {"lars_array compiled": "not here"})
    names = ["lars_array compiled, nonfinite=propagate", "lars_array blocked", LIMIT_NAME, "lars_array idle"]
    assert [c.name for c in who] == names
    found = growth.measure(cases, [BLOCKED, LIMIT_HERE, who[-1]], 2, with_memory=False)
    assert found["sizes"] == [1000, 2000, 4000]
    assert list(found["contestants"]) == [BLOCKED.name, LIMIT_NAME]
    for row in found["contestants"].values():
        first, second, third = row["sizes"]
        assert first["median_ms"] > 0 and second["median_ms"] > 0 and third is None
    assert found["failed"]["lars_array idle"].startswith("WrongArithmeticError")


def test_memory() -> None:
    found = memory.measured_here([(1000, 100)] * 3, BLOCKED)
    assert 0 < found["allocated"] < 1_000_000
    assert found["resident"] is None or found["resident"] < 100_000_000


# ---------------------------------------------------------------------------------------------------------- documents


def row(name: str, ratio: float | None, kind: str = "LARS", **more: Any) -> dict[str, Any]:
    compared = None if ratio is None else {"median": ratio, "quartiles": [ratio * 0.9, ratio * 1.1]}
    times = {"median_ms": 10 * (ratio or 1), "quartiles_ms": [9.0, 1234.0], "fastest_ms": 8.0}
    return {"label": name, "kind": kind, "rule": "flash", "ratio": compared, "ratio_to_limit": None} | (
        times | {"first_steps_s": 0.5, "error": 1.23e-5} | more
    )


def document() -> dict[str, Any]:
    def case(arrays: int, elements: int, **changed: Any) -> dict[str, Any]:
        return {
            "title": "Net",
            "arrays": arrays,
            "elements": elements,
            "rounds": 5,
            "parties": [["a", "b"]],
            "cores_used_by_others": 0.0123,
            "date": "2030-01-02",
            "commit": "abc",
            "contestants": {},
            "skipped": {},
            "failed": {},
        } | changed

    mine = row("lars_array blocked", None, memory={"resident": 2_500_000, "allocated": 240_000})
    peers = {
        REFERENCE: row(REFERENCE, 1.0, memory={"resident": 47_000_000, "allocated": None}),
        "slow": row("slow 1.0", 12.0, memory={"failed": "took more than 900 s"}),
        LIMIT_NAME: row("flat pass (limit, not LARS)", 0.3, LIMIT),
    }
    return {
        "machine": machine(),
        "versions": {"python": "3.11"},
        "options": {"lr": 1.0, "weight_decay": 1e-4},
        "cases": {
            "net": case(3, 3000, contestants=peers, skipped={"x": "no reason", "y": "no reason"}, failed={"z": "bad"}),
            "flat": case(1, 10**6, contestants={"lars_array blocked": mine}, parties=[["a", "c"], ["b", "c"]]),
        },
        "growth": {
            "sizes": [10**6, 10**7, 10**8],
            "rounds": 5,
            "cores_used_by_others": 0.0,
            "date": "2030-01-02",
            "commit": "abc",
            "contestants": {"lars_array blocked": {"label": "lars_array blocked", "sizes": [mine, mine, None]}},
            "failed": {"z": "worse"},
        },
        "latency": {
            "blocked": {
                state: {"import": 0.03, "construct": 0.01, "first_step": 0.1, "second_step": 0.04}
                for state in ("warm", "cold")
            },
            "compiled": {"skipped": "not here"},
        },
    }


def test_table() -> None:
    text = table.markdown(document())
    assert "## net: Net, 3 arrays, 3,000 parameters" in text
    assert "5 rounds, 2030-01-02, commit abc. Other processes used 0.01 cores.\n" in text
    assert "lr 1, weight decay 0.0001." in text
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert [cells[0] for cells in rows[2:5]] == ["flat pass (limit, not LARS)", REFERENCE, "slow 1.0"]
    assert rows[3] == [REFERENCE, "1.00", "–", "10.0", "9.00 – 1,234", "0.5", "47.0", "1e-05"]
    assert rows[4][-2] == "took more than 900 s"
    assert ["lars_array blocked", "–", "–", "10.0", "9.00 – 1,234", "0.5", "2.5 (0.24)", "1e-05"] in rows
    assert ["lars_array blocked", "10.0", "1.00", "–"] in rows  # nanoseconds an element
    assert ["lars_array blocked", "2.5 (0.24)", "2.5 (0.24)", "–"] in rows  # megabytes
    assert "* z: worse" in text
    assert ["blocked, warm", "30.0", "10.0", "100.0", "40.0"] in rows
    assert "* x; y: no reason" in text and "* z: bad" in text and "* compiled: not here" in text
    assert text.count("In 2 groups, each with c, because not all arrays fit in memory together.") == 1


@pytest.mark.parametrize("has_growth", [True, False])
@pytest.mark.parametrize("cases", [[], ["flat"], ["net", "flat"]])
def test_picture_of_any_cases(cases: list[str], has_growth: bool) -> None:
    whole = document()
    whole["cases"] = {name: whole["cases"][name] for name in cases}
    if not has_growth:
        del whole["growth"]
    assert plot.draw(whole).startswith(b"\x89PNG")


def test_cases_are_added_to_those_of_the_same_setting(tmp_path: Any) -> None:
    path = tmp_path / "new" / "cpu.json"
    setting = {"machine": machine(), "versions": {"a": "1", "b": "2"}}
    whole = results.load(path, setting)
    assert whole == setting | {"cases": {}}
    results.save(path, whole | {"cases": {"net": 1}})
    assert results.load(path, setting)["cases"] == {"net": 1}

    other = setting | {"versions": {"a": "2", "c": "1"}}
    with pytest.raises(results.ConflictError) as caught:
        results.load(path, other)
    for line in ("versions, a: 1 then, 2 now", "b: 2 then, nothing now", "c: nothing then, 1 now", "--replace"):
        assert line in str(caught.value)
    assert results.load(path, other, replace=True) == other | {"cases": {}}


@pytest.mark.parametrize("text", ["{", '{"case": "ResNet-50"}'])
def test_a_file_of_another_kind_is_left_alone(tmp_path: Any, text: str) -> None:
    path = tmp_path / "cpu.json"
    path.write_text(text)
    with pytest.raises(results.ConflictError):
        results.load(path, {"machine": machine()})
    assert path.read_text() == text


def test_machine_and_versions() -> None:
    assert machine()["cores"] >= 1
    assert {"python", "numpy"} <= set(versions())
    json.dumps(machine())


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("no 'a' in 'b' (/home/me/x-1.0/b/__init__.py)", "no 'a' in 'b' (__init__.py)"),
        ("C:\\Users\\me\\x.dll is missing", "x.dll is missing"),
        ("1/2 of it\nsecond line", "1/2 of it"),
    ],
)
def test_reasons_tell_nothing_of_folders(message: str, shown: str) -> None:
    assert plain(message) == shown


def test_labels() -> None:
    assert Contestant("numpy, fast", nothing_is_done, distribution="numpy").label == f"numpy {np.__version__}, fast"
    assert Contestant("a", nothing_is_done, distribution="no-such-thing", kind=FLOOR).label == "a (floor, not LARS)"


# ----------------------------------------------------------------------------------------------------------- command


def test_command(tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(command, "CASES", {"resnet50": SMALL})
    monkeypatch.setattr(cpu.memory, "measure", lambda case, name: {"resident": None, "allocated": 0})
    arguments = ["cpu", "--case", "resnet50", "--rounds", "2", "--only", "blocked", "--out", str(tmp_path)]
    assert command.main(arguments) == 0
    assert "| lars_array blocked |" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"cpu.json", "cpu.md", "cpu.png"}
    written = (tmp_path / "cpu.md").read_text()
    (tmp_path / "cpu.md").unlink()
    assert command.main(["cpu", "--render", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "cpu.md").read_text() == written

    monkeypatch.setattr(command, "FORMAT", "another")
    assert command.main(["cpu", "--render", "--out", str(tmp_path)]) == 2
    assert "cpu.json has format" in capsys.readouterr().err
    monkeypatch.undo()

    monkeypatch.setattr(command, "CASES", {"resnet50": SMALL})
    monkeypatch.setattr(command, "versions", lambda: {"python": "2.7"})
    assert command.main(arguments) == 2
    assert "different settings" in capsys.readouterr().err


def test_command_fails_with_a_contestant(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(command, "CASES", {"resnet50": SMALL})
    monkeypatch.setattr(command, "CPU", [Contestant("idle", nothing_is_done)])
    assert command.main(["cpu", "--case", "resnet50", "--only", "idle"]) == 1
    assert "* idle: WrongArithmeticError" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--case", "resnet"], "case must be one of"),
        (["--rounds", "0"], "--rounds must be at least 1"),
        (["--only", "nobody"], "no contestant has any of 'nobody' in its name"),
    ],
)
def test_command_refuses(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        command.main(["cpu", *arguments])
    assert message in capsys.readouterr().err


def test_command_lists(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["cpu", "--list"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in [*CASES, *GROUPS, *(contestant.name for contestant in CPU)])


# ------------------------------------------------------------------------------------------------------------ pieces


def test_what_a_sum_over_processes_costs_is_a_ratio_of_rounds() -> None:
    found = pieces.measure(SHAPES, rounds=3, kernel="blocked")
    assert list(found) == ["without", "all_reduce", "ratio"]
    assert found["without"]["fastest_ms"] > 0 and found["all_reduce"]["fastest_ms"] > 0
    low, high = found["ratio"]["quartiles"]
    assert low <= found["ratio"]["median"] <= high


def test_steps_after_work_are_compared_after_the_same_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Any
) -> None:
    pytest.importorskip("jax")
    found = after_work.measure([(8, 8), (3,)], 2)
    assert {work: list(rows) for work, rows in found.items()} == after_work.AFTER
    assert all(rows[after_work.SGD]["ratio"]["median"] == 1.0 for rows in found.values())
    monkeypatch.setitem(after_work.CASES, "tiny", lambda: [(5,)])
    assert after_work.main(["--case", "tiny", "--rounds", "2", "--json", str(tmp_path / "found.json")]) == 0
    assert "lars_torch" in capsys.readouterr().out
    assert list(json.loads((tmp_path / "found.json").read_text())["cases"]) == ["tiny"]
