"""A file of safetensors: named arrays, and a document of JSON in its header."""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from lars_array._arrays import form_of
from lars_array._messages import shown
from lars_array.files._atomic import write_atomically
from lars_array.files._host import TYPES, dtype_of, to_host
from lars_array.state.checkpoint import located_in_file

__all__ = ["Container", "opened", "write_container"]

KEY = "lars_array"  # of the document in the header
FORMAT, VERSION = "lars-array", 1

# The names that safetensors has for types. Complex arrays are real ones with another axis of length 2.
_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool"}
for _bits in (8, 16, 32, 64):
    _NAMES |= {f"I{_bits}": f"int{_bits}", f"U{_bits}": f"uint{_bits}"}
_PARTS = {"complex64": "float32", "complex128": "float64"}


def write_container(path: Any, document: Mapping[str, Any], arrays: Mapping[str, Any]) -> None:
    """Write a file, atomically.

    Raises
    ------
    ValueError, TypeError
        For an array of another type than `TYPES`, and names that can't be encoded.
    OSError
        As `write_atomically` does, and if the disk is full.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    types = {}
    tensors = {}
    for key, x in arrays.items():
        array = to_host(x)
        if array.dtype.name not in TYPES:
            raise TypeError(f"{shown(key)} must be of one of the types {', '.join(TYPES)}; got {shown(array.dtype)}")
        if array.dtype.name in _PARTS:
            types[key] = array.dtype.name
            array = array.reshape(*array.shape, 1).view(_PARTS[array.dtype.name])
        tensors[key] = array
    whole = {"format": FORMAT, "version": VERSION, **document, "complex": types}
    text = json.dumps(whole, allow_nan=False)

    def write(temporary: str) -> None:
        try:
            save_file(tensors, temporary, metadata={KEY: text})
        except SafetensorError as error:
            found = re.search(r"os error (\d+)|code: (\d+)", str(error))  # by release
            number = int(found[1] or found[2]) if found else errno.EIO
            raise OSError(number, os.strerror(number), os.fspath(path)) from error

    for key in tensors:
        try:
            key.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"names must be text that UTF-8 can encode; got {shown(key)}") from error
    write_atomically(path, write)


class Container:
    """An open file.

    Attributes
    ----------
    document : dict
        What `write_container` was given.
    keys : set of str
        The names of its arrays.
    """

    def __init__(self, tensors: Any) -> None:
        self._tensors, self.keys = tensors, set(tensors.keys())
        self.document = _document(tensors.metadata())
        self._complex = self.document.pop("complex", {})
        if not isinstance(self._complex, dict) or not set(self._complex) <= self.keys:
            raise ValueError("its complex arrays must be among its arrays")

    def form(self, key: str) -> Any:
        """Return an array of the shape and type of one in the file, which takes no memory."""
        view = self._tensors.get_slice(key)
        name, shape = view.get_dtype(), tuple(view.get_shape())
        if name not in _NAMES:
            raise ValueError(f"{shown(key)} has the unknown type {shown(name)}")
        dtype = dtype_of(_NAMES[name])
        if key in self._complex:
            kind = self._complex[key]
            if not isinstance(kind, str) or kind not in _PARTS or _PARTS[kind] != dtype.name or shape[-1:] != (2,):
                raise ValueError(f"{shown(key)} must be of parts of {shown(kind)}; got {dtype.name} {shown(shape)}")
            dtype, shape = np.dtype(kind), shape[:-1]
        return form_of(dtype, shape)

    def read(self, key: str) -> Any:
        """Return an array, copied out of the file."""
        form = self.form(key)
        array = np.asarray(self._tensors.get_tensor(key))
        return array.view(form.dtype).reshape(form.shape) if key in self._complex else array


@contextmanager
def opened(path: Any) -> Iterator[Container]:
    """Open a file that `write_container` has written.

    Raises
    ------
    ValueError
        If it is no such file, or damaged, with its path; and for errors of the block.
    OSError
        If it can't be read.
    """
    from safetensors import SafetensorError, safe_open

    name = os.fspath(path)
    if not stat.S_ISREG(os.stat(name).st_mode):
        raise ValueError(f"path must be that of a file; got {shown(name)}, which is none")
    with open(name, "rb"):
        pass  # the errors of safetensors don't say whether the file may be read
    with located_in_file(name):
        try:
            with safe_open(name, framework="numpy") as tensors:
                yield Container(tensors)
        except SafetensorError as error:
            raise ValueError(f"not a whole file of safetensors: {error!s:.200}") from error
        except (RecursionError, OverflowError) as error:
            raise ValueError("its header is too deep, or holds too large a number") from error


def _document(metadata: Any) -> dict[str, Any]:
    """Return the document in a header."""
    if not metadata or KEY not in metadata:
        raise ValueError("not a file of lars_array.save: its header has no state of lars_array")
    try:
        document = json.loads(metadata[KEY])
    except json.JSONDecodeError as error:
        raise ValueError(f"its state must be JSON: {error}") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ValueError(f"its header must be of the format {FORMAT!r}; got {shown(document)}")
    if type(document.get("version")) is not int or document["version"] != VERSION:
        raise ValueError(
            f"its version must be {VERSION}, which this release of lars-array reads; got "
            f"{shown(document.get('version'))}, written by lars-array {shown(document.get('library'))}"
        )
    return document
