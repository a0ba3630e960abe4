"""What the eager optimizer refuses before anything is changed, how it goes on, and messages that people can read."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lars_jax
from lars_array import NonFiniteError
from lars_jax import LARS, lars
from lars_jax._buffers import _layout

OPTIONS: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "trust_coefficient": 0.1}


@pytest.fixture(params=[False, True], ids=["kept", "donated"])
def donate(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def draw(seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {"w": jnp.asarray(rng.normal(size=(5, 3)), "float32"), "b": jnp.asarray(rng.normal(size=7), "float32")}


def bits(tree: Any) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def started(donate: bool) -> LARS:
    optimizer = LARS(draw(0), donate=donate, **OPTIONS)
    optimizer.step(draw(1))
    return optimizer


# --------------------------------------------------------------------------------------------------- deleted memory


def given_away(tree: Any) -> None:
    jax.jit(lambda x: jax.tree.map(lambda p: 2 * p, x), donate_argnums=0)(tree)


def deleted(tree: Any) -> None:
    for leaf in jax.tree.leaves(tree):
        leaf.delete()


TAKEN: dict[str, Callable[[Any], Any]] = {
    "one deleted": lambda tree: tree["w"].delete(),
    "all deleted": deleted,
    "donated": given_away,
    "an alias deleted": lambda tree: deleted(jax.tree.map(lambda x: x.addressable_data(0), tree)),
    "an alias donated": lambda tree: given_away(jax.tree.map(lambda x: x.addressable_data(0), tree)),
    "a second optimizer": lambda tree: LARS(tree, donate=True, **OPTIONS),
    "a second optimizer's step": lambda tree: LARS(tree, donate=True, **OPTIONS).step(draw(9)),
}
CALLS: dict[str, Callable[[LARS], Any]] = {
    "step": lambda optimizer: optimizer.step(draw(2)),
    "step with arrays of NumPy": lambda optimizer: optimizer.step(jax.tree.map(np.asarray, draw(2))),
    "step without gradients": lambda optimizer: optimizer.step({"w": None, "b": None}),
    "step with found_inf": lambda optimizer: optimizer.step(draw(2), found_inf=1.0),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": pickle.dumps,
}


@pytest.mark.parametrize("how", TAKEN)
@pytest.mark.parametrize("call", CALLS)
def test_parameters_that_were_taken_are_missed_and_can_be_replaced(how: str, call: str) -> None:
    optimizer, plain = started(donate=True), started(donate=False)
    there = jax.tree.map(np.array, optimizer.params)
    before = repr(optimizer.state_dict())
    TAKEN[how](optimizer.params)
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"parameter '[wb]' was deleted: with donate=True .* give replace_params others"
        ):
            CALLS[call](optimizer)
        assert repr(optimizer.state_dict()) == before
    optimizer.replace_params(there)
    assert bits(optimizer.step(draw(2))) == bits(plain.step(draw(2)))
    assert bits(optimizer.step(draw(3))) == bits(plain.step(draw(3)))


def test_all_arrays_of_jax_may_be_deleted(donate: bool) -> None:
    """In a process of its own, since other tests keep arrays."""
    script = f"""
import jax, jax.numpy as jnp, numpy as np
from lars_jax import LARS
grads = lambda: {{"w": jnp.full(3, 0.5)}}
optimizer = LARS({{"w": jnp.ones(3)}}, lr=0.1, momentum=0.9, donate={donate})
optimizer.step(grads())
there = jax.tree.map(np.array, optimizer.params)
for x in jax.live_arrays():
    x.delete()
try:
    optimizer.step(grads())
except ValueError as error:
    assert "parameter 'w' was deleted" in str(error), error
else:
    raise AssertionError("freed memory was stepped")
optimizer.replace_params(there)
np.testing.assert_allclose(optimizer.step(grads())["w"], 1 - 0.05 - 0.095, rtol=1e-6)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_deleted_arrays_are_not_taken(donate: bool) -> None:
    for i, how in enumerate(("given", "gradients", "replaced", "a learning rate", "found_inf")):
        optimizer = started(donate)
        before = bits(optimizer.params), repr(optimizer.state_dict())
        bad, number = draw(2), jnp.asarray(0.1)
        bad["w"].delete()
        number.delete()
        with pytest.raises(ValueError, match=r"(parameter 'w'|the gradient of 'w'|lr|found_inf) was deleted"):
            if how == "given":
                LARS(bad, donate=donate, **OPTIONS)
            elif how == "gradients":
                optimizer.step(bad)
            elif how == "replaced":
                optimizer.replace_params(bad)
            elif how == "found_inf":
                optimizer.step(draw(2), found_inf=number)
            else:
                optimizer.param_groups[0]["lr"] = number
                optimizer.step(draw(2))
        optimizer.param_groups[0]["lr"] = 0.1
        assert (bits(optimizer.params), repr(optimizer.state_dict())) == before, i
        optimizer.step(draw(3))


