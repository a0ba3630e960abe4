"""Saving that fails leaves the old file as it was and no other one; kill -9 leaves the old or the new one whole."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from assertions import assert_same

from lars_array import LARS, load, save
from lars_array.files import _atomic, _container, _loading

CRASHES = int(os.environ.get("LARS_CRASHES", "20"))  # make crash: 200


def optimizer(size: int = 1000) -> LARS:
    made = LARS({"w": np.ones(size)}, lr=0.1, momentum=0.9)
    made.step({"w": np.ones(size)})
    return made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with an old file."""
    save(tmp_path / "run", optimizer(), metadata={"is": "old"})
    return tmp_path


def assert_as_it_was(folder: Path, names: tuple[str, ...] = ("run",)) -> None:
    """The old file is whole, and nothing lies beside it."""
    assert sorted(os.listdir(folder)) == sorted(names)
    assert load(folder / "run").metadata == {"is": "old"}


# --------------------------------------------------------------------------------------------------- kinds of failures


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, OSError(errno.EIO, "I/O error"), SystemExit])
@pytest.mark.parametrize("place", ["open", "fsync", "replace", "close"])
def test_an_error_at_any_place(folder: Path, place: str, error: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(_atomic.os, place, fail)
        with pytest.raises(error if isinstance(error, type) else type(error)):
            save(folder / "run", optimizer(), metadata={"is": "new"})
    assert_as_it_was(folder)


def test_an_error_while_it_is_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors.numpy

    def fail(tensors: Any, path: str, metadata: Any) -> None:
        Path(path).write_bytes(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(safetensors.numpy, "save_file", fail)
    with pytest.raises(KeyboardInterrupt):
        save(folder / "run", optimizer(), metadata={"is": "new"})
    assert_as_it_was(folder)


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a megabyte with an old file on it."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root may mount a file system")
    try:
        save(place / "run", optimizer(), metadata={"is": "old"})
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.skipif(shutil.which("mount") is None, reason="no mount")
def test_the_disk_is_full(full_disk: Path) -> None:
    with pytest.raises(OSError, match="No space left on device") as caught:
        save(full_disk / "run", optimizer(10**6), metadata={"is": "new"})
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(full_disk / "run"))
    assert_as_it_was(full_disk)


@pytest.mark.skipif(shutil.which("mount") is None, reason="no mount")
def test_the_file_system_is_read_only(full_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(full_disk)], check=True)
    with pytest.raises(OSError, match="Read-only file system"):
        save(full_disk / "run", optimizer(), metadata={"is": "new"})
    assert_as_it_was(full_disk)


def test_files_may_not_be_as_large(folder: Path) -> None:
    """In a process of its own: the limit and the signal are the process's."""
    script = f"""
import resource, signal, numpy as np
from lars_array import LARS, save
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
optimizer = LARS({{"w": np.ones(10**6)}}, lr=0.1, momentum=0.9)
optimizer.step({{"w": np.ones(10**6)}})
resource.setrlimit(resource.RLIMIT_FSIZE, (10**5, 10**5))
try:
    save({str(folder / "run")!r}, optimizer)
except OSError as error:
    print(error.errno, error.filename)
"""
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert done.stdout == f"{errno.EFBIG} {folder / 'run'}\n"
    assert_as_it_was(folder)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to folders of any mode")
def test_the_folder_is_read_only(folder: Path) -> None:
    folder.chmod(0o500)
    try:
        with pytest.raises(PermissionError):
            save(folder / "run", optimizer(), metadata={"is": "new"})
        assert_as_it_was(folder)
    finally:
        folder.chmod(0o700)


def test_the_folder_can_t_be_changed_even_by_root(folder: Path) -> None:
    chattr = shutil.which("chattr")
    if chattr is None or subprocess.run([chattr, "+i", str(folder)], capture_output=True).returncode:
        pytest.skip("no attributes of files here")
    try:
        with pytest.raises(PermissionError):
            save(folder / "run", optimizer(), metadata={"is": "new"})
        assert_as_it_was(folder)
    finally:
        subprocess.run([chattr, "-i", str(folder)], check=True)


