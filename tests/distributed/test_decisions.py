"""A step is taken or skipped by all processes, whichever of them knows a reason against it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from assertions import fingerprint
from pieces import CUTS, OPTIONS, SECOND, SHAPES, Pieces, assert_models_close, groups_of, model, trained_whole
from processes import Ranks

from lars_array import LARS, NonFiniteError
from lars_array.kernels import NUMPY_KERNELS as KERNELS


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("policy", ["raise", "skip", "propagate"])
def test_found_inf_of_one_process_skips_the_step_of_all(policy: str, kernel: str) -> None:
    for rank in range(3):
        pieces = Pieces(kernel=kernel, nonfinite=policy)
        pieces.step(model(1))
        before = fingerprint(pieces.params)

        def work(r: int, optimizer: LARS, grads: Any, rank: int = rank) -> None:
            optimizer.step(grads, found_inf=float(r == rank))

        assert pieces.outcomes(work, model(2)) == [None] * 3
        assert fingerprint(pieces.params) == before
        assert [(x.steps, x.skipped_steps) for x in pieces.optimizers] == 3 * [(1, 1)]
        pieces.step(model(2))
        assert_models_close(pieces.joined(), trained_whole(2)[0], 1e-12)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("rank", [0, 1])
def test_found_inf_of_a_process_without_gradients_skips_the_step_of_all(rank: int, kernel: str) -> None:
    pieces = Pieces(CUTS["first empty"], kernel=kernel)
    pieces.step(model(1))
    before = fingerprint(pieces.params)

    def work(r: int, optimizer: LARS, grads: Any) -> None:
        optimizer.step(dict.fromkeys(grads) if r == 0 else grads, found_inf=r == rank)

    assert pieces.outcomes(work, model(2)) == [None] * 3
    assert fingerprint(pieces.params) == before
    assert [(x.steps, x.skipped_steps) for x in pieces.optimizers] == 3 * [(1, 1)]


def spoiled(pieces: Pieces, rank: int, grads: Any, what: str) -> Any:
    """Put a nan into the piece of w on one rank: into its gradient or into the parameter."""
    own = pieces.cut(grads, rank)
    target = own["w"] if what == "gradient" else pieces.params[rank]["w"]
    target[-1, 0] = np.nan
    return own


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.5}, {"max_grad_norm": 0.5, "rule": "optax"}])
def test_what_is_not_finite_on_one_process_refuses_the_step_of_all(options: Any, kernel: str) -> None:
    for what in ("gradient", "parameter"):
        pieces = Pieces(kernel=kernel, **options)
        pieces.step(model(1))
        own = spoiled(pieces, 1, model(2), what)
        before = fingerprint([pieces.params, pieces.optimizers])

        def work(r: int, optimizer: LARS, grads: Any, own: Any = own) -> None:
            optimizer.step(own if r == 1 else grads)

        outcomes = pieces.outcomes(work, model(2))
        elsewhere = f"the {what} of 'w' is not finite on another process; nothing was changed (step 1)"
        here = f"the {what} of 'w' has 1 non-finite entries of 25; nothing was changed (step 1)"
        assert [(type(x), str(x)) for x in outcomes] == [(NonFiniteError, x) for x in (elsewhere, here, elsewhere)]
        assert fingerprint([pieces.params, pieces.optimizers]) == before
        assert pieces.ranks.calls == 1 + 2 * (1 + (len(options) == 2))
        if what == "gradient":
            pieces.step(model(2))
            assert_models_close(pieces.joined(), trained_whole(2, **options)[0], 1e-12)


@pytest.mark.parametrize("kernel", KERNELS)
def test_what_is_not_finite_on_one_process_skips_the_step_of_all(kernel: str) -> None:
    pieces = Pieces(kernel=kernel, nonfinite="skip")
    pieces.step(model(1))
    before, own = fingerprint(pieces.params), spoiled(pieces, 2, model(2), "gradient")
    assert pieces.outcomes(lambda r, x, grads: x.step(own if r == 2 else grads), model(2)) == [None] * 3
    assert fingerprint(pieces.params) == before
    assert [(x.steps, x.skipped_steps) for x in pieces.optimizers] == 3 * [(1, 1)]


@pytest.mark.parametrize("kernel", KERNELS)
def test_what_is_not_finite_goes_through_all_processes(kernel: str) -> None:
    pieces = Pieces(kernel=kernel, nonfinite="propagate")
    own = spoiled(pieces, 0, model(1), "gradient")
    assert pieces.outcomes(lambda r, x, grads: x.step(own if r == 0 else grads), model(1)) == [None] * 3
    joined = pieces.joined()
    assert np.isnan(joined["w"]).all() and all(np.isfinite(joined[name]).all() for name in "bus")


GROUPS = {"w": "raise", "b": "skip", "u": "propagate", "s": "skip"}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("layer", SHAPES)
@pytest.mark.parametrize("listed", [False, True])
def test_policies_are_those_of_the_layer_wherever_it_is(layer: str, kernel: str, listed: bool) -> None:
    """The third process has no piece of the layer, or an empty one without a gradient."""

    def make(params: Any, rank: int, all_reduce: Any) -> LARS:
        held = {n: p for n, p in params.items() if not listed or n != layer or rank != 2}
        groups = [{"params": {n: p}, "nonfinite": GROUPS[n]} for n, p in held.items()]
        if layer not in held:  # its group is there all the same
            groups.insert(list(SHAPES).index(layer), {"params": {"none": np.empty(0)}, "nonfinite": GROUPS[layer]})
        more = {"layers": [*SHAPES, "none"]} if listed else {}
        return LARS(groups, lr=0.1, weight_decay=0.1, kernel=kernel, all_reduce=all_reduce, **more)

    pieces = Pieces((0, 0.5, 1, 1), make=make)
    before = fingerprint(pieces.params)

    def work(r: int, optimizer: LARS, grads: Any) -> None:
        if r == 0:
            grads[layer].reshape(-1)[0] = np.inf
        held = optimizer.state_dict()["state"]
        grads |= {"none": np.empty(0)}
        optimizer.step({n: grads[n] if grads[n].size else None for n in held})

    outcomes = pieces.outcomes(work, model(1))
    policy = GROUPS[layer]
    assert (fingerprint(pieces.params) == before) == (policy != "propagate")
    if policy == "raise":
        assert str(outcomes[2]) == f"'{layer}' is not finite on another process; nothing was changed (step 0)"
        assert [type(x) for x in outcomes] == [NonFiniteError] * 3
    else:
        assert outcomes == [None] * 3
    assert [x.skipped_steps for x in pieces.optimizers] == [int(policy == "skip")] * 3


@pytest.mark.parametrize("policy", ["raise", "skip", "propagate"])
def test_a_copy_that_is_not_finite_on_one_process_is_known_to_all(policy: str) -> None:
    def make(params: Any, rank: int, all_reduce: Any) -> LARS:
        groups = groups_of(params, all_reduce=None, nonfinite=policy)
        return LARS(groups, lr=0.1, all_reduce=all_reduce, weight_decay=0.1)

    pieces = Pieces(CUTS["even"], whole=SECOND, make=make)
    before = fingerprint(pieces.params)

    def work(r: int, optimizer: LARS, grads: Any) -> None:
        grads["s"][0] = np.nan if r == 1 else 1.0
        optimizer.step(grads)

    outcomes = pieces.outcomes(work, model(1))
    assert (fingerprint(pieces.params) == before) == (policy != "propagate")
    if policy == "raise":
        assert str(outcomes[1]) == "the gradient of 's' has 1 non-finite entries of 6; nothing was changed (step 0)"
        other = "a whole layer is not finite on another process; nothing was changed (step 0)"
        assert [str(outcomes[r]) for r in (0, 2)] == [other] * 2
    else:
        assert outcomes == [None] * 3
        assert [x.skipped_steps for x in pieces.optimizers] == [int(policy == "skip")] * 3


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_process_may_lack_all_gradients(kernel: str) -> None:
    """Where it holds nothing that is not empty; else that is an error as well."""
    pieces = Pieces(CUTS["all on one"], kernel=kernel)
    nothing = dict.fromkeys(SHAPES)
    for seed in (1, 2):
        assert pieces.outcomes(lambda r, x, grads: x.step(grads if r == 1 else nothing), model(seed)) == [None] * 3
    assert_models_close(pieces.joined(), trained_whole(2)[0], 1e-12)
    assert [x.steps for x in pieces.optimizers] == [2, 2, 2]
    outcomes = pieces.outcomes(lambda r, x, grads: x.step(nothing), model(3))
    assert outcomes == [None] * 3, "nobody has one"
    for optimizer in pieces.optimizers:
        optimizer.param_groups[0]["nonfinite"] = "skip"

    def spoil(r: int, optimizer: LARS, grads: Any) -> None:
        if r == 1:
            grads["w"][0] = np.inf
        optimizer.step(grads if r == 1 else nothing)

    assert pieces.outcomes(spoil, model(4)) == [None] * 3
    assert [(x.steps, x.skipped_steps) for x in pieces.optimizers] == [(3, 1)] * 3


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_process_without_rows_of_a_rule_adds_as_many_sums(kernel: str) -> None:
    """A rule has a third sum, of clipped gradients, and one of the processes has no layer of its group."""
    ranks, shared = Ranks(2), OPTIONS | {"max_grad_norm": 0.5, "kernel": kernel}

    def groups(rank: int | None) -> Any:
        sizes = {"optax": 3 if rank in (None, 0) else 0, "flash": 4 if rank in (None, 1) else 0}
        return [{"params": {rule: np.ones(size)}, "rule": rule} for rule, size in sizes.items()]

    def train(rank: int | None, **more: Any) -> Any:
        own = groups(rank)
        optimizer = LARS(own, **shared, **more)
        params = {name: p for group in own for name, p in group["params"].items()}
        for _ in range(3):
            optimizer.step({name: np.full_like(p, 2.0) if p.size else None for name, p in params.items()})
        return params

    found, whole = ranks.run(lambda rank: train(rank, all_reduce=ranks.all_reduce(rank))), train(None)
    for rank, name in enumerate(whole):
        np.testing.assert_allclose(found[rank][name], whole[name], rtol=1e-12)
    assert ranks.calls == 1 + 2 * 3


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("policy", ["raise", "skip"])
def test_a_number_that_the_update_can_not_hold_is_one_everywhere(policy: str, kernel: str) -> None:
    """Its square is finite; the second process has an empty piece, and the empty gradient of it."""
    ranks = Ranks(2)
    params = [np.ones(3 if rank == 0 else 0, "f4") for rank in range(2)]

    def work(rank: int) -> int:
        optimizer = LARS(
            {"w": params[rank]}, lr=0.1, nonfinite=policy, kernel=kernel, all_reduce=ranks.all_reduce(rank)
        )
        optimizer.step({"w": np.full(len(params[rank]), 1e39)})
        return optimizer.skipped_steps

    outcomes = ranks.outcomes(work)
    message = "the update of 'w' overflows dtype('float32') or the float64 of its norms; nothing was changed (step 0)"
    assert list(map(str, outcomes)) == [message if policy == "raise" else "1"] * 2
    assert params[0].tolist() == [1.0] * 3


def test_a_nan_that_clipping_spreads_is_named_or_known_everywhere() -> None:
    """One process has a layer with a nan, one has layers that it is spread to, and one has neither."""
    ranks, held = Ranks(3), {0: "nan", 1: "strict", 2: "free"}
    policies = {"nan": "propagate", "strict": "raise", "free": "propagate"}
    params = [{name: np.ones(2 if held[rank] == name else 0) for name in policies} for rank in range(3)]

    def work(rank: int) -> None:
        groups = [{"params": {name: p}, "nonfinite": policies[name]} for name, p in params[rank].items()]
        optimizer = LARS(groups, **OPTIONS, max_grad_norm=1.0, all_reduce=ranks.all_reduce(rank))
        grads = {name: np.full_like(p, np.nan if name == "nan" else 1.0) for name, p in params[rank].items()}
        optimizer.step({name: g if g.size else None for name, g in grads.items()})

    before = fingerprint(params)
    outcomes = ranks.outcomes(work)
    message = "the norm of all gradients is not finite on another process; nothing was changed (step 0)"
    assert [(type(x), str(x)) for x in outcomes] == [(NonFiniteError, message)] * 3
    assert fingerprint(params) == before
    policies["nan"] = "raise"
    outcomes = ranks.outcomes(work)
    assert str(outcomes[0]) == "the gradient of 'nan' has 2 non-finite entries of 2; nothing was changed (step 0)"
    assert {str(x) for x in outcomes[1:]} == {"'nan' is not finite on another process; nothing was changed (step 0)"}
