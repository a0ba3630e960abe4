"""How large the library is said to be."""

from __future__ import annotations

from pathlib import Path

import pytest

import benchmarks.__main__ as command
from benchmarks.size import code_lines, size

SOURCE = '''"""A docstring
of two lines."""

from a import (
    b,
)

# A comment.
TABLE = {
    "a": 1,  # two
    "b": """text
    """,
}


class A:
    """And another."""

    def f(self) -> None:
        """And another."""
        import c

        c.f()
'''


def test_lines_with_code_count_but_not_imports() -> None:
    assert code_lines(SOURCE) == 5 + 3
    assert code_lines("") == 0
    assert code_lines("x = 1; y = 2\n") == 1


def test_figures_of_a_checkout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {
        "lars_array/__init__.py": "from lars_array.core import f",
        "lars_array/core.py": "class A: pass\nx = 1",
        "lars_array/state/__init__.py": "",
        "lars_array/state/rows.py": "y = 1",
        "lars_array/demo/__init__.py": "x = 1\n" * 100,
        "adapters/lars_torch/__init__.py": "import lars_array\nfrom lars_array.state import rows\nclass B: pass",
        "adapters/lars_torch/engine.py": "def f():\n    import lars_array.core\nfrom lars_array import core",
        "tests/test_core.py": "x = 1\n" * 100,
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    expected = {"code lines, library": 3, "modules, library": 4, "classes, library": 1}
    expected |= {"code lines, adapters": 2, "modules, adapters": 2, "classes, adapters": 1}
    assert size(tmp_path) == expected | {"modules that adapters import": 2}
    assert command.main(["size", str(tmp_path)]) == 0
    assert "modules that adapters import       2\n" in capsys.readouterr().out
