"""Pieces of layers on devices: all processes take the same steps, and hear later of those that were not taken."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from assertions import fingerprint, to_numpy
from distant_pieces import Distant, Few
from pieces import CUTS, OPTIONS, SECOND, assert_models_close, groups_of, model, trained_whole
from pretended_devices import DEVICES, Device, pretended

from lars_array import LARS, NonFiniteError, RefusedElsewhereError
from lars_array.state.counts import PinnedCounts


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    yield from pretended(request.param, monkeypatch)


def test_a_refusal_here_is_told_and_rejects_the_step_elsewhere(device: Device) -> None:
    pieces = Distant(device)
    pieces.step(model(1))
    before = fingerprint(pieces.params)

    def step(rank: int, optimizer: LARS, grads: Any) -> None:
        optimizer.step(grads | {"w": 1.0} if rank == 1 else grads)

    outcomes = pieces.outcomes(step, model(2))
    assert list(map(type, outcomes)) == [type(None), TypeError, type(None)]
    assert fingerprint(pieces.params) == before
    assert_rejected(pieces, RefusedElsewhereError, "one has refused it", ranks=(0, 2))
    pieces.step(model(2))
    assert_models_close(pieces.joined(), trained_whole(2)[0], 1e-12)
    assert pieces.synchronized() == [None] * 3 and pieces.counts() == [(2, 0)] * 3


def assert_rejected(pieces: Distant, kind: type[Exception], message: str, ranks: Any = (0, 1, 2)) -> None:
    """The device reports a step that it has rejected, once, on these ranks."""
    outcomes = pieces.synchronized()
    for rank in range(3):
        if rank in ranks:
            assert type(outcomes[rank]) is kind and message in str(outcomes[rank]), outcomes
        else:
            assert outcomes[rank] is None, outcomes
    assert pieces.synchronized() == [None] * 3


def test_found_inf_of_one_process_skips_the_step_of_all(device: Device) -> None:
    pieces = Distant(device, nonfinite="propagate")
    pieces.step(model(1))
    before = fingerprint(pieces.params)
    for found in ([0.0, 0.0, 1.0], [True, False, False]):
        known = [device.put(np.array(x)) if isinstance(x, float) else x for x in found]
        assert (
            pieces.outcomes(lambda r, x, grads, known=known: x.step(grads, found_inf=known[r]), model(2)) == [None] * 3
        )
    assert fingerprint(pieces.params) == before
    zero = device.put(np.array(0.0))
    pieces.step(model(2), found_inf=zero)
    assert_models_close(pieces.joined(), trained_whole(2)[0], 1e-12)
    assert pieces.synchronized() == [None] * 3 and pieces.counts() == [(2, 2)] * 3


@pytest.mark.parametrize("policy", ["raise", "skip", "propagate"])
@pytest.mark.parametrize("is_seen", [False, True])
def test_what_is_not_finite_on_one_process(device: Device, policy: str, is_seen: bool) -> None:
    """The process in the middle has an empty piece, with or without an empty gradient."""
    pieces = Distant(device, CUTS["middle empty"], nonfinite=policy)
    pieces.step(model(1))
    before, bad = fingerprint(pieces.params), model(2)
    bad["u"][-1] = np.nan

    def step(rank: int, optimizer: LARS, grads: Any) -> None:
        optimizer.step({n: g if is_seen or 0 not in g.shape else None for n, g in grads.items()})

    assert pieces.outcomes(step, bad) == [None] * 3
    assert (fingerprint(pieces.params) == before) == (policy != "propagate")
    if policy == "raise":
        outcomes = pieces.synchronized()
        here = "the norm of the gradient of 'u' was not finite in an earlier step, which changed nothing"
        there = (
            here if is_seen else "a layer of another process was not finite in an earlier step, which changed nothing"
        )
        assert [(type(x), str(x)) for x in outcomes] == [(NonFiniteError, x) for x in (here, there, here)]
    assert pieces.synchronized() == [None] * 3
    assert pieces.counts() == [(2 if policy == "propagate" else 1, int(policy == "skip"))] * 3
    if policy != "propagate":
        pieces.step(model(2))
        assert_models_close(pieces.joined(), trained_whole(2)[0], 1e-12)


@pytest.mark.parametrize("policy", ["raise", "skip", "propagate"])
def test_a_copy_that_is_not_finite_on_one_process_is_known_to_all(device: Device, policy: str) -> None:
    def make(params: Any, rank: int, all_reduce: Any) -> LARS:
        groups = groups_of(params, all_reduce=None, nonfinite=policy)
        return LARS(groups, **OPTIONS, all_reduce=all_reduce)

    pieces = Distant(device, whole=SECOND, make=make)
    before = fingerprint(pieces.params)
    nan = device.put(np.full(6, np.nan))
    assert pieces.outcomes(lambda r, x, g: x.step(g | {"s": nan} if r == 1 else g), model(1)) == [None] * 3
    assert (fingerprint(pieces.params) == before) == (policy != "propagate")
    expected = NonFiniteError if policy == "raise" else type(None)
    assert [type(x) for x in pieces.synchronized()] == [expected] * 3
    assert pieces.counts() == [(int(policy == "propagate"), int(policy == "skip"))] * 3


def test_a_nan_that_clipping_spreads_is_known_to_all(device: Device) -> None:
    """One process has a layer with a nan, one has layers that it is spread to, and one has neither."""
    groups = {name: {"nonfinite": policy} for name, policy in (("a", "propagate"), ("b", "raise"), ("c", "propagate"))}
    few = Few(device, groups, max_grad_norm=1.0)
    elsewhere = "a layer of another process was not finite in an earlier step, which changed nothing"
    for policy in ("propagate", "raise"):
        for optimizer in few.optimizers:
            optimizer.param_groups[0]["nonfinite"] = policy
        few.step({"a": np.nan, "b": 1.0, "c": 1.0})
        assert [x.tolist() for x in few.held()] == [[1.0] * 3] * 3
        outcomes = few.ranks.outcomes(lambda rank: few.optimizers[rank].synchronize())
        assert [type(x) for x in outcomes] == [NonFiniteError] * 3
        here = elsewhere if policy == "propagate" else elsewhere.replace("a layer of another process", "")
        assert here in str(outcomes[0])
        assert [str(x) for x in outcomes[1:]] == [elsewhere] * 2
    few.step({"a": 1.0, "b": 1.0, "c": 1.0})
    assert [(x.steps, x.skipped_steps) for x in few.optimizers] == [(1, 0)] * 3


def test_policies_may_change(device: Device) -> None:
    few = Few(device, {"a": {}, "b": {}})
    counts = []
    for policy in ("skip", "propagate", "raise"):
        for optimizer in few.optimizers:
            optimizer.param_groups[0]["nonfinite"] = policy
        few.step({"a": np.nan, "b": 1.0})
        kinds = [type(x) for x in few.ranks.outcomes(lambda rank: few.optimizers[rank].synchronize())]
        counts.append([*kinds, *((x.steps, x.skipped_steps) for x in few.optimizers)])
    none = type(None)
    assert counts == [[none, none, (0, 1), (0, 1)], [none, none, (1, 1), (1, 1)], [NonFiniteError] * 2 + [(1, 1)] * 2]


def test_a_process_without_rows_of_a_rule_adds_as_many_sums(device: Device) -> None:
    few = Few(device, {"a": {"rule": "optax"}, "b": {"rule": "flash"}}, max_grad_norm=1.0)
    theirs = {"a": np.ones(3), "b": np.ones(3)}
    groups = [{"params": {name: theirs[name]}, **own} for name, own in few.groups.items()]
    whole = LARS(groups, **OPTIONS, max_grad_norm=1.0)
    for _ in range(3):
        few.step({"a": 2.0, "b": 3.0})
        whole.step({"a": np.full(3, 2.0), "b": np.full(3, 3.0)})
    for ours, name in zip(few.held(), theirs, strict=True):
        np.testing.assert_allclose(ours, theirs[name], rtol=1e-12)
    assert few.ranks.calls == 1 + 2 * 3


@pytest.mark.parametrize(("stage", "told"), [("sums", True), ("writer", False)])
def test_an_error_here_is_told_as_long_as_others_wait(device: Device, stage: str, told: bool) -> None:
    pieces = Distant(device)
    pieces.step(model(1))
    before = fingerprint(pieces.params[1:])
    kernel = pieces.optimizers[0]._stepper._programs[0]._kernel

    def fail(*_: Any) -> Any:
        raise MemoryError("no memory")

    setattr(kernel, stage, fail)
    outcomes = pieces.outcomes(lambda r, x, g: x.step(g), model(2))
    assert list(map(type, outcomes)) == [MemoryError, type(None), type(None)]
    assert pieces.ranks.calls == 3
    assert (fingerprint(pieces.params[1:]) == before) == told
    kinds = [type(None), *[RefusedElsewhereError if told else type(None)] * 2]
    assert [type(x) for x in pieces.synchronized()] == kinds


def without_a_gradient(rank: int, optimizer: LARS, grads: Any) -> None:
    optimizer.step(grads | {"u": None} if rank == 1 else grads)


def with_another_rate(rank: int, optimizer: LARS, grads: Any) -> None:
    group = optimizer.param_groups[0]
    kept, group["lr"] = group["lr"], 0.1 + rank / 8
    optimizer.step(grads)
    group["lr"] = kept


@pytest.mark.parametrize("step", [without_a_gradient, with_another_rate])
def test_processes_that_do_not_fit_each_other_reject_the_step(device: Device, step: Any) -> None:
    pieces = Distant(device)
    pieces.step(model(1))
    before = fingerprint(pieces.params)
    assert pieces.outcomes(step, model(2)) == [None] * 3
    assert fingerprint(pieces.params) == before
    assert_rejected(pieces, RefusedElsewhereError, "not all processes took part alike in an earlier step")
    pieces.step(model(2))
    assert_models_close(pieces.joined(), trained_whole(2)[0], 1e-12)


@pytest.mark.parametrize("kind", ["nothing", "processes", "refusals"])
def test_a_sum_that_is_not_over_all_processes_writes_nothing(device: Device, kind: str) -> None:
    """As that of NCCL, behind which kernels run although it was aborted."""
    calls = [0] * 3

    def make(params: Any, rank: int, all_reduce: Any) -> LARS:
        def add(table: Any) -> None:
            calls[rank] += 1
            if calls[rank] != 3 or kind != "nothing":
                all_reduce(table)
            if calls[rank] == 3 and kind != "nothing":
                column = int(kind == "refusals")
                table[-2:-1, column : column + 1] = 2.0

        return LARS(groups_of(params), **OPTIONS, all_reduce=add)

    pieces = Distant(device, make=make)
    pieces.step(model(1))
    before = fingerprint(pieces.params)
    pieces.step(model(2))
    assert fingerprint(pieces.params) == before
    assert_rejected(pieces, RefusedElsewhereError, "which changed nothing")
    pieces.step(model(2))
    assert_models_close(pieces.joined(), trained_whole(2)[0], 1e-12)


def test_a_step_that_reports_an_earlier_one_is_taken_with_the_others(device: Device, monkeypatch: Any) -> None:
    """The news of a rejected step come to each process at another time; here to the first process only."""
    pieces = Distant(device)
    pieces.step(model(1))
    bad = model(2)
    bad["w"][0] = np.nan
    assert pieces.outcomes(lambda r, x, g: x.step(g), bad) == [None] * 3
    first = pieces.optimizers[0]._state.device
    assert first is not None
    inner = first._pinned.read
    first._pinned.read = lambda *, wait: inner(wait=True)  # type: ignore[method-assign]
    pieces.is_ready = False
    outcomes = pieces.outcomes(lambda r, x, g: x.step(g), model(2))
    assert list(map(type, outcomes)) == [NonFiniteError, type(None), type(None)]
    first._pinned.read = inner  # type: ignore[method-assign]
    pieces.step(model(3))
    assert [type(x) for x in pieces.synchronized()] == [type(None), NonFiniteError, NonFiniteError]
    assert pieces.counts() == [(3, 0)] * 3
    assert_models_close(pieces.joined(), trained_whole(3)[0], 1e-12)


def test_the_counts_travel_to_the_host_whatever_the_policy(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without other processes a step that can't fail sends nothing."""
    copies: list[Any] = []
    monkeypatch.setattr(PinnedCounts, "copy", lambda self: copies.append(self))
    pieces = Distant(device, nonfinite="propagate")
    for seed in (1, 2):
        pieces.step(model(seed))
    assert len(copies) == 2 * 3


