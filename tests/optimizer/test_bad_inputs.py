"""Bad inputs are rejected with a message that says what to mend, and nothing changes."""

from __future__ import annotations

import pytest
from bad_inputs import SECTIONS, Section
from bad_inputs_table import PATH, outcome, row

LINES = [(section, line) for section in SECTIONS for line in section.lines.strip().split("\n")]


@pytest.mark.parametrize(("section", "line"), LINES, ids=[line for _, line in LINES])
def test_a_bad_input_raises_the_error_of_the_table(section: Section, line: str) -> None:
    found = outcome(section, line)
    assert found != "nothing"
    assert row(line, found) in PATH.read_text().splitlines()


def test_the_table_has_150_inputs_and_no_others() -> None:
    rows = [line for line in PATH.read_text().splitlines() if line.startswith("| `")]
    assert len(rows) == len(LINES) >= 150
