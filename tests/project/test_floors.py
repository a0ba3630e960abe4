"""Modules import from the floors below theirs, and nothing in a circle."""

from __future__ import annotations

from pathlib import Path

import floors
import pytest

ROOT = Path(__file__).resolve().parents[2]


def assert_in_order(checkout: Path) -> None:
    """Nothing imports what it must not."""
    found = floors.violations(checkout)
    assert not found, "\n".join([f"{len(found)} imports are not in order:", *found])


def test_the_library_is_in_order() -> None:
    assert_in_order(ROOT)


TREE = {
    "lars_array/__init__.py": "from lars_array.optimizer import LARS\nfrom lars_array import rules as rules",
    "lars_array/_arrays.py": "import numpy as np",
    "lars_array/core.py": "from lars_array._arrays import asarray",
    "lars_array/hyperparams.py": "from lars_array import _arrays",
    "lars_array/rules.py": "from lars_array import core",
    "lars_array/kernels/__init__.py": "from . import blocked",
    "lars_array/kernels/blocked.py": "from ..core import sums",
    "lars_array/kernels/compiled/__init__.py": "",
    "lars_array/kernels/compiled/kernel.py": "from lars_array.kernels.blocked import Kernel",
    "lars_array/state/__init__.py": "",
    "lars_array/state/memory.py": "import lars_array.kernels.compiled.kernel",
    "lars_array/state/rows.py": "from lars_array.state.memory import bounds",
    "lars_array/optimizer.py": "from lars_array.state.rows import Row\nfrom lars_array.kernels import pick",
    "lars_array/demo/network.py": "import lars_array.demo.anything",
    "adapters/lars_torch/__init__.py": "from lars_torch.engine import LARS",
    "adapters/lars_torch/engine.py": "import lars_array\nfrom lars_array.state.memory import bounds\nimport torch",
}

CASES = {
    "upwards": ("lars_array/core.py", "import lars_array.rules", "core (floor 2) imports rules (floor 3)"),
    "beside": (
        "lars_array/rules.py",
        "from lars_array.hyperparams import check",
        "rules (floor 3) imports hyperparams (floor 3)",
    ),
    "in a function": (
        "lars_array/_arrays.py",
        "def f():\n    from lars_array.state import memory",
        "_arrays (floor 1) imports state.memory (floor 4)",
    ),
    "for types": (
        "lars_array/hyperparams.py",
        "if TYPE_CHECKING:\n    from lars_array.optimizer import LARS",
        "hyperparams (floor 3) imports optimizer (floor 6)",
    ),
    "by name": (
        "lars_array/hyperparams.py",
        "importlib.import_module('lars_array.optimizer')",
        "hyperparams (floor 3) imports optimizer (floor 6)",
    ),
    "of the face": (
        "lars_array/state/rows.py",
        "from lars_array import LARS",
        "state.rows (floor 4) imports __init__ (floor 7)",
    ),
    "of an adapter": (
        "lars_array/optimizer.py",
        "import lars_torch",
        "optimizer (floor 6) imports lars_torch (floor 8)",
    ),
    "kernels": (
        "lars_array/kernels/compiled/kernel.py",
        "from ...hyperparams import check",
        "kernels.compiled.kernel imports hyperparams, which kernels never does",
    ),
    "core": (
        "lars_array/core.py",
        "from lars_array.kernels.blocked import Kernel",
        "core imports kernels.blocked, which core never does",
    ),
    "adapters": (
        "adapters/lars_torch/engine.py",
        "from lars_array.rules import RULES",
        "lars_torch.engine imports rules, which adapters don't",
    ),
    "adapters of each other": (
        "adapters/lars_torch/engine.py",
        "import lars_jax",
        "lars_torch.engine imports lars_jax, which adapters don't",
    ),
    "circle": (
        "lars_array/state/memory.py",
        "from lars_array.state import rows",
        "a circle: state.memory <- state.rows <- state.memory",
    ),
    "unknown": ("lars_array/helpers.py", "", "helpers has no floor"),
}


def written(folder: Path, tree: dict[str, str]) -> Path:
    for name, text in tree.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return folder


def test_a_tree_that_is_in_order(tmp_path: Path) -> None:
    assert_in_order(written(tmp_path, TREE))


@pytest.mark.parametrize("case", CASES)
def test_what_is_not_in_order_is_noticed(case: str, tmp_path: Path) -> None:
    path, text, message = CASES[case]
    tree = TREE | {"adapters/lars_jax/__init__.py": ""}
    checkout = written(tmp_path, tree | {path: f"{tree.get(path, '')}\n{text}"})
    assert message in floors.violations(checkout)
    with pytest.raises(AssertionError, match="not in order"):
        assert_in_order(checkout)


def test_adapters_import_few_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkout = written(tmp_path, TREE)
    monkeypatch.setattr(floors, "MOST_BESIDE_THE_FACE", 0)
    assert floors.violations(checkout) == ["adapters import 1 modules beside lars_array itself: state.memory"]
