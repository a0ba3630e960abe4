"""Tests of `lars_jax.LARS` on a CUDA device: on a GPU, or on a stand-in for one."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lars_array
from lars_array._stepper import StepProgram
from lars_jax import LARS
from lars_jax._buffers import CudaBuffers

OPTIONS: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "trust_coefficient": 0.1}
MANY: list[dict[str, Any]] = [
    {},
    {"nesterov": True, "rule": "optax"},
    {"dampening": 0.5, "max_grad_norm": 0.5, "nonfinite": "skip"},
    {"trust_clip": True, "nonfinite": "propagate", "rescale_grad": 0.5, "maximize": True},
    {"weight_decay_mask": lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree)},
    {"trust_ratio_mask": {"w": True, "b": [False], "none": False, "one": True}},
    {"layer_axes": {"w": 1, "b": [0], "none": 0, "one": 0}},
    {"layer_of": {"w": "both", "b.0": "both"}},
]

Put = Callable[[Any], Any]


def draw(seed: int, dtype: Any = "float32") -> dict[str, Any]:
    """Return a tree of NumPy arrays."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> Any:
        x = rng.normal(size=shape)
        return np.asarray(x + 1j * rng.normal(size=shape) if "complex" in str(dtype) else x).astype(jnp.dtype(dtype))

    return {"w": normal(40, 30), "b": [normal(7)], "none": normal(0, 3), "one": normal()}


def bits(tree: Any) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def addresses(tree: Any) -> list[int]:
    return [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree)]


def assert_close(ours: Any, theirs: Any, tolerance: float = 1e-6) -> None:
    """Compare with what NumPy's kernels make: `apply` rounds as they do, and sums differ in the last digits."""
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        a, b = (np.asarray(x).astype(np.complex128) for x in (a, b))
        assert a.size == 0 or np.max(np.abs(a - b)) <= tolerance * np.max(np.abs(b)), f"off by {np.max(np.abs(a - b))}"


def pair(put: Put, donate: bool, dtype: Any = "float32", **options: Any) -> tuple[LARS, LARS]:
    """Return an optimizer there, and one in NumPy's memory."""
    there = LARS(put(draw(0, dtype)), donate=donate, **OPTIONS | options)
    assert isinstance(there._memory, CudaBuffers)
    here = LARS(draw(0, dtype), **OPTIONS | options)
    assert not isinstance(here._memory, CudaBuffers)
    return there, here


def steps_are_those_of_a_cpu(put: Put, donate: bool) -> None:
    for options in MANY:
        there, here = pair(put, donate, **options)
        for t in range(4):
            params = there.step(put(draw(1 + t)))
            expected = here.step(draw(1 + t))
        assert_close(params, expected)
        there.synchronize()
        assert there.steps == 4
        for name, norms in there.norms().items():
            np.testing.assert_allclose(norms, here.norms()[name], rtol=1e-5)
        assert there.trust_ratios() == pytest.approx(here.trust_ratios(), rel=1e-5)


def all_types_are_stepped(put: Put, donate: bool) -> None:
    for dtype, other, tolerance in [
        ("float32", "float16", 1e-6),
        ("float16", "float16", 2e-3),
        ("bfloat16", "bfloat16", 1e-2),
        ("bfloat16", "float32", 1e-2),
        ("complex64", "complex64", 1e-6),
    ]:
        for options in [{}, {"master_weights": True}]:
            there, here = pair(put, donate, dtype, **options)
            for t in range(3):
                params, expected = there.step(put(draw(1 + t, other))), here.step(draw(1 + t, other))
            assert_close(params, expected, tolerance)
            assert there.state_dict()["state"].keys() == {"w", "b.0", "none", "one"}
    with jax.enable_x64(True):
        there, here = pair(put, donate, "float64")
        for t in range(3):
            params, expected = there.step(put(draw(1 + t, "float64"))), here.step(draw(1 + t, "float64"))
        assert_close(params, expected, 1e-12)
        grads = put(draw(4, "float64"))
    with pytest.raises(TypeError, match="jax_enable_x64"):
        there.step(grads)
    with jax.enable_x64(True):
        assert_close(there.step(grads), here.step(draw(4, "float64")), 1e-12)


