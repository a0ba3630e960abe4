"""Changes to the structure of an input: another value in JSON, a key that is new, lost or renamed, or a deeper nest."""

from __future__ import annotations

import json
import random
import struct
from typing import Any

import targets

VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 3, 2**31, 2**63, 2**64, 10**30, 0.5, -0.5, 1e308, "", "x", "w", "h", "@w", "@h"),
    *([], {}, [[]], [0], [2, 2], [0, 32], [32, 0], {"float": "nan"}, {"float": "inf"}, {"tuple": [0, 1]}, {"dict": {}}),
    *({"array": 0.5, "dtype": "float32"}, {"scalar": 1, "dtype": "bfloat16"}, {"schedule": "warmup_cosine"}),
    {"schedule": "warmup_polynomial", "peak_lr": 1, "total_steps": 3},
]
KEYS = ["w", "h", "c", "names", "options", "lr", "rule", "dtype", "shape", "momentum_buffer", "master", "state", "dict"]


def places(x: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """Return where values stand: containers with an index or a key."""
    for key in list(x) if isinstance(x, dict) else range(len(x)) if isinstance(x, list) else ():
        found.append((x, key))
        places(x[key], found)
    return found


def changed(x: Any, rng: random.Random) -> Any:
    """Return a value of JSON with one change, made in place."""
    found = places(x, [])
    if not found:
        return rng.choice(VALUES)
    inside, key = rng.choice(found)
    kind = rng.randrange(7)
    if kind == 0:
        del inside[key]
    elif kind == 1 and isinstance(inside, dict):
        inside[rng.choice(KEYS)] = inside.pop(key)
    elif kind == 2:
        other, place = rng.choice(found)
        inside[key] = json.loads(json.dumps(other[place]))
    elif kind == 3 and isinstance(inside, list):
        inside.append(json.loads(json.dumps(inside[key])))
    elif kind == 4 and rng.random() < 0.05:
        for _ in range(rng.choice([10, 200, 2000])):
            inside[key] = [inside[key]]
    elif kind == 5 and isinstance(inside[key], int):
        inside[key] += rng.choice([-1, 1, 8, 2**32])
    else:
        inside[key] = json.loads(json.dumps(rng.choice(VALUES)))
    return x


def mutated(data: bytes, rng: random.Random) -> bytes | None:
    """Return an input with one change to its structure, None if it has none."""
    mode, body = data[:1], data[1:]
    try:
        if mode and mode[0] % 3:
            return mode + json.dumps(changed(json.loads(body), rng)).encode()
        header, arrays = targets.parts(body)
        header = json.dumps(changed(header, rng)).encode()
        return mode + struct.pack("<Q", len(header)) + header + arrays
    except (ValueError, RecursionError, struct.error, KeyError, TypeError):
        return None
