"""What is in the source distribution, and in the wheel that is built from it."""

import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

from lars_array import __version__

ROOT = Path(__file__).parents[2]


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
    pytest.importorskip("hatchling")
    command = [sys.executable, "-m", "hatchling", "build", "--target", target, "--directory", str(directory)]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    (artifact,) = directory.iterdir()
    return artifact


PACKAGES = {"lars_array": "lars_array", "lars_torch": "adapters/lars_torch", "lars_jax": "adapters/lars_jax"}


def test_wheel_has_the_packages_and_nothing_beside(wheel):
    top_level = {name.split("/")[0] for name in wheel}
    (metadata,) = (name for name in top_level if name.endswith(".dist-info"))
    assert top_level == {*PACKAGES, metadata}
    assert f"{metadata}/licenses/LICENSE" in wheel
    assert {f"{package}/py.typed" for package in PACKAGES} <= set(wheel)
    assert not [name for name in wheel if "golden" in name]


@pytest.mark.parametrize("package", PACKAGES)
def test_wheel_has_every_file_of_a_package(wheel, package):
    folder = ROOT / PACKAGES[package]
    files = {path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert {f"{package}/{path.relative_to(folder).as_posix()}" for path in files} <= set(wheel)


def test_sdist_can_be_tested(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "pyproject.toml", "tests/conftest.py"} <= names
    assert not [name for name in names if name.startswith((".venv", "demo-output", "docs/_build"))]
    assert "CITATION.cff" in names


def test_the_citation_is_of_this_version():
    lines = (ROOT / "CITATION.cff").read_text().splitlines()
    assert f"version: {__version__}" in lines
    (released,) = (line.removeprefix("date-released: ") for line in lines if line.startswith("date-released: "))
    assert f"## [{__version__}] - {released}" in (ROOT / "CHANGELOG.md").read_text().splitlines()


def test_groups_for_development_are_the_extras_that_make_installs():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    groups, extras = project["dependency-groups"], project["project"]["optional-dependencies"]
    names = groups.keys() - {"dev", "dist"}
    assert names == {entry["include-group"] for entry in groups["dev"]}
    assert {name: groups[name] for name in names} == {name: [f"lars-array[{name}]"] for name in names}
    assert names <= extras.keys()
