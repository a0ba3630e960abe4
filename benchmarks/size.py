"""``python -m benchmarks size [CHECKOUT]``: how large the library is, without its demonstration.

A line counts that has code on it: not a blank one, not one with a comment alone, not one of a docstring, and not one of
an import, wherever that stands. Of what goes over several lines each counts.
"""

from __future__ import annotations

import argparse
import ast
import io
import tokenize
from pathlib import Path

from benchmarks.imports import LIBRARY, imported, modules
from benchmarks.machine import ROOT

__all__ = ["code_lines", "main", "size"]

_NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def code_lines(source: str) -> int:
    """Return how many lines of a source count."""
    found: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in _NO_CODE:
            found.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            found.difference_update(_lines(node))
        elif isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if ast.get_docstring(node, clean=False) is not None:
                found.difference_update(_lines(node.body[0]))
    return len(found)


def size(checkout: Path) -> dict[str, int]:
    """Return the figures of a checkout.

    Parameters
    ----------
    checkout : Path
        The folder that `lars_array` and `adapters` are in.

    Returns
    -------
    dict of str to int
        Code lines, modules and classes of the library and of its adapters; and how many modules of the library the
        adapters import beside `lars_array` itself, with what is imported where it is needed or for types alone.
    """
    known = modules(checkout)
    ours = [name for name in known if name.partition(".")[0] == LIBRARY]
    found: dict[str, int] = {}
    for part, names in (("library", ours), ("adapters", [name for name in known if name not in ours])):
        sources = [known[name].read_text() for name in names]
        found |= {f"code lines, {part}": sum(map(code_lines, sources)), f"modules, {part}": len(names)}
        found[f"classes, {part}"] = sum(isinstance(x, ast.ClassDef) for s in sources for x in ast.walk(ast.parse(s)))
    by_adapters = set().union(*(imported(name, known) for name in known if name not in ours))
    return found | {"modules that adapters import": len(by_adapters & {*ours} - {LIBRARY})}


def main(arguments: list[str]) -> int:
    """Print the figures of a checkout, this one by default, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks size", description=__doc__)
    parser.add_argument("checkout", nargs="?", type=Path, default=ROOT)
    for name, number in size(parser.parse_args(arguments).checkout).items():
        print(f"{name:<30}{number:>6,}")
    return 0


def _lines(node: ast.stmt) -> range:
    return range(node.lineno, (node.end_lineno or node.lineno) + 1)
