"""A record of what steps compute, to the bit: ``python tests/support/bits.py record FILE``, or ``compare FILE``.

It uses what is public, beside `bits_cuda`, so that it says of any version of the library, the one that Python
finds, whether it computes what another one has. ``--only PATTERN`` takes some of the cases, each named by the way to
take steps and its scenario: ``--only 'jax*: rule*'``.
"""

from __future__ import annotations

import argparse
import functools
import gzip
import hashlib
import json
import os
import sys
from collections.abc import Callable, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
from bits_cases import SCENARIOS, Scenario
from bits_environment import environment, other_environment, settings_of
from bits_runs import InPlace, Pure, Subject, canonical, lars_step, taken

__all__ = ["WAYS", "cases", "differences", "digest", "main", "read", "recorded", "write"]


def _torch(scenario: Scenario, **options: Any) -> Subject:
    from bits_torch import Torch

    return Torch(scenario, **options)


def _jax(name: str, scenario: Scenario, **options: Any) -> Subject:
    import bits_jax

    subject: Subject = getattr(bits_jax, name)(scenario, **options)
    return subject


def _cuda(scenario: Scenario) -> Subject:
    from bits_cuda import Cuda

    return Cuda(scenario)


WAYS: dict[str, Callable[[Scenario], Subject]] = {
    "compiled": functools.partial(InPlace, kernel="compiled"),
    "compiled-1": functools.partial(InPlace, kernel="compiled", threads=1),
    "compiled-2": functools.partial(InPlace, kernel="compiled", threads=2),
    "compiled-3": functools.partial(InPlace, kernel="compiled", threads=3),
    "blocked": functools.partial(InPlace, kernel="blocked"),
    "portable": functools.partial(InPlace, kernel="portable"),
    "cuda": _cuda,
    "torch": _torch,
    "torch-compiled": functools.partial(_torch, compiled=True),
    "update": Pure,
    "lars_step": lars_step,
    "jax": functools.partial(_jax, "Jitted"),
    "jax-eager": functools.partial(_jax, "Eager", donate=False),
    "jax-donated": functools.partial(_jax, "Eager", donate=True),
}


def cases(only: str = "*") -> list[tuple[str, str, Scenario]]:
    """Return name, way and scenario of each case whose name fits a pattern."""
    found = [(f"{way}: {scenario.name}", way, scenario) for scenario in SCENARIOS for way in scenario.on]
    return [case for case in found if fnmatch(case[0], only)]


def recorded(only: str = "*") -> dict[str, Any]:
    """Take all steps, and return the record of them: "environment", and "cases" by name."""
    found = {}
    with np.errstate(all="ignore"):
        for name, way, scenario in cases(only):
            try:
                found[name] = {key: [digest(x), *_preview(x)] for key, x in taken(WAYS[way], scenario).items()}
            except Exception as error:  # of one case, which must not hide what others say
                found[name] = {"failed": [f"{type(error).__name__}: {error}"]}
    return {"environment": environment(), "cases": found}


def digest(x: Any) -> str:
    """Return what changes with any bit of an array but those of nan, which is nan whatever its sign and payload."""
    return hashlib.sha256(f"{x.dtype} {x.shape}".encode() + canonical(x).tobytes()).hexdigest()[:16]


def _preview(x: Any) -> list[float | str]:
    """Return the first number and the mean of all sizes, as far as it is readable."""
    sizes = np.abs(np.ravel(x)).astype(np.float64)
    if not sizes.size or x.dtype == np.uint8:
        return []
    return [float(f"{number:.7g}") if np.isfinite(number) else str(number) for number in (sizes[0], np.mean(sizes))]


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return what differs between the "cases" of two records, by name of case; missing ones of either are differences.

    Parameters
    ----------
    then, now : mapping
        The "cases" of what `recorded` has returned.
    """
    found = {}
    for name in sorted(then.keys() | now.keys()):
        if name not in then or name not in now:
            found[name] = [f"the case is missing in {'the record' if name not in then else 'what was run now'}"]
            continue
        keys = [*then[name], *(key for key in now[name] if key not in then[name])]
        lines = [_describe(key, then[name].get(key), now[name].get(key)) for key in keys]
        if any(lines):
            found[name] = [line for line in lines if line]
    return found


def _describe(key: str, then: list[Any] | None, now: list[Any] | None) -> str:
    """Return in words how an array differs from what it was, nothing if it does not."""
    if then is None or now is None:
        return f"{key}: {now[0]}" if now and key == "failed" else f"{key}: {'is new' if then is None else 'is missing'}"
    if then[0] == now[0]:
        return ""
    if then[1:] != now[1:]:
        return f"{key}: its first number and the mean of all sizes are {now[1:]}, not {then[1:]}"
    return f"{key}: other bits" + (f", about the same numbers: {then[1:]}" if then[1:] else "")


def read(path: Path) -> dict[str, Any]:
    """Return the record in a file."""
    record: dict[str, Any] = json.loads(gzip.decompress(path.read_bytes()))
    return record


def write(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record, the same file for the same record."""
    text = json.dumps(record, separators=(",", ":"))
    path.write_bytes(gzip.compress(text.encode(), 9, mtime=0))


def main(arguments: list[str] | None = None) -> int:
    """Return the exit status: 1 if something differs."""
    parser = argparse.ArgumentParser(prog="bits.py", description=__doc__)
    parser.add_argument("task", choices=["record", "compare"])
    parser.add_argument("file", type=Path)
    parser.add_argument("--only", default="*", metavar="PATTERN")
    asked = parser.parse_args(arguments)
    then = read(asked.file) if asked.task == "compare" else {}
    if then and settings_of(then) != dict(os.environ):  # libraries have read these when they were imported
        os.execve(sys.executable, [sys.executable, *sys.argv], settings_of(then))
    now = recorded(asked.only)
    if asked.task == "record":
        write(asked.file, now)
        failed = {name: case["failed"][0] for name, case in now["cases"].items() if "failed" in case}
        print("\n".join([f"{name}: {reason}" for name, reason in failed.items()] + [f"{len(now['cases'])} cases"]))
        return int(bool(failed))
    for line in other_environment(then):
        print(f"another environment: {line}")
    wanted = {name: case for name, case in then["cases"].items() if fnmatch(name, asked.only)}
    found = differences(wanted, now["cases"])
    for name, lines in found.items():
        print("\n  ".join([name, *lines]))
    print(f"{len(found)} of {len(wanted)} cases differ")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
