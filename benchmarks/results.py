"""The JSON: one machine, one set of versions, and the cases measured with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["ConflictError", "load", "save"]


class ConflictError(Exception):
    """The file holds figures that may not stand beside new ones."""


def load(path: Path, setting: dict[str, Any], *, replace: bool = False) -> dict[str, Any]:
    """Return the document that cases are added to.

    Parameters
    ----------
    path : Path
        Of the JSON, which need not exist.
    setting : dict
        What all cases of a file have in common: machine, versions and hyper-parameters.
    replace : bool
        Whether to begin anew.

    Returns
    -------
    dict
        `setting`, and "cases" by name.

    Raises
    ------
    ConflictError
        If the file was measured in another setting.
    """
    if replace or not path.exists():
        return setting | {"cases": {}}
    try:
        document: dict[str, Any] = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ConflictError(f"{path} is not JSON: {error}") from error
    differences = [line for key in setting for line in _differences(key, document.get(key), setting[key])]
    if differences or "cases" not in document:
        lines = differences or ["no cases: the file has another format"]
        raise ConflictError(
            f"{path} was measured with different settings, so new cases cannot be added to it.\n"
            + "".join(f"  {line}\n" for line in lines)
            + "Write to another folder with --out, or start a new file with --replace."
        )
    return document


def save(path: Path, document: dict[str, Any]) -> None:
    """Write the document, folder and all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n")


def _differences(key: str, then: Any, now: Any) -> list[str]:
    if isinstance(then, dict) and isinstance(now, dict):
        names = [*then, *(name for name in now if name not in then)]
        return [line for name in names for line in _differences(f"{key}, {name}", then.get(name), now.get(name))]
    return [] if then == now else [f"{key}: {_shown(then)} then, {_shown(now)} now"]


def _shown(value: Any) -> str:
    return "nothing" if value is None else "something" if isinstance(value, dict) else str(value)
