"""README.md and docs: figures are those that were measured, code fits on a page, the reference is complete."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import public
import pytest

from benchmarks import figures

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *(p for p in sorted((ROOT / "docs").rglob("*.md")) if "_build" not in p.parts)]
WIDEST = 88  # columns of code, which a page of the documentation shows without scrolling


def assert_narrow(text: str) -> None:
    """No line of a fenced block that is code is wider than the page."""
    wide = [line for block in code_blocks(text) for line in block.splitlines() if len(line) > WIDEST]
    assert not wide, "\n".join(wide)


def code_blocks(text: str) -> list[str]:
    """Return the fenced blocks without those that are directives."""
    return re.findall(r"^```(?!\{)[^\n]*\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_code_fits_on_a_page(page: Path) -> None:
    assert_narrow(page.read_text())


def test_wide_code_is_found() -> None:
    text = "{}\n```python\n{}\n```\n```{{toctree}}\n{}\n```\n"
    assert_narrow(text.format("x" * 89, "x" * 88, "x" * 89))
    with pytest.raises(AssertionError, match=r"^x{89}\n"):
        assert_narrow(text.format("", "x" * 89, ""))


QUICK_STARTS = [block for block in code_blocks((ROOT / "README.md").read_text()) if "print(" in block]


@pytest.mark.parametrize("block", QUICK_STARTS, ids=["numpy", "torch", "jax"])
def test_the_quick_starts_print_what_the_readme_says(block: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip(re.search(r"import (torch|jax|numpy)", block)[1])
    exec(block, {})
    assert [line + "\n" for line in re.findall("# (.*)$", block)] == [capsys.readouterr().out]


@pytest.mark.parametrize("page", figures.DOCUMENTS, ids=lambda page: page.name)
def test_figures_are_those_of_the_results(page: Path) -> None:
    text = page.read_text()
    assert figures.filled(text) == text, "python -m benchmarks tables"


def test_all_figures_are_somewhere() -> None:
    marked = [name for page in figures.DOCUMENTS for name in re.findall("<!-- figures: (.*) -->", page.read_text())]
    assert sorted(marked) == sorted(figures.FIGURES)


def test_only_figures_are_written() -> None:
    text = "a 0.5\n<!-- figures: gpu -->\n0.5\n<!-- end of figures -->\nb 0.5\n"
    before, table, after = re.split("<!-- .* -->", figures.filled(text))
    assert (before, after) == ("a 0.5\n", "\nb 0.5\n")
    assert "| ResNet-50 |" in table
    assert "0.5" not in table.split()


def test_the_command_writes_and_then_finds_nothing_to_write(tmp_path, monkeypatch, capsys) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- figures: cpu -->\n<!-- end of figures -->\n")
    monkeypatch.setattr(figures, "DOCUMENTS", [page])
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    assert figures.main(["--check"]) == 1
    assert "torch_optimizer" not in page.read_text()
    assert figures.main([]) == 0
    assert "| torch_optimizer | 1.00 |" in page.read_text()
    assert figures.main(["--check"]) == 0
    assert capsys.readouterr().out == "differs: page.md\nwritten: page.md\n"


def documented(pages: list[str]) -> set[str]:
    """Return the names that Sphinx is told to document, with their modules."""
    names, module = set(), ""
    for kind, name in re.findall(r"^\.\. ([a-z:]+):: (\S+)$", "\n".join(pages), re.MULTILINE):
        if kind.endswith("module"):
            module = name
        else:
            names.add(f"{module}.{name}")
    return names


def test_every_public_name_is_in_the_reference() -> None:
    pages = [page.read_text() for page in PAGES if page.parent.name == "api"]
    modules = map(import_module, public.MODULES)
    names = {f"{module.__name__}.{name}" for module in modules for name in module.__all__}
    assert names - documented(pages) <= {"lars_array.__version__"}


def test_a_page_of_the_reference_is_read_by_module() -> None:
    page = ".. py:module:: a\n.. autofunction:: f\n\n.. currentmodule:: a.b\n.. autoclass:: C\n   :members:\n"
    assert documented([page]) == {"a.f", "a.b.C"}
