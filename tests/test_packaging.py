"""What is in the source distribution, and in the wheel that is built from it."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    return build("sdist", ROOT, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    source = tmp_path_factory.mktemp("source")
    with tarfile.open(sdist) as archive:
        archive.extractall(source, filter="data")
    with zipfile.ZipFile(build("wheel", next(source.iterdir()), tmp_path_factory.mktemp("wheel"))) as archive:
        return archive.namelist()


def build(target, source, directory):
    command = [sys.executable, "-m", "hatchling", "build", "--target", target, "--directory", str(directory)]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    (artifact,) = directory.iterdir()
    return artifact


def test_wheel_has_the_package_and_nothing_beside(wheel):
    top_level = {name.split("/")[0] for name in wheel}
    (metadata,) = (name for name in top_level if name.endswith(".dist-info"))
    assert top_level == {"lars_array", metadata}
    assert f"{metadata}/licenses/LICENSE" in wheel
    assert "lars_array/py.typed" in wheel
    assert not [name for name in wheel if "golden" in name]


def test_wheel_has_every_file_of_the_package(wheel):
    package = ROOT / "lars_array"
    files = {path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert {path.relative_to(ROOT).as_posix() for path in files} <= set(wheel)


def test_sdist_can_be_tested(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "pyproject.toml", "tests/conftest.py"} <= names
    assert not [name for name in names if name.startswith((".venv", "demo-output", "docs/_build"))]
