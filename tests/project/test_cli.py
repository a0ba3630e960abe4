"""The command line, as a user starts it."""

import json
import subprocess
import sys
import types
from pathlib import Path

import pytest

from lars_array import __version__
from lars_array.__main__ import main


def run(*arguments):
    return subprocess.run([sys.executable, "-m", "lars_array", *arguments], capture_output=True, text=True)


def test_help_names_the_commands():
    shown = run("--help")
    assert shown.returncode == 0
    assert "demo" in shown.stdout
    assert "info" in shown.stdout


def test_the_version_is_shown():
    shown = run("--version")
    assert (shown.returncode, shown.stdout, shown.stderr) == (0, f"lars-array {__version__}\n", "")


@pytest.mark.parametrize("arguments", [(), ("nonsense",), ("demo", "--seed", "x")], ids=" ".join)
def test_a_wrong_call_shows_the_usage(arguments):
    shown = run(*arguments)
    assert shown.returncode == 2
    assert shown.stderr.startswith("usage: python -m lars_array")
    assert shown.stdout == ""


def test_info_is_complete():
    shown = run("info")
    assert shown.returncode == 0, shown.stderr
    for line in (f"lars-array {__version__}", "numpy", "processors", "kernels"):
        assert line.split() in [found.split()[: len(line.split())] for found in shown.stdout.splitlines()]


def test_info_as_json():
    shown = run("info", "--json")
    assert shown.returncode == 0, shown.stderr
    collected = json.loads(shown.stdout)
    assert collected["versions"]["lars-array"] == __version__
    assert collected["versions"]["numpy"] is not None
    assert any(kernel["usable"] for kernel in collected["kernels"])
    assert all(kernel["usable"] or kernel["reason"] for kernel in collected["kernels"])


def test_info_asks_metadata_and_imports_no_array_library():
    script = (
        "import sys; from lars_array.__main__ import main; main(['info', '--json'])\n"
        "assert not {'torch', 'jax', 'optax'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


def needed_by_the_demo():
    for library in ("sklearn", "matplotlib", "rich"):
        pytest.importorskip(library)


def test_demo_gets_its_options(monkeypatch, tmp_path):
    needed_by_the_demo()
    calls = []
    demo = types.SimpleNamespace(main=lambda **options: calls.append(options) or 0)
    monkeypatch.setitem(sys.modules, "lars_array.demo", demo)
    assert main(["demo"]) == 0
    assert main(["demo", "--quick", "--seed", "7", "--out", str(tmp_path)]) == 0
    assert calls == [
        {"quick": False, "seed": 0, "out": Path("demo-output")},
        {"quick": True, "seed": 7, "out": tmp_path},
    ]


def test_demo_says_what_is_missing(monkeypatch, capsys):
    needed_by_the_demo()
    monkeypatch.setitem(sys.modules, "rich", None)
    assert main(["demo"]) == 2
    shown = capsys.readouterr()
    assert shown.err == "The demo needs rich: pip install 'lars-array[demo]'\n"
    assert shown.out == ""
