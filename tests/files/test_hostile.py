"""Files that are damaged, foreign or hostile: a ValueError with the path, whatever they are, and nothing is changed."""

from __future__ import annotations

import json
import random
import struct
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from assertions import assert_refused, fingerprint
from safetensors.numpy import save_file

from lars_array import LARS, load, save
from lars_array.files._container import KEY


def trained() -> tuple[dict[str, Any], LARS]:
    params = {"w": np.arange(6.0).reshape(2, 3), "c": np.ones(3, np.complex64), "h": np.ones(2, np.float16)}
    optimizer = LARS(params, lr=0.1, momentum=0.9, weight_decay=0.1, master_weights=True)
    optimizer.step({name: np.ones_like(p) for name, p in params.items()})
    return params, optimizer


@pytest.fixture
def path(tmp_path: Path) -> Path:
    params, optimizer = trained()
    save(tmp_path / "run", optimizer, params=params, metadata={"epoch": 3})
    return tmp_path / "run"


def parts(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def rewritten(path: Path, header: Any, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def document(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the document in a file; another one is returned as text or list, or the same is changed."""
    header, data = parts(path)
    known = json.loads(header["__metadata__"][KEY])
    new = change(known)
    header["__metadata__"][KEY] = new if isinstance(new, str) else json.dumps(new if isinstance(new, list) else known)
    rewritten(path, header, data)


def assert_no_file(path: Path, message: str = "") -> None:
    """It is refused with its path by all ways to load it, and nothing is changed."""
    params, optimizer = trained()
    before = fingerprint([params, optimizer])
    for call in (lambda: load(path), lambda: load(path, optimizer, params=params)):
        with pytest.raises(ValueError, match=message or None) as caught:
            call()
        assert caught.type is ValueError
        text = str(caught.value)
        assert text.endswith(f"(file {str(path)!r})"), text
        assert len(text) <= 500
    assert fingerprint([params, optimizer]) == before, "a refused file has changed something"


def test_every_length_that_is_too_short(path: Path) -> None:
    whole = path.read_bytes()
    for length in [*range(0, 40), *range(40, len(whole), 37), len(whole) - 1]:
        path.write_bytes(whole[:length])
        assert_no_file(path, "not a whole file of safetensors")
    path.write_bytes(whole + b"\0")
    assert_no_file(path, "not a whole file of safetensors")


def test_flipped_bits(path: Path) -> None:
    """In the header they are refused or change what is read; never anything else."""
    whole, rng = path.read_bytes(), random.Random(0)
    params, optimizer = trained()
    for _ in range(1500):
        data = bytearray(whole)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        try:
            load(path, optimizer, params=params)
        except ValueError as error:
            assert str(path) in str(error)


def test_foreign_files(path: Path) -> None:
    save_file({"w": np.ones(3)}, path, metadata={"format": "pt"})
    assert_no_file(path, "not a file of lars_array.save")
    save_file({"w": np.ones(3)}, path)
    assert_no_file(path, "not a file of lars_array.save")
    for data in (b"", b"PK\x03\x04", b"\x80\x04\x95", bytes(1000), b"\xff" * 1000):
        path.write_bytes(data)
        assert_no_file(path)


HOSTILE = {
    "offsets that overlap": lambda h: h["param/w"].update(data_offsets=h["momentum_buffer/w"]["data_offsets"]),
    "offsets beyond the end": lambda h: h["param/w"].update(data_offsets=[0, 2**40]),
    "offsets backwards": lambda h: h["param/w"].update(data_offsets=[48, 0]),
    "offsets that are negative": lambda h: h["param/w"].update(data_offsets=[-48, 0]),
    "a huge shape": lambda h: h["param/w"].update(shape=[2**40, 2**20]),
    "a shape beyond all numbers": lambda h: h["param/w"].update(shape=[2**63, 2**63]),
    "a shape that is too small": lambda h: h["param/w"].update(shape=[2]),
    "a negative shape": lambda h: h["param/w"].update(shape=[-2, -3]),
    "an unknown type": lambda h: h["param/w"].update(dtype="F65"),
    "a type of another size": lambda h: h["param/w"].update(dtype="F32"),
    "8-bit floats": lambda h: h["param/w"].update(dtype="F8_E4M3", shape=[48]),
    "a tensor that is none": lambda h: h.update({"param/w": None}),
    "another tensor": lambda h: h.update({"other": h.pop("param/w")}),
    "a buffer of nothing": lambda h: h.update({"momentum_buffer/x": h.pop("momentum_buffer/w")}),
    "a part of a state": lambda h: h.update({"state/step": h.pop("param/w")}),
    "no metadata": lambda h: h.pop("__metadata__"),
    "metadata that is no text": lambda h: h["__metadata__"].update({KEY: 1}),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_headers(path: Path, kind: str) -> None:
    header, data = parts(path)
    HOSTILE[kind](header)
    rewritten(path, header, data)
    assert_no_file(path)


@pytest.mark.parametrize("depth", [200, 10_000, 300_000])
def test_json_that_is_too_deep(path: Path, depth: int) -> None:
    header, data = parts(path)
    rewritten(path, b'{"a":' * depth + b"1" + b"}" * depth, data)
    assert_no_file(path)
    rewritten(path, header, data)
    for opening, closing in (("[", "]"), ('{"dict":', "}"), ('{"tuple":[', "]}")):
        text = f'{{"format": "lars-array", "version": 1, "metadata": {opening * depth}1{closing * depth}}}'
        header["__metadata__"][KEY] = text
        rewritten(path, header, data)
        assert_no_file(path, "its header is too deep" if depth > 1000 else "")


def test_a_header_length_beyond_the_file(path: Path) -> None:
    data = path.read_bytes()
    for length in (len(data), 2**31, 2**63, 2**64 - 1):
        path.write_bytes(struct.pack("<Q", length) + data[8:])
        assert_no_file(path, "not a whole file of safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(version=2), "its version must be 1, which this release of lars-array reads; got 2"),
        (lambda d: d.update(version="1"), "its version must be 1, which this release of lars-array reads; got '1'"),
        (lambda d: d.update(version=True), "its version must be 1"),
        (lambda d: d.pop("version"), "its version must be 1"),
        (lambda d: d.update(format="other"), "its header must be of the format 'lars-array'; got"),
        (lambda d: [], "its header must be of the format 'lars-array'; got"),
        (lambda d: "{", "its state must be JSON"),
        (lambda d: "9" * 5000, ""),
        (lambda d: d.update(kind="other"), "it must hold a state dict; got 'other'"),
        (lambda d: d.update(kind="State"), ""),
        (lambda d: d.update(metadata=None), "its metadata must be a mapping; got None"),
        (lambda d: d.update(metadata={"dict": {"x": {"a": 1}}}), "a value must be a number, a string, a list"),
        (lambda d: d.update(complex={"other": "complex64"}), "its complex arrays must be among its arrays"),
        (lambda d: d.update(complex=[1]), "its complex arrays must be among its arrays"),
        (lambda d: d["complex"].update({"param/c": "complex128"}), "'param/c' must be of parts of 'complex128'"),
        (lambda d: d["complex"].update({"param/c": []}), "'param/c' must be of parts of"),
        (lambda d: d["complex"].update({"param/w": "complex128"}), "'param/w' must be of parts of 'complex128'"),
        (lambda d: d.update(param_groups={}), "its groups must be a list, and its rates by name"),
        (lambda d: d.update(previous_lr=[]), "its groups must be a list, and its rates by name"),
        (lambda d: d.update(param_groups=[1]), "a group must hold names and options; got 1"),
        (lambda d: d["param_groups"][0].update(names=[["w"]]), "the names of a group must be strings"),
        (
            lambda d: d["param_groups"][0]["options"].pop("lr"),
            r"a group must lack the options \[\]; got one that lacks",
        ),
        (lambda d: d.update(omitted=["lr"]), r"a group must lack the options \['lr'\]; got one that lacks \[\]"),
        (lambda d: d.update(omitted=1), "omitted must be a list of names; got 1"),  # found by fuzzing
        (lambda d: d.update(steps=-1), r"steps must be an integer from 0 to 2\*\*63 - 1; got -1"),
        (lambda d: d.update(steps=2**63), r"steps must be an integer from 0 to 2\*\*63 - 1; got 9223372036854775808"),
        (lambda d: d.update(skipped_steps=True), r"skipped_steps must be an integer from 0 to 2\*\*63 - 1; got True"),
    ],
)
def test_documents_that_are_none(path: Path, change: Any, message: str) -> None:
    document(path, change)
    assert_no_file(path, message)


OPTIONS = [
    (-1.0, "Invalid learning rate: -1.0"),
    ("fast", "lr must be a number; got 'fast'"),
    ({"schedule": "other"}, "the schedule 'other' is unknown; known are warmup_cosine, warmup_polynomial"),
    ({"schedule": []}, "the schedule .* is unknown"),
    ({"schedule": "warmup_cosine", "peak_lr": 1.0}, "total_steps"),
    ({"schedule": "warmup_cosine", "peak_lr": -1.0, "total_steps": 3}, "peak_lr must be finite"),
    ({"schedule": "warmup_cosine", "self": 1, "peak_lr": 1.0, "total_steps": 3}, "self"),
    ({"float": "1"}, "a value must be a number"),
    ({"float": []}, "a value must be a number"),
    ({"array": 0.5, "dtype": "object"}, "types of arrays are float64"),
    ({"array": 0.5, "dtype": ["f8", 2]}, "types of arrays are float64"),
    ({"array": 1000, "dtype": "int8"}, "1000 can't be represented in int8"),
    ({"array": {"float": "nan"}, "dtype": "int8"}, "nan can't be represented in int8"),
    (
        {"array": 1e308, "dtype": "float32"},
        r"1e\+308 can't be represented in float32",
    ),  # NumPy warned of it
    ({"scalar": 0.1, "dtype": "float32"}, "0.1 can't be represented in float32"),
    ({"array": [1], "dtype": "float32"}, "a value must be a number"),
    ({"scalar": 0.5, "dtype": "complex64"}, "the type of a number must be one of numbers"),
    ({"tuple": [0.1]}, "lr must be a number"),
]


@pytest.mark.parametrize(("value", "message"), OPTIONS, ids=str)
def test_options_that_are_none(path: Path, value: Any, message: str) -> None:
    document(path, lambda known: known["param_groups"][0]["options"].update(lr=value))
    params, optimizer = trained()
    text = ""
    with pytest.raises(ValueError, match=message) as caught:
        load(path, optimizer, params=params)
    text = str(caught.value)
    assert_refused(lambda: load(path, optimizer, params=params), ValueError, text, optimizer, params)


def test_nothing_is_allocated_beyond_the_size_of_the_file(path: Path) -> None:
    """Python's and NumPy's memory; a header of 100 MB is the most that safetensors reads."""
    header, data = parts(path)
    for name in ("param/w", "momentum_buffer/w"):
        for shape in ([2**40], [2**20, 2**20], [0, 2**62]):
            changed = {**header, name: {**header[name], "shape": shape}}
            rewritten(path, changed, data)
            tracemalloc.start()
            with pytest.raises(ValueError, match="file"):
                load(path)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak < 20 * path.stat().st_size, f"{peak} bytes for a file of {path.stat().st_size}"


def test_the_path_is_that_of_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none")
    with pytest.raises(ValueError, match="path must be that of a file"):
        load(tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="no /proc")
def test_no_file_stays_open(path: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        load(path)
        document(path, lambda known: known.update(version=2))
        assert_no_file(path)
        document(path, lambda known: known.update(version=1))
    assert len(list(Path("/proc/self/fd").iterdir())) == before
