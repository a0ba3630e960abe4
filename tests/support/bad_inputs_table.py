"""``python tests/support/bad_inputs_table.py`` writes tests/BAD_INPUTS.md: what each bad input raises."""

from __future__ import annotations

import copy
import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from bad_inputs import SECTIONS, Section

__all__ = ["PATH", "outcome", "row", "table"]

PATH = Path(__file__).parents[1] / "BAD_INPUTS.md"
HEAD = """# Bad inputs

Every line below raises the error beside it and leaves parameters, state and counters as they were, bit for bit.
`tests/optimizer/test_bad_inputs.py` runs all of them and compares them with this table, which
`python tests/support/bad_inputs_table.py` writes.
"""


def outcome(section: Section, line: str) -> str:
    """Return the error that a line raises as "Type: message"; raise AssertionError where it changes something."""
    names: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(section.setup, names)
        before = _bits(eval(section.watched, names))
        try:
            exec(line, names)
        except Exception as error:
            found = f"{type(error).__name__}: {error}"
        else:
            found = "nothing"
        assert _bits(eval(section.watched, names)) == before, f"{line} has changed something"
    return re.sub(r" at 0x[0-9a-f]+", "", found)


def table() -> str:
    """Return the text of the table."""
    count = sum(section.lines.strip().count("\n") + 1 for section in SECTIONS)
    text = [HEAD, f"{count} inputs.\n"]
    for section in SECTIONS:
        rows = [row(line, outcome(section, line)) for line in section.lines.strip().split("\n")]
        text += [f"## {section.title}\n", f"```{section.setup}```\n", "| line | error |", "|---|---|", *rows, ""]
    return "\n".join(text)


def row(line: str, found: str) -> str:
    """Return the row of the table for a line and its outcome."""
    return f"| `{_cell(line)}` | {_cell(found)} |"


def _bits(watched: Any) -> bytes:
    """Return arrays of any library, and everything else, as bytes to compare."""
    return pickle.dumps(_plain(copy.copy(watched)))


def _plain(x: Any) -> Any:
    if isinstance(x, dict):
        return {key: _plain(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [_plain(value) for value in x]
    return (str(x.dtype), np.asarray(x).tobytes()) if hasattr(x, "dtype") else x


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    PATH.write_text(table())
