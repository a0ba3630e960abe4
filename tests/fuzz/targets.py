"""What is fuzzed: `load` and `load_state_dict` with bytes from anywhere, and the seeds, which `save` has made.

The first byte of an input chooses: a whole file; the document in the header of a sound file; a state dict in JSON, in
which "@w" stands for an array.
"""

from __future__ import annotations

import json
import os
import struct
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from lars_array import LARS, load, save, warmup_cosine
from lars_array.files import _container

FOLDER = tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
PATH = str(Path(FOLDER.name) / "run")
OPTIONS: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "master_weights": True, "kernel": "blocked"}
ARRAYS = {"@w": np.ones((2, 2)), "@h": np.ones(3, np.float32), "@c": np.ones(1, np.complex64), "@i": np.ones(2, int)}


def parameters() -> dict[str, Any]:
    return {"w": np.ones((2, 2)), "h": np.ones(3, np.float16), "c": np.ones(1, np.complex64)}


def trained(**options: Any) -> tuple[dict[str, Any], LARS]:
    params = parameters()
    optimizer = LARS(params, **OPTIONS | options)
    optimizer.step({name: np.ones_like(p) for name, p in params.items()})
    return params, optimizer


class Target:
    """An optimizer, and all that is compared after an input was refused."""

    def __init__(self) -> None:
        self.params, self.optimizer = trained()
        self.before = self.seen()
        self._state = self.optimizer.state_dict()
        self._arrays = {name: p.copy() for name, p in self.params.items()}
        self.loaded = self.refused = 0

    def seen(self) -> Any:
        """Return what changes with any bit of the optimizer and its parameters."""
        views = self.optimizer.state_views()
        arrays = [p.tobytes() for p in self.params.values()]
        arrays += [x.tobytes() for own in views.values() for x in own.values() if isinstance(x, np.ndarray)]
        rates = [own["previous_lr"] for own in views.values()]
        groups = [{k: x for k, x in group.items() if k != "params"} for group in self.optimizer.param_groups]
        return arrays, rates, repr(groups), self.optimizer.steps, self.optimizer.skipped_steps

    def restore(self) -> None:
        """Undo an input that was loaded."""
        self.loaded += 1
        self.optimizer.load_state_dict(self._state)
        for name, p in self.params.items():
            p[...] = self._arrays[name]

    def __call__(self, data: bytes) -> None:
        """Load an input; raise for anything but that it is loaded or refused with nothing changed."""
        mode, data = (data[0] % 3 if data else 0), data[1:]
        if mode == 2:
            self._state_dict(data)
            return
        with open(PATH, "wb") as file:
            file.write(data if mode == 0 else around(data))
        try:
            load(PATH)
            load(PATH, self.optimizer, params=self.params)
        except ValueError as error:
            self.refused += 1
            assert type(error) is ValueError, type(error)
            assert PATH in str(error) and len(str(error)) <= 500, str(error)
            assert self.seen() == self.before, "a file that was refused has changed something"
        else:
            self.restore()

    def _state_dict(self, data: bytes) -> None:
        try:
            state = json.loads(data, object_hook=lambda x: {key: _array(y) for key, y in x.items()})
        except (ValueError, RecursionError):
            return
        try:
            self.optimizer.load_state_dict(state)
        except (ValueError, TypeError) as error:
            self.refused += 1
            assert len(str(error)) <= 500, str(error)
            assert self.seen() == self.before, "a state dict that was refused has changed something"
        else:
            self.restore()


def _array(x: Any) -> Any:
    return ARRAYS.get(x, x) if isinstance(x, str) else x


def around(document: bytes) -> bytes:
    """Return a file with sound arrays, and this document in its header."""
    text = document.decode("utf-8", "replace")
    header = json.dumps({"__metadata__": {_container.KEY: text}, **HEADER}).encode()
    return struct.pack("<Q", len(header)) + header + DATA


def parts(file: bytes) -> tuple[dict[str, Any], bytes]:
    """Return the header of a file, and the bytes of its arrays."""
    (length,) = struct.unpack("<Q", file[:8])
    return json.loads(file[8 : 8 + length]), file[8 + length :]


def made_by_save(**options: Any) -> bytes:
    params, optimizer = trained(**options)
    metadata = {"epoch": 3, "more": {"t": (1, [2.5, None]), "x": float("nan"), "y": np.float32(0.5)}}
    save(PATH, optimizer, params=params, metadata=metadata)
    return Path(PATH).read_bytes()


WHOLE = made_by_save()
HEADER, DATA = parts(WHOLE)
DOCUMENT = HEADER.pop("__metadata__")[_container.KEY]


def seeds() -> list[bytes]:
    """Return inputs that are loaded, and some that are refused."""
    files = [WHOLE, made_by_save(lr=warmup_cosine(0.1, 10, 2)), made_by_save(lr=np.array(0.5), rule="nvidia")]
    files.append(made_by_save(trust_bounds=(0.0, float("inf")), max_grad_norm=1.0))
    state = trained()[1].state_dict()
    for own, key in zip(state["state"].values(), ("@w", "@h", "@c")):
        own.update({kind: key for kind in ("momentum_buffer", "master") if kind in own})
    found = [b"\0" + file for file in files]
    found += [b"\1" + parts(file)[0]["__metadata__"][_container.KEY].encode() for file in files]
    return [*found, b"\2" + json.dumps(state).encode(), b"\0" + files[0][:100], b"\1{}", b"\2{}"]