def test_the_layout_of_a_deleted_array_is_not_read() -> None:
    """JAX crashes where it is asked for."""
    gone = jnp.ones(3)
    gone.delete()
    assert _layout(gone) is None


# ------------------------------------------------------------------------------------------------- traces and meshes


def step_inside(transform: Callable[[Callable[[], Any]], Any]) -> Callable[[LARS], Any]:
    def call(optimizer: LARS) -> Any:
        grads = draw(2)  # closed over
        return transform(lambda: optimizer.step(grads))

    return call


TRACES: dict[str, Callable[[Callable[[], Any]], Any]] = {
    "jit": lambda f: jax.jit(f)(),
    "eval_shape": jax.eval_shape,
    "make_jaxpr": lambda f: jax.make_jaxpr(f)(),
    "scan": lambda f: jax.lax.scan(lambda carry, _: (carry, f()), 0.0, None, length=2),
    "cond": lambda f: jax.jit(lambda x: jax.lax.cond(x > 0, lambda: f()["w"], lambda: jnp.ones((5, 3))))(1.0),
    "remat of grad": lambda f: jax.jit(jax.grad(jax.checkpoint(lambda x: x * f()["w"].sum())))(1.0),
    "nested": lambda f: jax.jit(lambda: jax.vmap(lambda x: f())(jnp.ones(2)))(),
}


@pytest.mark.parametrize("trace", TRACES)
@pytest.mark.parametrize("call", ["step", "replace_params", "LARS", "deepcopy"])
def test_inside_a_trace_nothing_is_done(trace: str, call: str, donate: bool) -> None:
    optimizer, plain, other = started(donate), started(donate), draw(5)
    calls: dict[str, Callable[[], Any]] = {
        "step": step_inside(lambda f: f)(optimizer),
        "replace_params": lambda: optimizer.replace_params(other) or optimizer.params,
        "LARS": lambda: LARS(other, donate=donate, **OPTIONS).params,
        "deepcopy": lambda: copy.deepcopy(optimizer).params,
    }
    before = bits(optimizer.params), repr(optimizer.state_dict())
    with pytest.raises(TypeError, match=r"must be called outside of functions that JAX traces.* use lars_jax\.lars"):
        TRACES[trace](calls[call])
    assert (bits(optimizer.params), repr(optimizer.state_dict())) == before
    assert not any(x.is_deleted() for x in other.values())
    assert bits(optimizer.step(draw(2))) == bits(plain.step(draw(2)))


@pytest.mark.skipif(not hasattr(jax, "set_mesh"), reason="this JAX has no jax.set_mesh")
def test_a_mesh_of_several_devices() -> None:
    script = Path(__file__).parents[2] / "support" / "meshes.py"
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, env=os.environ | flags)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found["eager"] == {
        str(donate): {"refused": 3, "unchanged": True, "went on": True} for donate in (False, True)
    }
    assert len(found["explicit"]) == 18
    for name, distance in found["explicit"].items():
        assert distance <= 1e-6, f"{name}: off by {distance}"


# ------------------------------------------------------------------------------------------- copies and traced numbers


def test_a_copy_steps_memory_of_its_own(donate: bool) -> None:
    optimizer, plain = started(donate), started(donate)
    other = copy.copy(optimizer)
    before = bits(optimizer.params)
    ours = bits(other.step(draw(2)))
    assert bits(optimizer.params) == before and optimizer.steps == 1
    assert bits(optimizer.step(draw(2))) == bits(plain.step(draw(2))) == ours
    other.param_groups[0]["lr"] = 0.0
    assert optimizer.param_groups[0]["lr"] == 0.1


NUMBERS = ("lr", "momentum", "weight_decay", "trust_coefficient", "eps", "rescale_grad", "max_grad_norm", "dampening")


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("how", ["given", "schedule", "set", "set to a schedule"])
def test_traced_numbers_are_refused(name: str, how: str) -> None:
    """Their derivatives would be 0."""
    optimizer = started(donate=False)
    before = bits(optimizer.params), repr(optimizer.state_dict())

    def loss(x: Any) -> Any:
        value = (lambda step: 2 * x) if "schedule" in how else x
        if "set" not in how:
            return LARS(draw(0), **OPTIONS | {name: value}).step(draw(1))["w"].sum()
        old, optimizer.param_groups[0][name] = optimizer.param_groups[0][name], value
        try:
            return optimizer.step(draw(2))["w"].sum()
        finally:
            optimizer.param_groups[0][name] = old

    for transform in (jax.grad, jax.jit, lambda f: jax.jit(jax.grad(f)), lambda f: lambda x: jax.jvp(f, (x,), (x,))):
        with pytest.raises(TypeError, match=rf"{name} must have a value, which a traced array has not|JAX traces"):
            transform(loss)(0.5)
    assert (bits(optimizer.params), repr(optimizer.state_dict())) == before


