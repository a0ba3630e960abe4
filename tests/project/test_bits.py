"""Steps compute what they did when `tests/golden/bits.json.gz` was recorded, to the last bit.

Bits depend on the processor and on versions of other libraries: elsewhere than where they were recorded this is
skipped. A difference that is wanted is named in `DIFFERENCES`, or the record is made anew:
``python tests/support/bits.py record tests/golden/bits.json.gz``.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import bits
import numpy as np
import pytest
from bits_environment import other_environment, settings_of

import lars_array
import lars_torch

TESTS = Path(__file__).resolve().parents[1]
RECORD = TESTS / "golden" / "bits.json.gz"

# What is accepted: a pattern of names of cases, and the reason.
DIFFERENCES: list[tuple[str, str]] = []


def assert_accounted_for(found: dict[str, list[str]], accepted: list[tuple[str, str]]) -> None:
    """Every difference is one that is named, and every one that is named is there."""
    for pattern, reason in accepted:
        assert any(fnmatch(name, pattern) for name in found), f"nothing differs in {pattern!r}: {reason}"
    left = {name: lines for name, lines in found.items() if not any(fnmatch(name, p) for p, _ in accepted)}
    text = "\n".join("\n  ".join([name, *lines]) for name, lines in [*left.items()][:20])
    assert not left, f"{len(left)} cases differ, the first of them:\n{text}"


def skip_elsewhere(record: dict[str, Any]) -> None:
    """Skip the test on another machine than that of the record."""
    if others := other_environment(record):
        pytest.skip(f"bits were recorded elsewhere: {'; '.join(line[:100] for line in others)}")


def test_steps_have_the_bits_of_the_record(tmp_path: Path) -> None:
    record = bits.read(RECORD)
    skip_elsewhere(record)
    path = tmp_path / "bits.json.gz"
    places = [str(Path(package.__file__ or "").parents[1]) for package in (lars_array, lars_torch)]
    command = [sys.executable, TESTS / "support" / "bits.py", "record", path]  # in its own process: it changes settings
    environ = settings_of(record) | {"PYTHONPATH": os.pathsep.join(places)}
    subprocess.run(command, env=environ, capture_output=True, check=False)  # what fails is a difference
    assert_accounted_for(bits.differences(record["cases"], bits.read(path)["cases"]), DIFFERENCES)


def test_a_changed_number_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    record = bits.read(RECORD)
    skip_elsewhere(record)
    name = "portable: rule flash"
    then = {name: record["cases"][name]}
    assert bits.differences(then, bits.recorded(name)["cases"]) == {}
    scenarios = [(x, way, one._replace(options=one.options | {"eps": 1e-6})) for x, way, one in bits.cases(name)]
    monkeypatch.setattr(bits, "cases", lambda only: scenarios)
    found = bits.differences(then, bits.recorded(name)["cases"])
    assert list(found) == [name]
    assert any(line.startswith("p long: ") for line in found[name])
    with pytest.raises(AssertionError, match="1 cases differ"):
        assert_accounted_for(found, [])
    assert_accounted_for(found, [("portable: *", "eps is larger")])
    with pytest.raises(AssertionError, match="nothing differs in 'cuda: "):
        assert_accounted_for(found, [("portable: *", "eps is larger"), ("cuda: *", "another device")])


def test_what_is_missing_or_fails_is_noticed() -> None:
    then = {"a": {"p": ["00", 1.0, 1.0]}, "b": {"p": ["00", 1.0, 1.0]}}
    now = copy.deepcopy(then)
    assert bits.differences(then, now) == {}
    now["a"], now["c"] = {"failed": ["ValueError: no"]}, now.pop("b")
    found = bits.differences(then, now)
    assert found["a"] == ["p: is missing", "failed: ValueError: no"]
    assert found["b"] == ["the case is missing in what was run now"]
    assert found["c"] == ["the case is missing in the record"]


@pytest.mark.parametrize("kind", ["float64", "float32", "float16", "complex64"])
def test_a_digest_changes_with_the_last_bit_but_not_with_which_nan(kind: str) -> None:
    x = np.array([1.0, -0.0, np.nan, 3.0]).astype(kind)
    y, z = x.copy(), x.copy()
    parts = z.view(z.real.dtype)
    np.copyto(parts, -parts, where=np.isnan(parts))
    assert bits.digest(z) == bits.digest(x)
    y[1] = 0.0
    assert bits.digest(y) != bits.digest(x)
    if kind != "complex64":
        y[1], y[3] = -0.0, np.nextafter(x[3], x[0])
        assert bits.digest(y) != bits.digest(x)
    assert bits.digest(x[:2]) != bits.digest(x[:2].reshape(1, 2))
