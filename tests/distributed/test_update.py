"""`update`, the pure function, for layers in pieces on several processes."""

from __future__ import annotations

import contextlib
import importlib
from typing import Any

import numpy as np
import pytest
from assertions import fingerprint, to_numpy
from pieces import CUTS, OPTIONS, SECOND, SHAPES, STEPS, assert_models_close, cut_all, groups_of, model
from processes import Ranks

from lars_array import LARS, NonFiniteError, RefusedElsewhereError, init, update

ENDS = CUTS["middle empty"]


def whole_run(steps: int = STEPS, **options: Any) -> dict[str, Any]:
    params = model(0)
    optimizer = LARS(groups_of(params), **OPTIONS | options)
    for seed in range(1, steps + 1):
        optimizer.step(model(seed))
    return params


def named(groups: Any) -> dict[str, Any]:
    return {name: p for group in groups for name, p in group["params"].items()}


def joined(parts: list[dict[str, Any]], whole: Any = ()) -> dict[str, Any]:
    return {n: to_numpy(parts[0][n]) if n in whole else np.concatenate([to_numpy(x[n]) for x in parts]) for n in SHAPES}


class Process:
    """The parameters and the state of one rank."""

    def __init__(self, ranks: Ranks, rank: int, *, xp: Any = np, whole: Any = (), **options: Any) -> None:
        self.rank, self.xp, self.whole, self.options = rank, xp, whole, OPTIONS | options
        self.all_reduce = ranks.all_reduce(rank)
        self.groups: Any = groups_of(self.pieces(model(0)), **({"all_reduce": None} if whole else {}))
        self.state = init(self.groups, all_reduce=self.all_reduce)

    def pieces(self, arrays: Any) -> Any:
        return {n: self.xp.asarray(x) for n, x in cut_all(arrays, ENDS, self.rank, whole=self.whole).items()}

    def update(self, grads: Any, **options: Any) -> None:
        given = self.options | {"all_reduce": self.all_reduce} | options
        with in_64_bits(self.xp):
            self.groups, self.state = update(self.groups, grads, self.state, **given)


def processes(ranks: Ranks, **options: Any) -> list[Process]:
    return [Process(ranks, rank, **options) for rank in range(ranks.count)]


def in_64_bits(xp: Any) -> Any:
    """Return the context of JAX on this thread."""
    import_name = getattr(xp, "__name__", "")
    return importlib.import_module("jax").enable_x64(True) if import_name == "jax.numpy" else contextlib.nullcontext()


