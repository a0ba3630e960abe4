"""A step that one process refuses is refused by all of them: nothing is written, and none waits for another."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from assertions import fingerprint
from pieces import Pieces, assert_models_close, model, trained_whole

from lars_array import LARS, RefusedElsewhereError
from lars_array.kernels import NUMPY_KERNELS as KERNELS

ELSEWHERE = "1 of 3 processes refused the step; nothing was changed"
Step = Callable[[LARS, dict[str, Any], dict[str, Any]], Any]


def ready(**options: Any) -> Pieces:
    """Return optimizers over pieces of half precision with masters, which have taken a step."""
    pieces = Pieces(**{"dtype": "f2", "master_weights": True} | options)
    pieces.step(model(1, "f2"))
    return pieces


def watched(pieces: Pieces) -> Any:
    """Return all that a step could change on any rank."""
    return fingerprint([pieces.params, pieces.optimizers])


def assert_goes_on(pieces: Pieces, **options: Any) -> None:
    """The next step is the second that one process takes."""
    pieces.step(model(2, "f2"))
    theirs, _ = trained_whole(2, dtype="f2", **{"master_weights": True} | options)
    assert_models_close(pieces.joined(), theirs, 1e-3)


def changed(name: str, x: Any) -> Step:
    return lambda optimizer, params, grads: optimizer.step(grads | {name: x})


def with_option(**options: Any) -> Step:
    def step(optimizer: LARS, params: Any, grads: Any) -> None:
        kept = dict(optimizer.param_groups[1])
        optimizer.param_groups[1].update(options)
        try:
            optimizer.step(grads)
        finally:
            optimizer.param_groups[1].update({key: kept[key] for key in options})

    return step


def failing(*_: Any) -> Any:
    raise ArithmeticError("from the caller's own function")


REFUSALS: dict[str, tuple[Step, type[Exception], str]] = {
    "a shape": (changed("w", np.ones((9, 9), "f2")), ValueError, "the gradient of 'w' must have the parameter's shape"),
    "a dtype": (changed("s", np.ones(6, int)), TypeError, "the gradient of 's' must be of one of the real types"),
    "no array": (changed("b", 3.0), TypeError, "the gradient of 'b' must be an array"),
    "a name": (changed("x", np.ones(2)), ValueError, "'x'"),
    "nothing": (lambda optimizer, params, grads: optimizer.step(), TypeError, "step needs grads"),
    "the parameter": (
        lambda optimizer, params, grads: optimizer.step(grads | {"w": params["w"]}),
        ValueError,
        "the gradient of 'w' must not share memory",
    ),
    "a rate": (with_option(lr=-0.1), ValueError, "Invalid learning rate"),
    "a schedule": (with_option(momentum=failing), ArithmeticError, "from the caller's own"),
    "a policy": (with_option(nonfinite="stop"), ValueError, "nonfinite must be one of"),
    "a rule": (with_option(rule="adam"), ValueError, "rule must be one of"),
    "a closure that raises": (
        lambda optimizer, params, grads: optimizer.step(closure=failing),
        ArithmeticError,
        "from the caller's own",
    ),
    "a closure without gradients": (
        lambda optimizer, params, grads: optimizer.step(closure=lambda: 1.0),
        TypeError,
        "closure must return the pair",
    ),
    "found_inf": (
        lambda optimizer, params, grads: optimizer.step(grads, found_inf=np.ones(3)),
        TypeError,
        "found_inf must be a number",
    ),
}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("kind", REFUSALS)
def test_what_one_process_refuses_all_refuse(kind: str, kernel: str) -> None:
    step, error, message = REFUSALS[kind]
    for rank in range(3):
        pieces = ready(kernel=kernel)
        before, start = watched(pieces), time.perf_counter()

        def work(r: int, optimizer: LARS, grads: Any, rank: int = rank, pieces: Pieces = pieces) -> None:
            (step if r == rank else lambda optimizer, params, grads: optimizer.step(grads))(
                optimizer, pieces.params[r], grads
            )

        outcomes = pieces.outcomes(work, model(2, "f2"))
        assert time.perf_counter() - start < 1.0
        own = outcomes.pop(rank)
        assert type(own) is error and message in str(own), repr(own)
        assert [(type(x), str(x)) for x in outcomes] == 2 * [(RefusedElsewhereError, ELSEWHERE)]
        assert watched(pieces) == before
        assert pieces.ranks.calls == 3
        assert_goes_on(pieces)


def test_the_first_step_may_be_refused() -> None:
    pieces = Pieces(dtype="f2", master_weights=True)
    before = watched(pieces)

    def work(r: int, optimizer: LARS, grads: Any) -> None:
        optimizer.step(grads | {"w": 1.0} if r == 1 else grads)

    outcomes = pieces.outcomes(work, model(1, "f2"))
    assert list(map(type, outcomes)) == [RefusedElsewhereError, TypeError, RefusedElsewhereError]
    assert watched(pieces) == before
    pieces.step(model(1, "f2"))
    assert_goes_on(pieces)


def test_several_processes_may_refuse_for_reasons_of_their_own() -> None:
    pieces = ready()

    def work(r: int, optimizer: LARS, grads: Any) -> None:
        optimizer.step([grads, grads | {"w": 1.0}, None][r])

    outcomes = pieces.outcomes(work, model(2, "f2"))
    assert str(outcomes[0]) == "2 of 3 processes refused the step; nothing was changed"
    assert [type(x) for x in outcomes[1:]] == [TypeError, TypeError]
    assert_goes_on(pieces)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_gradient_that_one_process_lacks_is_missed_by_all(kernel: str) -> None:
    pieces = ready(kernel=kernel)
    before = watched(pieces)

    def work(r: int, optimizer: LARS, grads: Any) -> None:
        optimizer.step(grads | {"u": None} if r == 1 else grads)

    outcomes = pieces.outcomes(work, model(2, "f2"))
    message = "the gradient of 'u' must be given by all processes that hold a piece of it, or by none; "
    assert [(type(x), str(x)) for x in outcomes] == 3 * [(ValueError, message + "nothing was changed")]
    assert watched(pieces) == before
    assert_goes_on(pieces)


@pytest.mark.parametrize("kind", [float, np.array, np.float32])
def test_hyper_parameters_that_differ_are_refused(kind: Any) -> None:
    pieces = ready()
    before = watched(pieces)
    message = "hyper-parameters must be the same on all processes, such as a learning rate that follows a loss; "

    def work(r: int, optimizer: LARS, grads: Any) -> None:
        with_option(lr=kind(0.3 if r == 2 else 0.2))(optimizer, {}, grads)

    outcomes = pieces.outcomes(work, model(2, "f2"))
    assert [(type(x), str(x)) for x in outcomes] == 3 * [(ValueError, message + "nothing was changed")]
    assert watched(pieces) == before
    assert_goes_on(pieces)


def test_an_error_between_two_sums_is_told_in_the_second() -> None:
    """Where a step adds sums twice: a rule fails on one process before it has."""
    pieces = Pieces(max_grad_norm=0.5, rule="optax", kernel="portable")
    pieces.step(model(1))
    before = watched(pieces)
    kernel = pieces.optimizers[0]._stepper._programs[0]._kernel
    calls = []

    def sums(grads: Any, operand: Any = None) -> Any:
        calls.append(operand)
        if len(calls) == 2:
            raise MemoryError("no memory for the second")
        return type(kernel).sums(kernel, grads, operand)

    kernel.sums = sums
    outcomes = pieces.outcomes(lambda r, optimizer, grads: optimizer.step(grads), model(2))
    assert list(map(type, outcomes)) == [MemoryError, RefusedElsewhereError, RefusedElsewhereError]
    assert watched(pieces) == before
    del kernel.sums
    pieces.step(model(2))
    assert_models_close(pieces.joined(), trained_whole(2, max_grad_norm=0.5, rule="optax")[0], 1e-12)
