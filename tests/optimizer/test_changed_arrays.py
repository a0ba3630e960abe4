"""Gradients that look as others did are not asked again, and nothing that matters is overlooked by that."""

from __future__ import annotations

import gc
import inspect
import sys
import weakref
from typing import Any

import numpy as np
import pytest

from lars_array import LARS, NonFiniteError, _stepper
from lars_array.kernels import NUMPY_KERNELS as KERNELS


class Subclass(np.ndarray):
    pass


@pytest.mark.parametrize("kernel", KERNELS)
def test_what_types_gradients_have_is_known_after_one_that_was_looked_at_alone(kernel: str) -> None:
    p = np.ones(4, np.float32)
    optimizer = LARS([p], 0.1, kernel=kernel)
    optimizer.step([np.ones(4)])
    optimizer.step([np.ones(8, np.float32)[::2]])
    before = p.copy()
    with pytest.raises(NonFiniteError):  # float32 has no room for it
        optimizer.step([np.full(4, 1e100)])
    np.testing.assert_array_equal(p, before)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("kind", [np.ndarray, Subclass])
def test_arrays_that_change_are_noticed(kind: Any, kernel: str) -> None:
    p, g = (np.ones(4, np.float32).view(kind) for _ in range(2))
    optimizer = LARS({"w": p}, 0.1, kernel=kernel)
    optimizer.step([g])
    optimizer.step([g])
    p.setflags(write=False)
    with pytest.raises(ValueError, match=r"^parameter 'w' must be writable; got a read-only array$"):
        optimizer.step([g])
    p.setflags(write=True)
    g.dtype = np.int32
    with pytest.raises(TypeError, match="'w'"):
        optimizer.step([g])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("kind", [np.ndarray, Subclass])
def test_gradients_that_come_to_lie_elsewhere_are_looked_at(kind: Any, kernel: str) -> None:
    p, g = (np.ones(4, np.float32).view(kind) for _ in range(2))
    optimizer = LARS({"w": p}, 0.1, momentum=0.9, kernel=kernel)
    optimizer.step([g])
    optimizer.step([g])
    for taken in (p, optimizer.state_views()["w"]["momentum_buffer"]):
        with pytest.raises(ValueError, match=r"^the gradient of 'w' must not share memory with"):
            optimizer.step([taken.view(kind)])
    optimizer.step([g])
    assert optimizer.steps == 3


def test_an_interrupt_leaves_no_other_gradients_addresses() -> None:
    """They would be taken for those of gradients that were seen before."""
    memory = np.ones(64, np.float32)
    first, second = memory[8:12].view(Subclass), np.ones(4, np.float32).view(Subclass)

    def room() -> Any:
        return np.ones(4, np.float32).view(Subclass)

    p = room()
    optimizer = LARS([p], 0.1, kernel="blocked")
    for _ in range(2):
        optimizer.step([first])
    code = _stepper.StepProgram.gradients.__code__
    lines = range(code.co_firstlineno, code.co_firstlineno + len(inspect.getsourcelines(code)[0]))
    for line in lines:

        def strike(frame: Any, event: str, argument: Any, line: int = line) -> Any:
            if event == "line" and frame.f_lineno == line:
                sys.settrace(None)
                raise KeyboardInterrupt
            return strike

        before = sys.gettrace()
        sys.settrace(lambda frame, *_, strike=strike: strike if frame.f_code is code else None)
        try:
            optimizer.step([second])
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(before)
        with pytest.raises(ValueError, match="share memory"):
            optimizer.step([p[:4].view(Subclass)])
        optimizer.step([first])


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_parameter_that_was_resized_is_refused_before_others_are_written(kernel: str) -> None:
    a, b = np.ones(3), np.ones(4)
    optimizer = LARS({"a": a, "b": b}, 0.5, momentum=0.9, kernel=kernel)
    optimizer.step([np.ones(3), np.ones(4)])
    b.resize(5, refcheck=False)
    before = a.copy()
    kind = r"dtype\('float64'\)"
    message = rf"expected shape \(4,\) and dtype {kind} at its original address; found \(5,\) and {kind}"
    with pytest.raises(ValueError, match=rf"^parameter 'b' was modified in place: {message}$"):
        optimizer.step([np.ones(3), np.ones(5)])
    np.testing.assert_array_equal(a, before)
    assert optimizer.steps == 1


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_parameter_that_sat_out_may_come_back_elsewhere(kernel: str) -> None:
    a, b = np.ones(3), np.ones(4)
    optimizer = LARS({"a": a, "b": b}, 0.5, kernel=kernel)
    optimizer.step([np.ones(3), None])
    b.resize(50_000, refcheck=False)
    b[:] = 1
    for gradients_ in ([np.ones(3), b], [b[10:13], np.ones(50_000)]):
        with pytest.raises(ValueError, match="must not share memory with parameter 'b'"):
            optimizer.step(gradients_)
    optimizer.step([np.ones(3), np.ones(50_000)])
    assert b.min() == b.max() == 0.5


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_step_without_gradients_can_be_skipped_too(kernel: str) -> None:
    optimizer = LARS({"w": np.ones(3)}, 0.1, kernel=kernel)
    optimizer.step([None], found_inf=True)
    assert (optimizer.steps, optimizer.skipped_steps) == (0, 1)
    optimizer.step([None], found_inf=np.zeros(()))
    assert (optimizer.steps, optimizer.skipped_steps) == (1, 1)


@pytest.mark.parametrize("policy", ["propagate", "raise"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_gradients_are_not_kept(kernel: str, policy: str) -> None:
    """They are as much memory as the model, and usually made anew for each step."""
    optimizer = LARS([np.ones(5), np.ones((4, 6))[:, ::2]], lr=0.1, momentum=0.9, nonfinite=policy, kernel=kernel)
    grads = [np.ones(5), np.ones((4, 3))]
    for _ in range(2):
        optimizer.step(grads)
    known = [weakref.ref(g) for g in grads]
    del grads
    gc.collect()
    assert all(g() is None for g in known)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_parameter_may_be_frozen_or_resized_while_it_sits_out(kernel: str) -> None:
    a, b = np.ones(3), np.ones(4)
    optimizer = LARS({"a": a, "b": b}, 0.5, kernel=kernel)
    optimizer.step([np.ones(3), np.ones(4)])
    a.setflags(write=False)
    for _ in range(2):
        optimizer.step([None, np.ones(4)])
    with pytest.raises(ValueError, match=r"^parameter 'a' must be writable"):
        optimizer.step([np.ones(3), np.ones(4)])
    a.setflags(write=True)
    optimizer.step([np.ones(3), np.ones(4)])
    b.resize(5, refcheck=False)
    optimizer.step([np.ones(3), None])
    assert a.tolist() == [-0.5] * 3 and optimizer.steps == 5
