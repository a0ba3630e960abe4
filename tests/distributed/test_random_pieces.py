"""Whatever the layers, the cuts and the options: pieces are stepped as whole layers are."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import Ranks
from references import gaussian
from strategies import seeds

from lars_array import LARS, RULES
from lars_array.core import resolve
from lars_array.kernels import NUMPY_KERNELS as KERNELS

STEPS = 3

# A step of the length of the parameters would take a single number to 0 but for its last digit, on which the next
# ratio depends.
options = st.fixed_dictionaries(
    {
        "lr": st.sampled_from([0.0, 1e-3, 0.1, 0.7]),
        "momentum": st.sampled_from([0.0, 0.5, 0.9, 1.0]),
        "weight_decay": st.sampled_from([0.0, 1e-4, 0.1]),
        "trust_coefficient": st.sampled_from([1e-3, 0.1, 0.6]),
        "eps": st.sampled_from([0.0, 1e-8, 1e-2]),
        "trust_clip": st.booleans(),
        "always_adapt": st.booleans(),
        "maximize": st.booleans(),
        "rescale_grad": st.sampled_from([1.0, 0.25, 3.0]),
        "max_grad_norm": st.sampled_from([None, 0.5, 1e6]),
        "master_weights": st.booleans(),
        "nonfinite": st.sampled_from(["raise", "skip", "propagate"]),
    }
)
shapes = st.lists(st.integers(0, 7), max_size=3).map(tuple)


class Case(NamedTuple):
    """A model of layers that are cut flat, each at ends of its own, for a number of ranks."""

    seed: int
    dtype: str
    shapes: list[tuple[int, ...]]
    ends: list[list[int]]
    kernels: list[str]
    rules: tuple[str, str]
    second: int  # where the second group begins, which may be whole on all ranks
    is_whole: bool
    is_joined: bool
    present: list[list[bool]]
    lacks_empty: bool
    options: dict[str, Any]

    def arrays(self, seed: int) -> dict[str, Any]:
        rng = np.random.default_rng((self.seed, seed))
        return {str(i): gaussian(rng, shape, self.dtype) for i, shape in enumerate(self.shapes)}

    def piece(self, name: str, x: Any, rank: int) -> Any:
        if self.is_whole and int(name) >= self.second:
            return x.copy()
        ends = self.ends[int(name)]
        return x.reshape(-1)[ends[rank] : ends[rank + 1]].copy()

    def make(self, params: dict[str, Any], kernel: str, all_reduce: Any) -> LARS:
        first = {name: p for name, p in params.items() if int(name) < self.second}
        groups: list[dict[str, Any]] = [{"params": first, "rule": self.rules[0]}] if first else []
        others = {name: p for name, p in params.items() if name not in first}
        if others:
            own = None if self.is_whole else all_reduce
            groups.append({"params": others, "rule": self.rules[1], "lr": 0.3, "all_reduce": own})
        layer_of = {"0": "joined", "1": "joined"} if self.is_joined else None
        return LARS(groups, **self.options, kernel=kernel, layer_of=layer_of, all_reduce=all_reduce)

    def calls(self) -> int:
        """Return how many sums the ranks add."""
        if self.is_whole and self.second == 0:
            return 0
        used = self.rules[:1] if self.second >= len(self.shapes) else self.rules[-1:] if not self.second else self.rules
        reads_third = any(resolve(rule).norm_of != "gradient" for rule in used)
        return 1 + STEPS * (2 if reads_third and self.options["max_grad_norm"] is not None else 1)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    count = draw(st.integers(1, 5))
    found = draw(st.lists(shapes, min_size=1, max_size=5))
    ends = []
    for shape in found:
        size = int(np.prod(shape))
        inner = sorted(draw(st.lists(st.integers(0, size), min_size=count - 1, max_size=count - 1)))
        ends.append([0, *inner, size])
    present = st.lists(st.integers(0, 9).map(bool), min_size=len(found), max_size=len(found))
    second, is_whole = draw(st.integers(0, len(found))), draw(st.booleans())
    kernels = draw(st.lists(st.sampled_from(KERNELS), min_size=count, max_size=count))
    return Case(
        seed=draw(seeds),
        dtype=draw(st.sampled_from(["f8", "f4", "f4", "f2", "c8", "c16"])),
        shapes=found,
        ends=ends,
        kernels=kernels[:1] * count if is_whole else kernels,  # kernels round differently, and so do copies
        rules=draw(st.tuples(st.sampled_from(sorted(RULES)), st.sampled_from(sorted(RULES)))),
        second=second,
        is_whole=is_whole,
        is_joined=draw(st.booleans()) and second >= 2,
        present=draw(st.lists(present, min_size=STEPS, max_size=STEPS)),
        lacks_empty=draw(st.booleans()),
        options=draw(options),
    )


@settings(max_examples=200)
@given(cases())
def test_pieces_are_stepped_as_whole_layers_whatever_they_are(case: Case) -> None:
    start, ranks = case.arrays(0), Ranks(len(case.kernels))
    steps = [case.arrays(1 + t) for t in range(STEPS)]
    for t, given_here in enumerate(case.present):
        both = case.is_joined and given_here[0] != given_here[1]  # parts of a layer have gradients together
        steps[t] |= {str(i): None for i, yes in enumerate(given_here) if not yes or (both and i < 2)}

    theirs = {name: p.copy() for name, p in start.items()}
    whole = case.make(theirs, "portable", None)
    for grads in steps:
        whole.step(grads)

    def work(rank: int) -> tuple[dict[str, Any], LARS]:
        params = {name: case.piece(name, p, rank) for name, p in start.items()}
        optimizer = case.make(params, case.kernels[rank], ranks.all_reduce(rank))
        for grads in steps:
            own = {name: None if g is None else case.piece(name, g, rank) for name, g in grads.items()}
            if case.lacks_empty:
                own = {name: None if g is None or not g.size else g for name, g in own.items()}
            optimizer.step(own)
        return params, optimizer

    found = ranks.run(work)
    allowed = {"f8": 1e-12, "c16": 1e-12, "f4": 1e-6, "c8": 1e-6, "f2": 2e-3}[case.dtype]
    for name, p in theirs.items():
        parts = [params[name] for params, _ in found]
        if case.is_whole and int(name) >= case.second:
            assert len({part.tobytes() for part in parts}) == 1, "copies differ"
            parts = parts[:1]
        ours = np.concatenate([part.reshape(-1) for part in parts]).astype("c16")
        off = np.max(np.abs(ours - p.reshape(-1).astype("c16")), initial=0)
        scale = max(np.max(np.abs(x.astype("c16")), initial=0) for x in (p, start[name]))
        assert off <= allowed * scale, f"{name} is off by {off} of {scale}"
    norms: dict[str, Any] = {}
    for _, optimizer in found:
        assert (optimizer.steps, optimizer.skipped_steps) == (whole.steps, whole.skipped_steps)
        for name, own in optimizer.norms().items():
            assert norms.setdefault(name, own) == own, "norms differ between ranks"
    if not case.lacks_empty:
        for name, own in whole.norms().items():
            np.testing.assert_allclose(norms[name], own, rtol=max(allowed, 1e-12), atol=1e-300)
    assert ranks.calls == case.calls()