def test_the_path_is_of_a_folder_or_in_none(folder: Path) -> None:
    (folder / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        save(folder / "folder", optimizer())
    with pytest.raises(FileNotFoundError):
        save(folder / "none" / "run", optimizer())
    with pytest.raises(NotADirectoryError):
        save(folder / "run" / "run", optimizer())
    assert list((folder / "folder").iterdir()) == []
    assert_as_it_was(folder, ("run", "folder"))


def test_a_pipe_is_not_replaced_nor_waited_for(folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    with pytest.raises(OSError, match="not a regular file"):
        save(folder / "pipe", optimizer())
    with pytest.raises(ValueError, match="path must be that of a file"):
        load(folder / "pipe")
    assert stat.S_ISFIFO((folder / "pipe").stat().st_mode)
    assert_as_it_was(folder, ("run", "pipe"))


# -------------------------------------------------------------------------------------------------------- what is made


def test_of_a_symbolic_link_the_target_is_replaced(folder: Path) -> None:
    other = folder / "other"
    other.mkdir()
    (folder / "link").symlink_to(Path("other") / "target")
    save(folder / "link", optimizer(), metadata={"is": "new"})  # there is no target yet
    assert (folder / "link").is_symlink()
    assert load(other / "target").metadata == {"is": "new"}
    save(folder / "link", optimizer(), metadata={"is": "newer"})
    assert load(folder / "link").metadata == {"is": "newer"}
    assert os.listdir(other) == ["target"]
    assert_as_it_was(folder, ("run", "link", "other"))


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_the_mode_is_that_of_a_new_file(tmp_path: Path, umask: int) -> None:
    old = os.umask(umask)
    try:
        save(tmp_path / "run", optimizer())
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "run").stat().st_mode) == 0o666 & ~umask


def test_names_of_files_may_be_as_long_as_they_can_be(tmp_path: Path) -> None:
    save(tmp_path / ("n" * 255), optimizer())
    assert os.listdir(tmp_path) == ["n" * 255]


def test_a_path_in_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save("run", optimizer())
    assert os.listdir(tmp_path) == ["run"]
    assert_same(load("run"), load(tmp_path / "run"))


def test_file_and_folder_are_on_the_disk_in_this_order(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def noted(handle: int) -> None:
        done.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(os, "replace", lambda *paths: (done.append("replace"), replace(*paths)))
    save(folder / "run", optimizer())
    assert done == ["file", "replace", "folder"]


def test_who_reads_has_one_file_or_the_other(folder: Path) -> None:
    """A file that is open stays what it was."""
    with _container.opened(folder / "run") as file:
        save(folder / "run", optimizer(10), metadata={"is": "new"})
        assert file.read("momentum_buffer/w").shape == (1000,)
    assert load(folder / "run").metadata == {"is": "new"}


# ------------------------------------------------------------------------------------------------------------- kill -9


def assert_whole(path: Path) -> int:
    """The file is one that was saved, of one moment; return which."""
    saved = load(path)
    number = int(saved.metadata["number"])
    assert all(np.all(p == number) for p in saved.params.values())
    return number


def test_kill_9_at_random_moments(tmp_path: Path) -> None:
    """Each process is killed once, after some time in which it saves again and again."""
    script = Path(__file__).with_name("killed.py")
    command = [sys.executable, "-W", "ignore", str(script), str(tmp_path / "run"), str(CRASHES)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert len(found) == CRASHES
    for told, last in found:
        assert told <= last <= told + 1, f"{told} was saved, and {last} is there"
    assert_whole(tmp_path / "run")
    # Temporary files of a killed process are no obstacle, and have names of their own.
    others = [name for name in os.listdir(tmp_path) if name != "run"]
    assert all(name.startswith((".lars-array-", ".tmp")) for name in others)
    assert len(others) <= 2 * CRASHES
    if CRASHES >= 200:
        print(f"{CRASHES} processes killed, {len(others)} temporary files left")


def test_interrupts_at_random_moments(tmp_path: Path) -> None:
    """SIGINT, which Python raises between any two operations: the file is whole, and no temporary one is left."""
    path, rng = tmp_path / "run", random.Random(1)
    params = {"w": np.zeros(20_000)}
    trained = LARS(params, lr=0.1, momentum=0.9)
    old = signal.signal(signal.SIGALRM, signal.default_int_handler)
    interrupted, last = 0, 0
    try:
        save(path, trained, params=params, metadata={"number": 0})
        for number in range(1, 10 * CRASHES):
            params["w"][...] = number
            try:
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-6, 3e-3))
                save(path, trained, params=params, metadata={"number": number})
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                interrupted += 1
            last, before = assert_whole(path), last
            assert last in (number, before)
            assert os.listdir(tmp_path) == ["run"]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    assert interrupted > CRASHES


def test_an_interrupt_waits_until_all_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved, params, loaded = optimizer(), {"w": np.full(1000, 2.0)}, {"w": np.zeros(1000)}
    save(tmp_path / "run", saved, params=params)
    loading, write_into = LARS(loaded, lr=0.5), _loading.write_into

    def interrupted(*arguments: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        write_into(*arguments)

    monkeypatch.setattr(_loading, "write_into", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load(tmp_path / "run", loading, params=loaded)
    assert_same(loaded, params)
    assert_same(loading.state_dict(), saved.state_dict())
