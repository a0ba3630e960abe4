"""Values in messages, in a length that a person reads, and names that may have been meant."""

from __future__ import annotations

import reprlib
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["Problems", "listed", "located", "near", "shown", "warn"]

LONGEST = 100  # characters of a value
SMALL = 8  # elements of a NumPy array that are shown

_NOT_THE_CALLER = ("lars_array", "lars_torch", "lars_jax", "torch", "jax", "optax", "contextlib")


class _Short(reprlib.Repr):
    """Representations of nested containers and of arrays that are neither long nor slow to make."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxdict, self.maxlist, self.maxtuple, self.maxset = 3, 4, 4, 6, 4
        self.maxstring = self.maxother = LONGEST
        self.maxlong = 40

    def repr_instance(self, x: Any, level: int) -> str:
        """Return type, shape and dtype of arrays, without reading them, and the beginning and the end of others."""
        shape, dtype = getattr(x, "shape", None), getattr(x, "dtype", None)
        is_small = type(x).__module__ == "numpy" and getattr(x, "size", SMALL) < SMALL
        if dtype is None or not isinstance(shape, tuple) or isinstance(x, type) or is_small:
            return super().repr_instance(x, level)
        return f"{type(x).__name__} of shape {self.repr(tuple(shape))} and dtype {getattr(dtype, 'name', dtype)}"


_short = _Short()


def shown(x: Any) -> str:
    """Return a short representation of any object, on one line, whatever its own does."""
    try:
        text = " ".join(_short.repr(x).split())
    except Exception:  # such as of an integer with too many digits
        text = f"an object of type {type(x).__name__}"
    half = LONGEST // 2 - 2
    return text if len(text) <= LONGEST + 2 else f"{text[:half]}...{text[-half:]}"


def near(name: Any, known: Iterable[str]) -> str:
    """Return the known names that are nearly `name`, as a question to add to a message, or ''."""
    from difflib import get_close_matches  # which importing lars_array need not wait for

    found = get_close_matches(name[:LONGEST], list(known), n=3) if isinstance(name, str) else []
    return f"; did you mean {' or '.join(map(shown, found))}?" if found else ""


def listed(names: Iterable[Any]) -> str:
    """Return names with commas, the first of them only where there are many."""
    text = ", ".join(map(str, names))
    return text if len(text) <= 3 * LONGEST + 50 else f"{text[: 3 * LONGEST]}..."


@contextmanager
def located(place: str) -> Iterator[None]:
    """Add a place to the messages of ValueError and TypeError."""
    try:
        yield
    except (ValueError, TypeError) as error:
        if not place or type(error) not in (ValueError, TypeError):
            raise
        raise type(error)(f"{error} ({place})") from error


def warn(message: str) -> None:
    """Warn at the line that has called this library, which other libraries may have done."""
    level, frame = 1, sys._getframe()
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in _NOT_THE_CALLER:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, UserWarning, stacklevel=level)


class Problems:
    """Errors that are collected, to be raised as one that names all of them."""

    def __init__(self) -> None:
        self.errors: list[Exception] = []

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Collect a ValueError or TypeError, and go on after the block."""
        try:
            yield
        except (ValueError, TypeError) as error:
            self.errors += getattr(error, "collected", [error])

    def raise_all(self) -> None:
        """Raise what was collected: one error as it is; of several one with the first of their messages."""
        if not self.errors:
            return
        if len(self.errors) == 1:
            raise self.errors[0]
        told: list[str] = []
        for error in self.errors:
            text = str(error)
            told.append(text if len(text) <= 2 * LONGEST else f"{text[: 2 * LONGEST]}...")
            if sum(map(len, told)) > 2 * LONGEST:
                break
        more = f"; and {len(self.errors) - len(told)} more" if len(told) < len(self.errors) else ""
        kind = TypeError if all(isinstance(error, TypeError) for error in self.errors) else ValueError
        summary: Any = kind(f"{len(self.errors)} misfits: {'; '.join(told):.{3 * LONGEST + 50}}{more}")
        summary.collected = self.errors
        raise summary
