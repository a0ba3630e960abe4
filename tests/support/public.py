"""The names that users have, and how they are called.

``python tests/support/public.py`` writes those of the library that Python finds to `tests/golden/public.json`.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

__all__ = ["MODULES", "SNAPSHOT", "differences", "public"]

MODULES = ("lars_array", "lars_array.collectives", "lars_array.testing", "lars_torch", "lars_jax")
SNAPSHOT = Path(__file__).resolve().parents[1] / "golden" / "public.json"


def public() -> dict[str, str]:
    """Return the signature of each public name, method and property, by its full name; of what has none, its type."""
    found = {}
    for module in map(import_module, MODULES):
        for name in module.__all__:
            found |= _described(f"{module.__name__}.{name}", getattr(module, name))
    return found


def _described(name: str, x: Any) -> dict[str, str]:
    if isinstance(x, Mapping):
        return {name: ", ".join(sorted(x))}  # the rules
    if not callable(x):
        return {name: type(x).__name__}
    if isinstance(x, type) and issubclass(x, BaseException):
        return {name: f"exception: {', '.join(base.__name__ for base in x.__bases__)}"}
    found = {name: _signature(x)}
    if isinstance(x, type):
        own = [cls for cls in x.__mro__ if cls.__module__.partition(".")[0] in MODULES]
        for member in sorted({key for cls in own for key in vars(cls) if not key.startswith("_")}):
            value = inspect.getattr_static(x, member)
            if member in (*getattr(x, "_fields", ()), *getattr(x, "__dataclass_fields__", ())):
                continue  # it is in the signature
            if isinstance(value, property):
                found[f"{name}.{member}"] = f"property {_signature(value.fget)}"
            elif inspect.isroutine(value):
                found[f"{name}.{member}"] = _signature(getattr(x, member))
            else:
                found[f"{name}.{member}"] = type(value).__name__
    return found


def _signature(function: Any) -> str:
    """Return parameters, annotations and defaults, in the same words in each process and whatever Python this is."""
    signature = inspect.signature(function)
    known = [x.replace(annotation=_annotation(x.annotation)) for x in signature.parameters.values()]
    returns = _annotation(signature.return_annotation)
    return re.sub(" at 0x[0-9a-f]+", "", str(signature.replace(parameters=known, return_annotation=returns)))


def _annotation(x: Any) -> Any:
    text = getattr(x, "__forward_arg__", x)
    return _Text(text) if isinstance(text, str) else x


class _Text:
    """An annotation that is shown as it was written."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return self._text


def differences(then: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Return in words what differs between two results of `public`."""
    names = sorted(then.keys() | now.keys())
    return [f"{x}: {now.get(x)}, not {then.get(x)}" for x in names if then.get(x) != now.get(x)]


if __name__ == "__main__":
    SNAPSHOT.write_text(json.dumps(public(), indent=1) + "\n")