VARIANTS: dict[str, dict[str, Any]] = {
    "flash": {},
    "propagate": {"nonfinite": "propagate"},
    "skip": {"nonfinite": "skip"},
    "previous rate": {"rule": "nvidia", "lr": lambda step: 0.1 if int(step) < 2 else 0.04},
    "clipped, third sum": {"max_grad_norm": 0.5, "rule": "optax"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_pieces_are_updated_as_whole_layers_are(variant: str, xp: Any) -> None:
    ranks, options = Ranks(3), VARIANTS[variant]
    parts = processes(ranks, xp=xp, **options)
    for seed in range(1, 6):
        grads = [x.pieces(model(seed)) for x in parts]
        ranks.run(lambda r, grads=grads: parts[r].update(grads[r]))
    assert_models_close(joined([named(x.groups) for x in parts]), whole_run(5, **options), 1e-12)
    assert [int(x.state.step) for x in parts] == [5] * 3
    assert ranks.calls == 1 + 5 * (1 + (variant == "clipped, third sum"))


@pytest.mark.parametrize("limit", [None, 0.5])
def test_a_group_may_be_whole_on_each_process(limit: float | None) -> None:
    ranks = Ranks(3)
    parts = processes(ranks, whole=SECOND, max_grad_norm=limit)
    for seed in range(1, 6):
        ranks.run(lambda r, seed=seed: parts[r].update(parts[r].pieces(model(seed))))
    ours = joined([named(x.groups) for x in parts], SECOND)
    assert_models_close(ours, whole_run(5, max_grad_norm=limit), 1e-12)
    assert parts[0].groups[1]["all_reduce"] is None, "the form that was given"


def test_gradients_may_be_missing_where_pieces_are_empty() -> None:
    ranks = Ranks(3)
    parts = processes(ranks)
    for seed in range(1, 6):

        def work(rank: int, seed: int = seed) -> None:
            grads = parts[rank].pieces(model(seed))
            parts[rank].update({n: g if g.size else None for n, g in grads.items()})

        ranks.run(work)
    assert_models_close(joined([named(x.groups) for x in parts]), whole_run(5), 1e-12)
    assert [int(x.state.step) for x in parts] == [5] * 3


REFUSALS: dict[str, tuple[Any, type[Exception], str]] = {
    "a shape": (lambda x, grads: x.update(grads | {"w": np.ones(3)}), ValueError, "the gradient of 'w' must have"),
    "a name": (lambda x, grads: x.update(grads | {"x": np.ones(3)}), ValueError, "'x'"),
    "a rate": (lambda x, grads: x.update(grads, lr=-1.0), ValueError, "Invalid learning rate"),
    "an option": (lambda x, grads: x.update(grads, betas=1), ValueError, "unknown hyper-parameter 'betas'"),
    "no rate": (
        lambda x, grads: update(named(x.groups), grads, x.state, all_reduce=x.all_reduce),
        TypeError,
        "update needs lr",
    ),
    "the order": (
        lambda x, grads: update(x.groups, x.state, grads, lr=0.1, all_reduce=x.all_reduce),
        TypeError,
        "update takes params, grads and state in this order",
    ),
    "no parameters": (
        lambda x, grads: update([], grads, x.state, lr=0.1, all_reduce=x.all_reduce),
        ValueError,
        "empty parameter list",
    ),
    "the state": (
        lambda x, grads: update(x.groups, grads, init({"w": np.ones(2)}), lr=0.1, all_reduce=x.all_reduce),
        ValueError,
        "state must be of parameters named",
    ),
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_what_one_process_refuses_all_refuse(kind: str) -> None:
    call, error, message = REFUSALS[kind]
    for rank in range(3):
        ranks = Ranks(3)
        parts = processes(ranks)
        ranks.run(lambda r, parts=parts: parts[r].update(parts[r].pieces(model(1))))

        def work(r: int, rank: int = rank, parts: Any = parts) -> None:
            grads = parts[r].pieces(model(2))
            call(parts[r], grads) if r == rank else parts[r].update(grads)

        outcomes = ranks.outcomes(work)
        own = outcomes.pop(rank)
        assert type(own) is error and message in str(own), repr(own)
        told = "1 of 3 processes refused the step; nothing was changed"
        assert [(type(x), str(x)) for x in outcomes] == [(RefusedElsewhereError, told)] * 2
        ranks.run(lambda r, parts=parts: parts[r].update(parts[r].pieces(model(2))))
        assert_models_close(joined([named(x.groups) for x in parts]), whole_run(2), 1e-12)
        assert ranks.calls == 1 + 3


@pytest.mark.parametrize(("policy", "limit"), [(None, None), (None, 1.0), ("skip", None), ("propagate", None)])
def test_what_is_not_finite_on_one_process(policy: str | None, limit: float | None) -> None:
    ranks = Ranks(3)
    parts = processes(ranks, nonfinite=policy, max_grad_norm=limit)
    before = fingerprint([(x.groups, x.state) for x in parts])

    def work(r: int) -> None:
        grads = parts[r].pieces(model(1))
        if r == 0:
            grads["u"][0] = np.nan
        elif r == 1:
            grads["u"] = None  # it has an empty piece, and knows no more than that
        parts[r].update(grads)

    outcomes = ranks.outcomes(work)
    assert (fingerprint([(x.groups, x.state) for x in parts]) == before) == (policy != "propagate")
    if policy is None:
        assert [type(x) for x in outcomes] == [NonFiniteError] * 3
        assert str(outcomes[0]) == "the gradient of 'u' has 6 non-finite entries of 12; nothing was changed"
        assert str(outcomes[1]) == "'u' is not finite on another process; nothing was changed"
        assert str(outcomes[2]) == "the gradient of 'u' is not finite on another process; nothing was changed"
    else:
        assert outcomes == [None] * 3


def test_no_gradient_at_all_may_be_given() -> None:
    ranks = Ranks(2)
    nothing: dict[str, Any] = {"w": None}

    def work(rank: int) -> Any:
        p = {"w": np.ones(0 if rank else 3)}
        all_reduce, state = ranks.all_reduce(rank), init(p)
        for grads in (nothing if rank else p, nothing):
            p, state = update(p, grads, state, lr=0.1, weight_decay=0.1, all_reduce=all_reduce)
        bad = nothing if rank else {"w": np.full(3, np.nan)}
        p, state = update(p, bad, state, lr=0.1, weight_decay=0.1, all_reduce=all_reduce, nonfinite="skip")
        return int(state.step), p["w"]

    (steps, p), (others, _) = ranks.run(work)
    theirs = np.ones(3)
    LARS([theirs], lr=0.1, weight_decay=0.1).step([np.ones(3)])
    assert steps == others == 2
    np.testing.assert_allclose(p, theirs, rtol=1e-15)


def test_a_process_without_rows_of_a_rule_adds_as_many_sums() -> None:
    ranks = Ranks(2)

    def work(rank: int | None) -> Any:
        groups: Any = [
            {"params": {"a": np.ones(0 if rank == 1 else 3)}, "rule": "optax"},
            {"params": {"b": np.ones(0 if rank == 0 else 3)}},
        ]
        more = {} if rank is None else {"all_reduce": ranks.all_reduce(rank)}
        state = init(groups)
        for _ in range(2):
            grads = {name: p if p.size else None for name, p in named(groups).items()}
            groups, state = update(groups, grads, state, **OPTIONS, max_grad_norm=1.0, **more)
        return named(groups)

    found, whole = ranks.run(work), work(None)
    for rank, name in enumerate("ab"):
        np.testing.assert_allclose(found[rank][name], whole[name], rtol=1e-12)
    assert ranks.calls == 1 + 2 * 2


def test_what_another_process_skips_is_skipped() -> None:
    """As one that uses the class and has a loss scaler."""
    ranks, p = Ranks(2), np.ones(2)

    def work(rank: int) -> None:
        if rank == 0:
            LARS({"w": p}, **OPTIONS, all_reduce=ranks.all_reduce(0)).step({"w": np.ones(2)}, found_inf=True)
            return
        params = {"w": np.ones(3)}
        state = init(params)
        assert update(params, params, state, **OPTIONS, all_reduce=ranks.all_reduce(1)) == (params, state)

    ranks.run(work)
    assert p.tolist() == [1.0, 1.0]


def test_hyper_parameters_in_arrays_are_compared_too(xp: Any) -> None:
    ranks = Ranks(2)

    def work(rank: int) -> None:
        p = {"w": xp.asarray(np.ones(3))}
        update(p, p, init(p), lr=xp.asarray(0.1 + rank), all_reduce=ranks.all_reduce(rank))

    assert [str(x)[:56] for x in ranks.outcomes(work)] == [
        "hyper-parameters must be the same on all processes, such"
    ] * 2


def test_jax_arrays_are_added_as_numpys_in_float64() -> None:
    """Whether or not JAX has 64 bits, and its arrays can't be written to."""
    jnp = pytest.importorskip("jax.numpy")
    ranks, seen = Ranks(2), []

    def work(rank: int) -> Any:
        add = ranks.all_reduce(rank)

        def all_reduce(table: Any) -> None:
            seen.append((type(table), table.dtype))
            add(table)

        p = {"w": jnp.asarray(np.linspace(1, 2, 10, dtype="f4")[5 * rank : 5 * rank + 5])}
        state = init(p)
        for _ in range(5):
            p, state = update(p, p, state, **OPTIONS, all_reduce=all_reduce)
        assert p["w"].dtype == jnp.float32
        return np.asarray(p["w"])

    theirs = np.linspace(1, 2, 10, dtype="f4")
    whole = LARS([theirs], **OPTIONS)
    for _ in range(5):
        whole.step([theirs.copy()])
    np.testing.assert_allclose(np.concatenate(ranks.run(work)), theirs, rtol=1e-6)
    assert set(seen) == {(np.ndarray, np.dtype("f8"))}