@pytest.mark.parametrize("differ", [False, True])
def test_copies_of_a_piece_are_compared_at_the_first_step(device: Device, differ: bool) -> None:
    """Two processes hold the same piece, which one of them counts, as an adapter finds; or only should."""
    few = Few(device, {"a": {}, "b": {}})
    params = [{"a": device.put(np.ones(3) + (rank if differ else 0))} for rank in range(2)]

    def work(rank: int) -> Any:
        optimizer = LARS(params[rank], **OPTIONS, all_reduce=few.ranks.all_reduce(rank))
        optimizer._state.counted, optimizer._state.copies, optimizer._state._shards = [rank == 0], [2], None
        for _ in range(2):
            optimizer.step({"a": device.put(np.ones(3))})
        return optimizer.norms()["a"]

    outcomes = few.ranks.outcomes(work)
    if differ:
        message = "'a' must be the same on processes that hold copies of it; nothing was changed"
        assert [(type(x), str(x)) for x in outcomes] == [(ValueError, message)] * 2
        assert [to_numpy(own["a"]).tolist() for own in params] == [[1.0] * 3, [2.0] * 3]
    else:
        assert few.ranks.calls == 1 + 1 + 2
        theirs = np.ones(3)
        whole = LARS({"a": theirs}, **OPTIONS)
        for _ in range(2):
            whole.step({"a": np.ones(3)})
        assert outcomes == [whole.norms()["a"]] * 2
        np.testing.assert_allclose(to_numpy(params[0]["a"]), theirs, rtol=1e-12)


@pytest.mark.parametrize("rule", ["flash", "optax"])
def test_a_graph_captures_steps_of_one_rule_only(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The indices of the layers of each rule would come from the host."""
    for device in pretended("cuda", monkeypatch):
        params = {"a": device.put(np.ones(3)), "b": device.put(np.ones(3))}
        groups = [{"params": {"a": params["a"]}, "rule": rule}, {"params": {"b": params["b"]}}]
        optimizer = LARS(groups, **OPTIONS, all_reduce=lambda table: None)
        grads = {name: device.put(np.ones(3)) for name in params}
        optimizer.step(grads)
        optimizer._stepper._programs[0]._kernel._device.capturing = True
        if rule == "flash":
            optimizer.step(grads)
            return
        before = fingerprint(params)
        with pytest.raises(ValueError, match="rule must be the same for all layers in a step with all_reduce that a"):
            optimizer.step(grads)
        assert fingerprint(params) == before
