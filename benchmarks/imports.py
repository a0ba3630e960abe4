"""Which modules a checkout has, and which of them each imports."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

__all__ = ["imported", "modules"]

LIBRARY, ADAPTERS, DEMO = "lars_array", "adapters", "lars_array.demo"


def modules(checkout: Path) -> dict[str, Path]:
    """Return the modules of the library and its adapters, by name, without those of the demonstration.

    Parameters
    ----------
    checkout : Path
        The folder that `lars_array` and `adapters` are in.
    """
    folders = [checkout / LIBRARY, *sorted(path.parent for path in (checkout / ADAPTERS).glob("*/__init__.py"))]
    found = {}
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder.parent).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            if name != DEMO and not name.startswith(f"{DEMO}."):
                found[name] = path
    return found


def imported(name: str, known: Mapping[str, Path]) -> set[str]:
    """Return those of the known modules that a module imports anywhere, also in a function or for types alone.

    Parameters
    ----------
    name : str
        Of the module.
    known : mapping of str to Path
        From `modules`.

    Returns
    -------
    set of str
        For ``from package import x`` that is the module ``package.x``, if there is one, else ``package``.
    """
    path = known[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    return {target for x in _named(ast.parse(path.read_text()), package, known) if (target := _module(x, known))}


def _named(tree: ast.Module, package: str, known: Mapping[str, Path]) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and node.args:
            first = node.args[0]
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield first.value


def _module(name: str, known: Mapping[str, Path]) -> str | None:
    """Return the known module that a dotted name is, or is in."""
    return name if name in known else known.get(parent := name.rpartition(".")[0]) and parent