def nothing_is_copied(put: Put, donate: bool) -> None:
    """Gradients are read where they are, and what is donated stays where it is."""
    optimizer, seen = LARS(put(draw(0)), donate=donate, **OPTIONS), []
    inner = StepProgram.run

    def spied(self: Any, state: Any, grads: Any, *arguments: Any) -> Any:
        seen.append(grads.addresses.tolist())
        return inner(self, state, grads, *arguments)

    memory = optimizer._memory.arrays
    first = addresses(optimizer.params)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StepProgram, "run", spied)
        for t in range(4):
            grads = put(draw(1 + t))
            jax.block_until_ready(grads)
            params = optimizer.step(grads)
            leaves = jax.tree.leaves(grads)
            read = [at for at, x in zip(seen[-1], leaves, strict=True) if x.size]
            assert read == [x.unsafe_buffer_pointer() for x in leaves if x.size]
            assert optimizer._memory.arrays is memory, "the memory has moved"
            if donate:
                assert addresses(params) == first
            else:
                assert not set(addresses(params)) & {
                    x.unsafe_buffer_pointer() for x in optimizer._memory._own if x.size
                }
    assert all(x.committed for x in jax.tree.leaves(params))


def what_anybody_holds_is_not_written_to(put: Put, donate: bool) -> None:
    """What is donated is deleted; nothing else is."""
    given, history, snapshots = put(draw(0)), [], []
    optimizer = LARS(given, donate=donate, **OPTIONS)
    assert all(x.is_deleted() == donate for x in jax.tree.leaves(given))
    grads = put(draw(1))
    before = bits(grads)
    for _ in range(4):
        history.append(optimizer.params)
        snapshots.append(bits(optimizer.params))
        optimizer.step(grads)
        assert all(x.is_deleted() == donate for x in jax.tree.leaves(history[-1]))
    assert bits(grads) == before
    assert len({x[0] for x in snapshots}) == 4, "nothing was done"
    if not donate:
        assert list(map(bits, history)) == snapshots


def gradients_may_be_the_parameters(put: Put, donate: bool) -> None:
    there, here = pair(put, donate)
    for _ in range(3):
        params, expected = there.step(there.params), here.step(here.params)
    assert_close(params, expected)


def some_have_no_gradient(put: Put, donate: bool) -> None:
    there, here = pair(put, donate)
    for t in range(4):
        grads = draw(1 + t)
        if t % 2:
            grads["w"] = None
        params, expected = there.step(put(grads)), here.step(grads)
    assert_close(params, expected)
    assert there.norms().keys() == here.norms().keys() == {"b.0", "none", "one"}


def numbers_on_the_device_are_read_there(put: Put, donate: bool) -> None:
    rates = [0.1, 0.3, 0.2]
    on_it, scheduled, plain = (pair(put, donate, nonfinite="skip")[0] for _ in range(3))
    scheduled.param_groups[0]["lr"] = lambda step: put(np.float32(rates[step]))
    for t, rate in enumerate(rates):
        on_it.param_groups[0]["lr"] = known = put(np.float32(rate))
        plain.param_groups[0]["lr"] = float(np.float32(rate))
        results = [bits(x.step(put(draw(1 + t)))) for x in (on_it, scheduled, plain)]
        assert on_it.param_groups[0]["lr"] is known and callable(scheduled.param_groups[0]["lr"])
        assert results[0] == results[1] == results[2]
    for found, skips in [(put(np.float32(1)), True), (put(np.bool_(True)), True), (put(np.float32(0)), False)]:
        before = bits(on_it.params)
        assert (bits(on_it.step(put(draw(5)), found_inf=found)) == before) == skips
    for found, skips in [(True, True), (np.bool_(True), True), (False, False)]:
        before = bits(on_it.params)
        assert (bits(on_it.step(put(draw(6)), found_inf=found)) == before) == skips
    on_it.synchronize()
    assert (on_it.steps, on_it.skipped_steps) == (5, 4)
    saved = on_it.state_dict()
    assert isinstance(saved["param_groups"][0]["lr"], np.ndarray)


def what_is_not_finite_is_reported_later(put: Put, donate: bool) -> None:
    there, here = pair(put, donate)
    bad = draw(2)
    bad["w"][3, 4] = np.inf
    expected = here.step(draw(1))
    assert_close(there.step(put(draw(1))), expected)
    before = bits(there.params)
    assert bits(there.step(put(bad))) == before, "a step that is refused changes nothing"
    with pytest.raises(lars_array.NonFiniteError, match="the norm of the gradient of 'w' was not finite"):
        there.synchronize()
    assert there.steps == 1
    assert_close(there.step(put(draw(3))), here.step(draw(3)))
    there.step(put(bad))
    jax.block_until_ready(there.params)
    with pytest.raises(lars_array.NonFiniteError, match="in an earlier step, which changed nothing"):
        there.step(put(draw(4)))  # which does nothing itself
    assert not any(x.is_deleted() for x in jax.tree.leaves(there.params))
    assert_close(there.step(put(draw(4))), here.step(draw(4)))
    assert there.steps == here.steps == 3