def test_traced_masks_and_found_inf_are_refused() -> None:
    optimizer = started(donate=False)
    with pytest.raises(TypeError, match="weight_decay_mask must have a value"):
        jax.vmap(lambda flag: LARS(draw(0), **OPTIONS, weight_decay_mask={"w": flag, "b": True}).params)(
            jnp.ones(2, bool)
        )
    with pytest.raises(TypeError, match="found_inf must have a value"):
        jax.vmap(lambda flag: optimizer.step(draw(0), found_inf=flag))(jnp.ones(2, bool))
    assert optimizer.steps == 1


# ------------------------------------------------------------------------------------------------------------ messages


PARAMS = {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}
BIG = {f"layer{i}": {"w": jnp.ones((50, 50)), "b": jnp.ones(50)} for i in range(200)}
SOLVER, STATE = lars(0.1), lars(0.1).init(PARAMS)


class Tensor:
    """An object of torch, without torch."""


Tensor.__module__ = "torch"


def of(**options: Any) -> Any:
    return lars(0.1, **options).update(PARAMS, STATE, PARAMS)


def big_state() -> Any:
    return LARS(BIG, lr=0.1).state_dict()


@pytest.mark.parametrize(
    ("call", "said"),
    [
        # lars
        (lambda: lars(0.1, 1e-4), "takes 1 positional argument but 2 were given"),  # type: ignore[misc]
        (lambda: lars(BIG), r"learning_rate must be a number, an array of shape \(\) or a schedule; got \{'layer0'"),
        (lambda: lars("0.1"), "learning_rate must be a number, .*; got '0.1'"),
        (lambda: lars(jnp.ones(10000)), r"learning_rate must be a number, .*; got ArrayImpl of shape \("),
        (lambda: lars(None), "learning_rate must be a number, .*; got None"),
        (lambda: lars(lambda step: BIG).update(PARAMS, STATE, PARAMS), r"learning_rate must be a number, .*; got \{"),
        (lambda: of(weight_decay_mask=BIG), "weight_decay_mask must have the .*; it has nothing for 'b' and no"),
        (
            lambda: of(weight_decay_mask=PARAMS),
            r"weight_decay_mask must hold True or False; got ArrayImpl of shape \(2,\) .* for 'b'",
        ),
        (lambda: of(weight_decay_mask="bias"), "weight_decay_mask must hold True or False; got 'bias' for 'b'"),
        (lambda: of(trust_ratio_mask=lambda p: BIG), "trust_ratio_mask must have the structure"),
        (lambda: of(layer_axes=BIG), "layer_axes must have the structure"),
        (lambda: of(axis_name=BIG), "axis_name must have the structure"),
        (
            lambda: SOLVER.init(iter([jnp.ones(2)])),
            "params must be a tree of arrays, .* got the iterator <list_iterator",
        ),
        (lambda: SOLVER.init({"w": Tensor()}), r"parameter 'w' must be an array, .* belong in lars_torch\.LARS; got"),
        (lambda: SOLVER.init({"w": jnp.tanh}), "parameter 'w' must be an array, and None where nothing is trained"),
        (lambda: SOLVER.init({"w": "w" * 10000}), "parameter 'w' must be an array; got 'www"),
        (lambda: SOLVER.init({"w": 3}), "parameter 'w' must be an array; got 3"),
        (lambda: SOLVER.update(PARAMS, PARAMS, STATE), r"in update\(grads, state, params\); got it as the third"),
        (lambda: SOLVER.update(STATE, PARAMS, PARAMS), r"in update\(grads, state, params\); got it as the first"),
        (lambda: SOLVER.update(PARAMS, BIG, PARAMS), r"in update\(grads, state, params\); got \{'layer0'"),
        (lambda: SOLVER.update(PARAMS, optax.sgd(0.1, 0.9).init(BIG), PARAMS), r"params\); got \(TraceState\("),
        (lambda: SOLVER.update(PARAMS, STATE), r"update of lars needs params: update\(grads, state, params\)"),
        (lambda: SOLVER.update(BIG, STATE, PARAMS), "updates must have the structure .* it has nothing for 'b' and no"),
        (
            lambda: SOLVER.update(iter(BIG), STATE, PARAMS),
            "updates must be a tree of arrays, .* got the iterator <dict_keyiterator",
        ),
        (lambda: SOLVER.update(None, STATE, PARAMS), "updates must have the structure of the parameters; got None"),
        (lambda: SOLVER.update(BIG, STATE, BIG), "the trace of state must have the structure"),
        # LARS
        (lambda: LARS(0.1, BIG), r"params must come before lr; got 0\.1 and \{'layer0'.* in the other order"),
        (lambda: LARS(optax.constant_schedule(0.1), BIG), "params must come before lr; got <function"),
        (lambda: LARS(PARAMS, optax.sgd(0.1)), "lr must be a number, .*; got GradientTransformation"),
        (lambda: LARS(iter(BIG), 0.1), "params must be a tree of arrays, .* got the iterator <dict_keyiterator"),
        (lambda: LARS(map(jnp.ones, []), 0.1), "params must be a tree of arrays, .* got the iterator <map"),
        (lambda: LARS({"w": Tensor(), "b": jnp.ones(2)}, 0.1), r"parameter 'w' must be an array, .* lars_torch\.LARS"),
        (lambda: LARS([], 0.1), r"optimizer got an empty parameter list: .*; got \[\]"),
        (lambda: LARS({"w": "w" * 10000}, 0.1), "optimizer got an empty parameter list: .*; got 'www"),
        (lambda: LARS(PARAMS, 0.1, weight_decay_mask=BIG), "weight_decay_mask must have the structure"),
        (lambda: LARS(PARAMS, 0.1).step(BIG), "grads must have the structure .* it has nothing for 'b' and no"),
        (
            lambda: LARS(PARAMS, 0.1).step(iter(BIG)),
            "grads must be a tree of arrays, .* got the iterator <dict_keyiterator",
        ),
        (lambda: LARS(PARAMS, 0.1).step(None), "grads must have the structure of the parameters; got None"),
        (
            lambda: LARS(PARAMS, 0.1).step({"w": Tensor(), "b": None}),
            "the gradient of 'w' must be an array; got <torch",
        ),
        (lambda: LARS(PARAMS, 0.1).replace_params(BIG), "params must have the structure"),
        (lambda: LARS(PARAMS, 0.1).load_state_dict(big_state()), "parameters named as these are; it has an unknown"),
        (lambda: LARS(PARAMS, 0.1).load_state_dict(BIG), r"must be what state_dict\(\) returned; got \{'layer0'"),
        (lambda: lars_jax.from_state_dict(big_state(), PARAMS), "parameters named as these are; it has an unknown"),
        (lambda: lars_jax.to_state_dict(STATE, PARAMS, BIG), "learning_rate must be a number"),
    ],
)
def test_messages_are_short_and_say_what_was_given(call: Callable[[], Any], said: str) -> None:
    with pytest.raises((TypeError, ValueError), match=said) as caught:
        call()
    assert len(str(caught.value)) <= 500


