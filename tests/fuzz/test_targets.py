"""The fuzzer's targets with a few thousand inputs, without atheris: a seed of its own, and changes to the seeds."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

RUNS = 2000


@pytest.fixture(scope="module")
def fuzz() -> Iterator[Any]:
    folder = str(Path(__file__).parent)
    sys.path.insert(0, folder)
    try:
        import mutations
        import targets

        yield targets, mutations
    finally:
        sys.path.remove(folder)


def test_seeds_are_loaded_or_refused(fuzz: Any) -> None:
    targets, _ = fuzz
    target = targets.Target()
    for seed in targets.seeds():
        target(seed)
    assert (target.loaded, target.refused) == (9, 3)


@pytest.mark.parametrize("seed", range(3))
def test_inputs_that_were_changed(fuzz: Any, seed: int) -> None:
    targets, mutations = fuzz
    target, rng = targets.Target(), random.Random(seed)
    pool = targets.seeds()
    for _ in range(RUNS):
        data, loaded = mutations.mutated(rng.choice(pool), rng), target.loaded
        if data is not None:
            target(data)
            if target.loaded > loaded:
                pool.append(data)
    assert target.loaded > RUNS // 50
    assert target.refused > RUNS // 4
    targets.Path(targets.PATH).unlink(missing_ok=True)


def test_a_change_by_a_refused_input_is_noticed(fuzz: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    targets, _ = fuzz
    target = targets.Target()

    def load(path: str, optimizer: Any = None, params: Any = None) -> None:
        if optimizer is not None:
            optimizer.param_groups[0]["lr"] = 7.0
            raise ValueError(path)

    monkeypatch.setattr(targets, "load", load)
    with pytest.raises(AssertionError, match="has changed something"):
        target(targets.seeds()[0])
    monkeypatch.setattr(targets, "load", lambda path: [][0])
    with pytest.raises(IndexError):
        target(targets.seeds()[0])
