"""Random layers and hyper-parameters, and a short way to train with them."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from references import assert_close, assert_same_bits, gaussian

from lars_array import LARS, RULES

FEW = settings(max_examples=40)
shapes = st.lists(st.integers(0, 9), max_size=4).map(tuple)
dtypes = st.sampled_from(["f8", "f4", "f2", "c8", "c16"])
seeds = st.integers(0, 2**32 - 1)
scales = st.integers(-8, 8).map(lambda k: 2.0**k)
flash_options = st.fixed_dictionaries(
    {
        "lr": st.sampled_from([0.0, 1e-3, 0.1, 1.0, 10.0]),
        "momentum": st.sampled_from([0.0, 0.5, 0.9, 1.0]),
        "weight_decay": st.sampled_from([0.0, 1e-4, 0.1, 1.0]),
        "trust_coefficient": st.sampled_from([1e-3, 0.1, 1.0]),
        "eps": st.sampled_from([0.0, 1e-8, 1e-2]),
    }
)
any_options = st.builds(
    lambda base, more: base | more,
    flash_options,
    st.fixed_dictionaries(
        {
            "rule": st.sampled_from(sorted(RULES)),
            "trust_clip": st.booleans(),
            "always_adapt": st.booleans(),
            "maximize": st.booleans(),
            "rescale_grad": st.sampled_from([1.0, 0.25, 3.0]),
            "trust_bounds": st.sampled_from([None, (0.0, 1.0), (0.1, 10.0)]),
        }
    ),
)


def layers_of(seed: int, dtype: str = "f8", steps: int = 3, scale: float = 1.0) -> tuple[dict[str, Any], list[Any]]:
    """Return some parameters by name, one all zeros, and gradients for them."""
    rng = np.random.default_rng(seed)
    sizes: dict[str, tuple[int, ...]] = {
        "kernel": (4, 3, 2),
        "bias": (4,),
        "scalar": (),
        "fresh": (5,),
        "long": (1100,),
    }
    params = {name: gaussian(rng, shape, dtype) for name, shape in sizes.items()}
    params["fresh"][...] = 0
    gradients = [
        {name: (scale * gaussian(rng, p.shape, dtype)).astype(dtype) for name, p in params.items()}
        for _ in range(steps)
    ]
    gradients = [{name: np.asarray(g) for name, g in grads.items()} for grads in gradients]
    return params, gradients


def run(params: dict[str, Any], gradients: list[Any], **options: Any) -> dict[str, Any]:
    """Return the parameters after steps with `gradients`, and the momentum under names with a v in front."""
    params = {name: p.copy() for name, p in params.items()}
    groups = options.pop("groups", None)
    optimizer = LARS(
        [{"params": {n: params[n] for n in names}, **own} for names, own in groups] if groups else params, **options
    )
    for grads in gradients:
        optimizer.step(grads)
    state = optimizer.state_dict()["state"].items()
    return params | {f"v {name}": own["momentum_buffer"] for name, own in state if "momentum_buffer" in own}


def assert_results_close(
    ours: dict[str, Any], theirs: dict[str, Any], allowed: float, what: str = "", scale: float = 0
) -> None:
    assert ours.keys() == theirs.keys()
    for name, x in theirs.items():
        assert_close(ours[name], x, allowed, f"{what} {name}", scale)


def assert_results_same(ours: dict[str, Any], theirs: dict[str, Any], what: str = "") -> None:
    assert ours.keys() == theirs.keys()
    for name, x in theirs.items():
        assert_same_bits(ours[name], x, f"{what} {name}")
