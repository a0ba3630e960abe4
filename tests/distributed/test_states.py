"""Groups, schedules and checkpoints of optimizers whose layers are in pieces."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
from assertions import fingerprint
from pieces import (
    CUTS,
    OPTIONS,
    SECOND,
    SHAPES,
    STEPS,
    Pieces,
    assert_models_close,
    assert_same_telemetry,
    cut,
    groups_of,
    model,
    trained_whole,
)
from processes import Ranks

from lars_array import LARS
from lars_array.kernels import NUMPY_KERNELS as KERNELS


@pytest.mark.parametrize("kernel", KERNELS)
def test_groups_may_be_added_later(kernel: str) -> None:
    """The processes compare their layers once more."""
    options = OPTIONS | {"kernel": kernel}
    first = [name for name in SHAPES if name not in SECOND]

    def run(params: Any, pieces_of: Any, **more: Any) -> LARS:
        optimizer = LARS({name: params[name] for name in first}, **options, **more)
        for seed in range(1, 4):
            optimizer.step({name: pieces_of(model(seed))[name] for name in first})
        optimizer.add_param_group({"params": {name: params[name] for name in SECOND}, "lr": 0.05})
        for seed in range(4, 8):
            optimizer.step(pieces_of(model(seed)))
        return optimizer

    def make(params: Any, rank: int, all_reduce: Any) -> LARS:
        ends = CUTS["uneven"]
        return run(params, lambda x: {name: cut(x[name], ends, rank) for name in x}, all_reduce=all_reduce)

    theirs = model(0)
    whole = run(theirs, lambda x: x)
    pieces = Pieces(make=make)
    assert_models_close(pieces.joined(), theirs, 1e-12)
    assert_same_telemetry(pieces, whole)
    assert pieces.ranks.sum_over().shapes == [(3, 3), *3 * [(2 + 1 + 2, 3)], (3, 3), *4 * [(4 + 2 + 2, 3)]]


def test_layers_may_have_gradients_in_some_steps_only() -> None:
    theirs = model(0)
    whole = LARS(groups_of(theirs), **OPTIONS, rule="nvidia")
    pieces = Pieces(CUTS["middle empty"], rule="nvidia")
    for seed, absent in enumerate(["", "w", "bu", "wbus", "s", ""], start=1):
        grads = {name: None if name in absent else g for name, g in model(seed).items()}
        whole.step(grads)

        def step(rank: int, optimizer: LARS, _: Any, grads: Any = grads) -> None:
            optimizer.step({n: None if g is None else cut(g, pieces.ends, rank) for n, g in grads.items()})

        assert pieces.outcomes(step, model(seed)) == [None] * 3
    assert_models_close(pieces.joined(), theirs, 1e-12)
    assert_same_telemetry(pieces, whole)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("ends", ["first empty", "middle empty"])
def test_empty_pieces_may_lack_a_gradient(ends: str, kernel: str) -> None:
    """As those of FSDP1 do."""
    options = {"kernel": kernel, "max_grad_norm": 0.5, "rule": "optax"}
    pieces = Pieces(CUTS[ends], **options)
    for seed in range(1, STEPS + 1):

        def step(rank: int, optimizer: LARS, grads: Any) -> None:
            optimizer.step({name: g if g.size else None for name, g in grads.items()})

        assert pieces.outcomes(step, model(seed)) == [None] * 3
    theirs, _ = trained_whole(**options)
    assert_models_close(pieces.joined(), theirs, 1e-12)
    assert [x.steps for x in pieces.optimizers] == [STEPS] * 3


@pytest.mark.parametrize("twin", ["state_dict", "copy", "pickle"])
def test_a_checkpoint_of_pieces_goes_on(twin: str) -> None:
    theirs, whole = trained_whole(rule="nvidia")
    pieces = Pieces(CUTS["first empty"], rule="nvidia")
    for seed in range(1, 11):
        pieces.step(model(seed))
    second = Pieces(CUTS["first empty"], rule="nvidia")
    for rank, optimizer in enumerate(pieces.optimizers):
        for name, p in pieces.params[rank].items():
            second.params[rank][name][...] = p
        if twin == "state_dict":
            second.optimizers[rank].load_state_dict(optimizer.state_dict())
        elif twin == "copy":
            continue
    if twin != "state_dict":  # a copy brings its own arrays, and adds over the same processes
        made = copy.deepcopy if twin == "copy" else _pickled
        second = pieces
        second.optimizers = [made(optimizer) for optimizer in pieces.optimizers]
        second.params = [
            {n: p for group in x.param_groups for n, p in zip(group["names"], group["params"], strict=True)}
            for x in second.optimizers
        ]
    for seed in range(11, STEPS + 1):
        second.step(model(seed))
    assert_models_close(second.joined(), theirs, 1e-12)
    assert_same_telemetry(second, whole)


def _pickled(optimizer: LARS) -> LARS:
    """Return a copy by pickle, which can't hold functions within functions: they are put back."""
    functions, optimizer._state.all_reduce = optimizer._state.all_reduce, []
    own, optimizer._all_reduce = optimizer._all_reduce, None
    copied = pickle.loads(pickle.dumps(optimizer))
    for each in (optimizer, copied):
        each._state.all_reduce, each._all_reduce = functions, own
    return copied


def test_a_checkpoint_that_does_not_fit_is_refused_here_only() -> None:
    """Loading is no step: the other processes are not told, and nothing has changed."""
    pieces = Pieces()
    pieces.step(model(1))
    states = [optimizer.state_dict() for optimizer in pieces.optimizers]
    before = fingerprint([pieces.params, pieces.optimizers])
    with pytest.raises(ValueError, match="must have the parameter's shape"):
        pieces.optimizers[0].load_state_dict(states[1])
    assert fingerprint([pieces.params, pieces.optimizers]) == before
    pieces.step(model(2))
    assert pieces.ranks.calls == 3


def test_schedules_are_evaluated_alike() -> None:
    options = {"lr": lambda step: 0.1 * 0.5**step, "momentum": lambda step: np.array(0.5 + 0.01 * step)}
    theirs, _ = trained_whole(**options)
    pieces = Pieces(**options)
    for seed in range(1, STEPS + 1):
        pieces.step(model(seed))
    assert_models_close(pieces.joined(), theirs, 1e-12)


def test_two_optimizers_may_take_turns_with_the_same_processes() -> None:
    """In the order of the program, which is the same on all."""
    theirs, other = model(0), model(1)
    wholes = [LARS(groups_of(theirs), **OPTIONS), LARS(groups_of(other), **OPTIONS, rule="optax", max_grad_norm=0.5)]
    ranks, ends = Ranks(3), CUTS["uneven"]
    turns = [0, 1, 1, 0, 0, 0, 1, 0, 1, 1]
    for seed, turn in enumerate(turns):
        wholes[turn].step(model(seed))

    def work(rank: int) -> Any:
        both = [{name: cut(p, ends, rank) for name, p in model(k).items()} for k in (0, 1)]
        all_reduce = ranks.all_reduce(rank)
        optimizers = [LARS(groups_of(both[0]), **OPTIONS, all_reduce=all_reduce)]
        optimizers += [LARS(groups_of(both[1]), **OPTIONS, rule="optax", max_grad_norm=0.5, all_reduce=all_reduce)]
        for seed, turn in enumerate(turns):
            optimizers[turn].step({name: cut(g, ends, rank) for name, g in model(seed).items()})
        return both

    found = ranks.run(work)
    for k, whole in enumerate((theirs, other)):
        ours = {name: np.concatenate([both[k][name] for both in found]) for name in SHAPES}
        assert_models_close(ours, whole, 1e-12)