def test_a_representation_is_short() -> None:
    text = repr(LARS(PARAMS, 0.1, trust_bounds=(0.0, 1.0), rule=lambda S, hyper, xp: BIG))
    assert len(text) < 500 and "2 parameters, lr=0.1" in text


def test_messages_of_a_step_name_it(donate: bool) -> None:
    optimizer = LARS(draw(0), lr=lambda step: 0.1 - step, donate=donate, weight_decay_mask={"w": True, "b": False})
    optimizer.step(draw(1))
    with pytest.raises(ValueError, match=r"Invalid learning rate: -0\.9 \(parameter group 0, step 1\)"):
        optimizer.step(draw(1))
    with pytest.raises(AttributeError, match=r"set lr by `for group in optimizer\.param_groups"):
        optimizer.lr = 0.2
    optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 0.1
    with pytest.raises(NonFiniteError, match=r"the gradient of 'b' .* \(step 1\)"):
        optimizer.step({"w": None, "b": jnp.full(7, jnp.inf)})


def test_a_refused_found_inf_keeps_no_gradients(donate: bool) -> None:
    optimizer, gone = started(donate), jnp.asarray(0.0)
    gone.delete()
    with pytest.raises(ValueError, match="found_inf was deleted"):
        optimizer.step(draw(2), found_inf=gone)
    assert optimizer._memory._used == []


def test_a_rejected_step_still_says_so(donate: bool) -> None:
    optimizer = started(donate)
    with pytest.raises(NonFiniteError, match="the gradient of 'w' has 15 non-finite entries of 15"):
        optimizer.step({"w": jnp.full((5, 3), jnp.nan), "b": None})
