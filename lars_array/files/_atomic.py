"""Files that are written whole or not at all."""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Callable
from contextlib import suppress
from typing import Any

__all__ = ["write_atomically"]


def write_atomically(path: Any, write: Callable[[str], None]) -> None:
    """Have `write` write a new file, and put it in the place of `path` once all of it is on the disk.

    Parameters
    ----------
    path : str or path
        Of a symbolic link, the file that it leads to is replaced.
    write : callable
        Called with the path of an empty file in the same folder. If it raises, that file is removed.

    Raises
    ------
    OSError
        If there is no such folder, it can't be written to, or `path` is anything but a file.
    """
    target = os.path.realpath(os.fsdecode(path))
    with suppress(FileNotFoundError):
        mode = os.stat(target).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
        if not stat.S_ISREG(mode):  # a device or a pipe would be replaced by a file
            raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))
    folder = os.path.dirname(target)
    temporary = os.path.join(folder, f".lars-array-{secrets.token_hex(8)}.tmp")  # short, whatever the name is
    try:
        # Not of tempfile, whose files only their owner may read; and nobody else's, by O_EXCL.
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            mode = stat.S_IMODE(os.fstat(handle).st_mode)
        finally:
            os.close(handle)
        write(temporary)
        if stat.S_IMODE(os.stat(temporary).st_mode) != mode:  # safetensors may have put a file in its place
            os.chmod(temporary, mode)
        _to_disk(temporary, os.O_RDWR)
        os.replace(temporary, target)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    with suppress(OSError):  # the new file is in place; not every system can flush a folder
        _to_disk(folder, os.O_RDONLY)


def _to_disk(path: str, flags: int) -> None:
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