def states_come_and_go(put: Put, donate: bool) -> None:
    for dtype, options in [("float32", {}), ("bfloat16", {"master_weights": True})]:
        tolerance = 1e-6 if dtype == "float32" else 1e-2
        there, here = pair(put, donate, dtype, **options)
        there.step(put(draw(1, dtype)))
        here.step(draw(1, dtype))
        for saved in (there.state_dict(), here.state_dict()):
            assert all(type(x) is np.ndarray for own in saved["state"].values() for k, x in own.items() if k[0] in "m")
        back = LARS(jax.tree.map(np.asarray, there.params), **OPTIONS | options)
        back.load_state_dict(there.state_dict())
        forth = LARS(put(jax.tree.map(np.asarray, here.params)), donate=donate, **OPTIONS | options)
        forth.load_state_dict(here.state_dict())
        others = [copy.deepcopy(there), pickle.loads(pickle.dumps(there)), forth]
        grads, ours = draw(2, dtype), there.step(put(draw(2, dtype)))
        assert_close(ours, here.step(grads), tolerance)
        assert_close(back.step(grads), ours, tolerance)
        for other in others:
            assert isinstance(other._memory, CudaBuffers) and other.steps == 1
            assert_close(other.step(put(grads)), ours, tolerance)
        with pytest.raises(TypeError, match="state of state_dict must be a mapping"):
            there.load_state_dict(there.state_dict() | {"state": 3})


def parameters_can_be_replaced(put: Put, donate: bool) -> None:
    there, here = pair(put, donate)
    there.step(put(draw(1)))
    here.step(draw(1))
    there.replace_params(jax.tree.map(lambda p: jnp.clip(p, -1, 1), there.params))
    here.replace_params(jax.tree.map(lambda p: jnp.clip(p, -1, 1), here.params))
    assert_close(there.params, here.params)
    assert_close(there.step(put(draw(2))), here.step(draw(2)))
    with pytest.raises(ValueError, match=r"parameter 'w' must keep its shape \(40, 30\) and dtype"):
        there.replace_params(put({**draw(0), "w": np.ones(3, np.float32)}))


def parameters_that_are_lost_are_missed(put: Put, donate: bool) -> None:
    there, here = pair(put, donate)
    doubled = jax.jit(lambda tree: jax.tree.map(lambda p: 2 * p, tree), donate_argnums=0)(there.params)
    expected = bits(doubled)
    if donate:
        with pytest.raises(ValueError, match=r"parameter 'b\.0' was deleted: with donate=True"):
            there.step(put(draw(1)))
        there.replace_params(put(draw(0)))
    assert_close(there.step(put(draw(1))), here.step(draw(1)))
    assert bits(doubled) == expected


def what_does_not_fit_is_refused(put: Put, donate: bool) -> None:
    optimizer, good = LARS(put(draw(0)), donate=donate, **OPTIONS), put(draw(1))
    params, before = optimizer.params, bits(optimizer.params)
    deleted = put(draw(1))
    deleted["w"].delete()
    wrong: list[tuple[Any, type[Exception], str]] = [
        ({**good, "w": put(np.ones(3, np.float32))}, ValueError, "the gradient of 'w' must have the parameter's shape"),
        ({"w": good["w"]}, ValueError, "grads must have the structure of the parameters"),
        ({**good, "w": 1.0}, TypeError, "the gradient of 'w' must be an array"),
        ({**good, "w": put(np.ones((40, 30), np.int32))}, TypeError, "the gradient of 'w' must be of one of the real"),
        ({**good, "w": draw(1)["w"]}, TypeError, "the gradient of 'w' must be an array of JAX on .*; got one of NumPy"),
        (deleted, ValueError, "the gradient of 'w' was deleted"),
    ]
    for grads, kind, message in wrong:
        with pytest.raises(kind, match=message):
            optimizer.step(grads)
        assert bits(params) == before and optimizer.steps == 0
    with pytest.raises(TypeError, match=r"under jit use lars_jax\.lars"):
        jax.jit(optimizer.step)(good)
    optimizer.param_groups[0]["lr"] = -1.0
    with pytest.raises(ValueError, match="Invalid learning rate"):
        optimizer.step(good)
    assert bits(optimizer.params) == before, "a step that is refused leaves the parameters"


BODIES = [
    steps_are_those_of_a_cpu,
    all_types_are_stepped,
    nothing_is_copied,
    what_anybody_holds_is_not_written_to,
    gradients_may_be_the_parameters,
    some_have_no_gradient,
    numbers_on_the_device_are_read_there,
    what_is_not_finite_is_reported_later,
    states_come_and_go,
    parameters_can_be_replaced,
    parameters_that_are_lost_are_missed,
    what_does_not_fit_is_refused,
]
