"""Stacked parameters in pieces: slices are layers of the whole parameter, wherever it is cut."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pieces import OPTIONS, STEPS
from processes import Ranks

from lars_array import LARS
from lars_array.kernels import NUMPY_KERNELS as KERNELS

SLICES = 5


def stack(seed: int) -> Any:
    return np.random.default_rng(seed).standard_normal((SLICES, 4, 3))


def whole_run(**options: Any) -> tuple[Any, LARS]:
    theirs = stack(0)
    whole = LARS({"w": theirs}, **options, layer_axes=1)
    for seed in range(1, STEPS + 1):
        whole.step({"w": stack(seed)})
    return theirs, whole


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("ends", [(0, 2, 5), (0, 0, 1, 5), (0, 5, 5, 5)])
def test_a_stack_may_be_cut_along_the_slices(ends: tuple[int, ...], kernel: str) -> None:
    """A label for each slice says which of the whole it is; a piece may have none."""
    options = OPTIONS | {"kernel": kernel, "max_grad_norm": 1.0}
    theirs, whole = whole_run(**options)
    ranks, labels = Ranks(len(ends) - 1), [f"w[{k}]" for k in range(SLICES)]

    def work(rank: int) -> Any:
        own = slice(ends[rank], ends[rank + 1])
        p = stack(0)[own].copy()
        more = {"layer_of": {"w": labels[own]}, "layers": labels, "all_reduce": ranks.all_reduce(rank)}
        optimizer = LARS({"w": p}, **options, layer_axes=1, **more)
        for seed in range(1, STEPS + 1):
            optimizer.step({"w": stack(seed)[own].copy()})
        return p, optimizer.norms()

    found = ranks.run(work)
    np.testing.assert_allclose(np.concatenate([p for p, _ in found]), theirs, rtol=1e-12)
    ours = [norms for p, own in found for norms in list(own.values())[: len(p)]]
    np.testing.assert_allclose(ours, list(whole.norms().values()), rtol=1e-12)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("ends", [(0, 1, 4), (0, 0, 3, 4)])
def test_a_stack_may_be_cut_within_the_slices(ends: tuple[int, ...], kernel: str) -> None:
    options = OPTIONS | {"kernel": kernel, "rule": "optax"}
    theirs, whole = whole_run(**options)
    ranks = Ranks(len(ends) - 1)

    def work(rank: int) -> Any:
        own = slice(ends[rank], ends[rank + 1])
        p = stack(0)[:, own].copy()
        optimizer = LARS({"w": p}, **options, layer_axes=1, all_reduce=ranks.all_reduce(rank))
        for seed in range(1, STEPS + 1):
            optimizer.step({"w": stack(seed)[:, own].copy()})
        return p, optimizer.norms()

    found = ranks.run(work)
    np.testing.assert_allclose(np.concatenate([p for p, _ in found], axis=1), theirs, rtol=1e-12)
    for _, norms in found:
        assert norms.keys() == whole.norms().keys()
        np.testing.assert_allclose(list(norms.values()), list(whole.norms().values()), rtol=1e-12)


@pytest.mark.parametrize("kernel", KERNELS)
def test_slices_may_be_cut_across_processes(kernel: str) -> None:
    """A slice of which two processes hold a part has one label on both."""
    theirs, _ = whole_run(**OPTIONS, kernel=kernel)
    ranks, labels = Ranks(2), [str(k) for k in range(SLICES)]
    pieces: list[dict[str, Any]] = [
        {"a": (slice(0, 3), slice(0, 4)), "b": (slice(3, 4), slice(0, 1))},
        {"a": (slice(4, 5), slice(0, 4)), "b": (slice(3, 4), slice(1, 4))},
    ]

    def work(rank: int) -> Any:
        own = pieces[rank]
        params = {name: stack(0)[index].copy() for name, index in own.items()}
        layer_of = {name: labels[index[0]] for name, index in own.items()}
        more = {"layer_of": layer_of, "layers": labels, "all_reduce": ranks.all_reduce(rank)}
        optimizer = LARS(params, **OPTIONS, kernel=kernel, layer_axes=1, **more)
        for seed in range(1, STEPS + 1):
            optimizer.step({name: stack(seed)[index].copy() for name, index in own.items()})
        return params

    for own, params in zip(pieces, ranks.run(work), strict=True):
        for name, index in own.items():
            np.testing.assert_allclose(params[name], theirs[index], rtol=1e-12)


def test_labels_have_to_fit_the_slices() -> None:
    def make(label: Any, shape: tuple[int, ...] = (2, 3), axes: int = 1) -> None:
        LARS({"w": np.ones(shape)}, lr=0.1, layer_axes=axes, layer_of={"w": label}, all_reduce=print)

    with pytest.raises(ValueError, match="one label, or one for each slice; 'w' has 2 slices, not 3"):
        make(["a", "b", "c"])
    with pytest.raises(ValueError, match="'w' has 0 slices, not 1"):
        make(["a"], (0, 3))
    with pytest.raises(TypeError, match=r"layer_of must give names of layers, or None; got \[\]"):
        make([], axes=0)
    with pytest.raises(ValueError, match="layers must have different names; two are called 'w'"):
        LARS([("w", np.ones(2)), ("v", np.ones(2))], lr=0.1, layer_of={"v": "w"}, all_reduce=print)
    make([], (0, 3))
