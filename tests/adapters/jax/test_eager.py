"""`lars_jax.LARS`: zero copies, no array that anybody sees is written to, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import tracemalloc
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lars_array
import lars_jax
from lars_array import NonFiniteError
from lars_array._stepper import StepProgram
from lars_array.state.store import allocate_buffers
from lars_jax import LARS, lars

OPTIONS: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "trust_coefficient": 0.1}


@pytest.fixture(autouse=True)
def strict() -> Iterator[None]:
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture(params=[False, True], ids=["kept", "donated"])
def donate(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def draw(seed: int, dtype: Any = "float32") -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {"w": jnp.asarray(rng.normal(size=(40, 30)), dtype), "b": [jnp.asarray(rng.normal(size=7), dtype)]}


def places(tree: Any) -> list[int]:
    return [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree)]


def bits(tree: Any) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def assert_close(ours: Any, theirs: Any, tolerance: float) -> None:
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        a, b = (np.asarray(x, np.complex128) for x in (a, b))
        assert np.max(np.abs(a - b)) <= tolerance * np.max(np.abs(b)), f"off by {np.max(np.abs(a - b))}"


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "complex64", "float64"])
def test_it_is_the_transformation(donate: bool, dtype: str) -> None:
    with jax.enable_x64(dtype == "float64"):
        solver = lars(0.1, momentum=0.9, weight_decay=0.1, trust_coefficient=0.1)
        optimizer = LARS(draw(0, dtype), donate=donate, **OPTIONS)
        theirs, state = draw(0, dtype), solver.init(draw(0, dtype))
        for t in range(5):
            ours = optimizer.step(draw(1 + t, dtype))
            updates, state = solver.update(draw(1 + t, dtype), state, theirs)
            theirs = jax.tree.map(jnp.add, theirs, updates)
            assert jax.tree.map(lambda x: x.dtype, ours) == jax.tree.map(lambda x: x.dtype, theirs)
        allowed = {"float32": 1e-5, "complex64": 1e-5, "float64": 1e-12, "float16": 4e-3, "bfloat16": 3e-2}
        assert_close(ours, theirs, allowed[dtype])
        assert optimizer.steps == 5 and optimizer.norms().keys() == {"w", "b.0"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nothing_is_copied_on_the_way_in_or_out(donate: bool, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = LARS(draw(0, dtype), donate=donate, **OPTIONS)
    seen: list[list[int]] = []
    run = StepProgram.run

    def spied(self: Any, state: Any, grads: Any, *others: Any) -> Any:
        assert grads.addresses.tolist() == [g.ctypes.data for g in grads.arrays]
        seen.append(grads.addresses.tolist())
        return run(self, state, grads, *others)

    monkeypatch.setattr(StepProgram, "run", spied)
    used = set()
    for t in range(6):
        grads = draw(1 + t, dtype)
        params = optimizer.step(grads)
        assert seen[-1] == places(grads)
        used.add(tuple(places(params)))
        mine = [p.ctypes.data for p in optimizer._memory.arrays]
        assert places(params) == mine if donate else not set(places(params)) & set(mine)
        assert places(params) == places(optimizer.params)
        assert all(place % 64 == 0 for place in places(params))
    assert len(used) == 1 or not donate, "a step in place stays there"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_anybody_holds_is_never_written_to(dtype: str) -> None:
    optimizer = LARS(draw(0, dtype), **OPTIONS)
    history = [optimizer.params]
    snapshots = [bits(optimizer.params)]
    views = []
    for t in range(5):
        history.append(optimizer.step(draw(1 + t, dtype)))
        snapshots.append(bits(history[-1]))
        views.append(np.asarray(optimizer.step(draw(11 + t, dtype))["w"]))
        kept = views[-1].tobytes()
        optimizer.step(draw(21 + t, dtype))
        optimizer.step(draw(31 + t, dtype))
        assert views[-1].tobytes() == kept
    assert [bits(params) for params in history] == snapshots
    assert len({place for params in history for place in places(params)}) == 2 * len(history)


def test_a_computation_that_still_reads_is_waited_for_or_left_its_memory(donate: bool) -> None:
    p = {"w": jnp.ones(1 << 20)}
    slow = jax.jit(lambda x: jax.lax.fori_loop(0, 30, lambda _, y: jnp.sin(y) + x, x).sum())
    expected = float(slow(p["w"]))
    optimizer = LARS(p, donate=donate, **OPTIONS)
    g = {"w": jnp.full(1 << 20, 0.5)}
    going_on = slow(optimizer.params["w"])
    optimizer.step(g)
    optimizer.step(g)
    assert float(going_on) == expected


def test_gradients_that_are_still_computed_are_waited_for(donate: bool) -> None:
    p, g = {"w": jnp.ones(1 << 20)}, {"w": jnp.full(1 << 20, 0.5)}
    slow = jax.jit(lambda x: jax.lax.fori_loop(0, 30, lambda _, y: jnp.sin(y) + x, x))
    late, there = LARS(p, **OPTIONS), LARS({"w": jnp.ones(1 << 20)}, donate=donate, **OPTIONS)
    known = {"w": jax.block_until_ready(slow(g["w"]))}
    assert bits(there.step({"w": slow(g["w"])})) == bits(late.step(known))


def test_gradients_of_another_type_may_lie_where_others_did(donate: bool) -> None:
    (memory,) = allocate_buffers([np.ones(8, np.float32)])  # at an address that JAX takes without copying
    optimizer = LARS({"w": jnp.ones(8)}, lr=1.0, donate=donate)
    before = optimizer.step({"w": jnp.from_dlpack(memory, copy=False)})
    memory.view(np.float16)[:8] = 1
    half = jnp.from_dlpack(memory.view(np.float16)[:8], copy=False)
    assert half.unsafe_buffer_pointer() == memory.ctypes.data
    before = np.array(before["w"])
    np.testing.assert_array_equal(optimizer.step({"w": half})["w"], before - 1)


def test_what_is_donated_is_deleted_and_can_not_be_used() -> None:
    given = draw(0)
    optimizer = LARS(given, donate=True, **OPTIONS)
    for t in range(2):
        old, new = (given, optimizer.params) if t == 0 else (optimizer.params, optimizer.step(draw(1)))
        assert all(x.is_deleted() for x in jax.tree.leaves(old))
        assert not any(x.is_deleted() for x in jax.tree.leaves(new))
        with pytest.raises(RuntimeError, match="deleted"):
            old["w"] + 1
    kept = np.asarray(optimizer.params["w"])
    before = kept.tobytes()
    group, old = optimizer.param_groups[0], optimizer.params
    optimizer.step(draw(2))
    assert kept.tobytes() == before, "a NumPy view keeps what it sees"
    assert old["w"].is_deleted()
    group["lr"] = 0.0
    unchanged = bits(optimizer.params)
    assert bits(optimizer.step(draw(3))) == unchanged
    plain = LARS(draw(0), **OPTIONS)
    for t in (1, 2):
        plain.step(draw(t))
    assert unchanged == bits(plain.params)


def test_the_users_arrays_stay_as_they_were() -> None:
    given, grads = draw(0), draw(1)
    before = bits((given, grads))
    optimizer = LARS(given, **OPTIONS)
    for _ in range(3):
        optimizer.step(grads)
    assert bits((given, grads)) == before
    optimizer.step(optimizer.params)  # gradients that are the parameters
    donating = LARS(draw(0), donate=True, **OPTIONS)
    plain = LARS(draw(0), **OPTIONS)
    assert bits(donating.step(donating.params)) == bits(plain.step(plain.params))


def test_steps_need_no_memory_of_their_own(donate: bool) -> None:
    params = {"w": jnp.ones((1000, 1000))}
    optimizer, grads = LARS(params, donate=donate, **OPTIONS), {"w": jnp.full((1000, 1000), 0.5)}
    params = optimizer.params
    for _ in range(4):
        params = optimizer.step(grads)
    tracemalloc.start()
    for _ in range(3):
        params = optimizer.step(grads)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 400_000, f"{peak} bytes for 4 MB of parameters"
    assert params["w"].shape == (1000, 1000)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    kernel: Any
    count: Any
    activation: Any = dataclasses.field(metadata={"static": True}, default=jnp.tanh)


def test_trees_of_many_kinds_come_back_as_they_were(donate: bool) -> None:
    def tree(seed: int) -> Any:
        w = draw(seed)["w"]
        several = (w[0], None, "name", [np.ones(3, np.float32)])
        return {"a": Layer(w, jnp.arange(3)), "b": several, "key": jax.random.key(0)}

    optimizer = LARS(tree(0), donate=donate, **OPTIONS)
    after = optimizer.step(tree(1))
    assert jax.tree.structure(after) == jax.tree.structure(tree(0))
    assert isinstance(after["a"], Layer) and after["b"][2] == "name" and after["a"].count.tolist() == [0, 1, 2]
    assert optimizer.norms().keys() == {"a.kernel", "b.0", "b.3.0"}
    assert isinstance(after["b"][3][0], jax.Array)
    alone = LARS(jnp.ones(3), **OPTIONS)
    assert alone.step(jnp.ones(3)).shape == (3,) and list(alone.norms()) == ["0"]
    odd = LARS({"empty": jnp.zeros((0, 3)), "scalar": jnp.ones(())}, donate=donate, **OPTIONS)
    assert odd.step({"empty": jnp.zeros((0, 3)), "scalar": jnp.ones(())})["scalar"] < 1
    equinox = pytest.importorskip("equinox")
    model = equinox.nn.MLP(2, 2, 4, 1, key=jax.random.key(0))
    trained = LARS(model, donate=False, **OPTIONS).step(equinox.filter_grad(lambda m: m(jnp.ones(2)).sum())(model))
    assert isinstance(trained, equinox.nn.MLP) and trained(jnp.ones(2)).shape == (2,)


def test_masks_layers_and_groups() -> None:
    params = {"w": jnp.ones((3, 4)), "b": jnp.ones(4)}
    masks: dict[str, Any] = {"weight_decay_mask": lambda p: jax.tree.map(lambda x: x.ndim > 1, p)}
    masks |= {"trust_ratio_mask": {"w": True, "b": False}, "layer_axes": {"w": 1, "b": 0}}
    optimizer, solver = (
        LARS(params, **OPTIONS, **masks),
        lars(0.1, momentum=0.9, weight_decay=0.1, trust_coefficient=0.1, **masks),
    )
    grads = {"w": jnp.arange(12.0).reshape(3, 4) + 1, "b": jnp.ones(4)}
    updates, _ = solver.update(grads, solver.init(params), params)
    assert_close(optimizer.step(grads), jax.tree.map(jnp.add, params, updates), 1e-6)
    assert optimizer.trust_ratios()["b"] == 1.0 and "w[2]" in optimizer.norms()
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.1]


def test_none_schedules_and_skipped_steps(donate: bool) -> None:
    optimizer = LARS(draw(0), lr=lambda step: 0.5 * (step < 1), donate=donate, nonfinite="skip")
    before = bits(optimizer.params)
    assert bits(optimizer.step({"w": None, "b": [jnp.ones(7)]}))[1] == before[1]
    after = bits(optimizer.params)
    assert bits(optimizer.step(draw(1))) == after  # lr is 0 now
    bad = draw(2)
    bad["w"] = bad["w"].at[0, 0].set(jnp.nan)
    assert bits(optimizer.step(bad)) == after and optimizer.skipped_steps == 1
    assert bits(optimizer.step(draw(1), found_inf=jnp.asarray(True))) == after and optimizer.skipped_steps == 2


def test_copies_and_saved_states_go_on_alike(donate: bool) -> None:
    optimizer = LARS(draw(0), donate=donate, **OPTIONS)
    optimizer.step(draw(1))
    others = [copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer)), LARS(optimizer.params, **OPTIONS)]
    others[2].load_state_dict(optimizer.state_dict())
    expected = bits(optimizer.step(draw(2)))
    for other in others:
        assert bits(other.step(draw(2))) == expected


def test_parameters_can_be_replaced(donate: bool) -> None:
    optimizer = LARS(draw(0), donate=donate, **OPTIONS)
    clipped = jax.tree.map(lambda p: jnp.clip(p, -1, 1), optimizer.params)
    optimizer.replace_params(clipped)
    assert bits(optimizer.params) == bits(clipped)
    assert bits(optimizer.step(draw(1))) == bits(LARS(clipped, **OPTIONS).step(draw(1)))
    with pytest.raises(ValueError, match=r"parameter 'w' must keep its shape \(40, 30\) and dtype"):
        optimizer.replace_params({"w": jnp.ones(3), "b": [jnp.ones(7)]})


def test_numbers_of_numpy_and_leaves_that_are_not_trained_are_replaced_too(donate: bool) -> None:
    tree = {"scale": np.float32(2.0), "count": 3, "key": jnp.zeros(2, jnp.uint32), "w": np.ones(2, np.float32)}
    optimizer = LARS(tree, lr=0.5, donate=donate)
    optimizer.replace_params(tree | {"scale": np.float32(3.0), "count": 4, "key": jnp.ones(2, jnp.uint32)})
    after = copy.deepcopy(optimizer).step({"scale": np.float32(2.0), "count": None, "key": None, "w": None})
    assert float(after["scale"]) == 2.0 and after["count"] == 4 and after["key"].tolist() == [1, 1]
    with pytest.raises(ValueError, match="parameter 'scale' must keep its shape"):
        optimizer.replace_params(tree | {"scale": jnp.ones(2), "count": 5})
    assert optimizer.step({"scale": None, "count": None, "key": None, "w": None})["count"] == 4


def test_tracers_are_sent_to_the_transformation() -> None:
    optimizer = LARS(draw(0), **OPTIONS)
    before = bits(optimizer.params)
    for call in (optimizer.step, lambda params: LARS(params, **OPTIONS), optimizer.replace_params):
        with pytest.raises(TypeError, match=r"under jit use lars_jax\.lars"):
            jax.jit(call)(draw(1))
    assert bits(optimizer.params) == before and optimizer.steps == 0


def test_a_refused_step_changes_nothing(donate: bool) -> None:
    optimizer = LARS(draw(0), donate=donate, **OPTIONS)
    optimizer.step(draw(1))
    params, before = optimizer.params, bits(optimizer.params)
    wrong = [
        ({"w": jnp.ones(3), "b": [jnp.ones(7)]}, ValueError, "the gradient of 'w' must have the parameter's shape"),
        ({"w": jnp.ones((40, 30))}, ValueError, "grads must have the structure of the parameters"),
        ({"w": 1.0, "b": [jnp.ones(7)]}, TypeError, "the gradient of 'w' must be an array"),
        ({"w": jnp.ones((40, 30), int), "b": [jnp.ones(7)]}, TypeError, "the gradient of 'w' must"),
    ]
    for grads, kind, message in wrong:
        with pytest.raises(kind, match=message):
            optimizer.step(grads)
        assert bits(params) == before and optimizer.steps == 1
    bad = draw(2)
    bad["w"] = bad["w"].at[3, 4].set(jnp.inf)
    with pytest.raises(NonFiniteError, match="the gradient of 'w' has 1 non-finite entries of 1200"):
        optimizer.step(bad)
    assert bits(optimizer.params) == before
    assert bits(optimizer.step(draw(3))) == bits(_trained_without_the_mishap())
    deleted = draw(4)
    deleted["w"].delete()
    with pytest.raises(ValueError, match="the gradient of 'w' was deleted"):
        optimizer.step(deleted)


def _trained_without_the_mishap() -> Any:
    optimizer = LARS(draw(0), **OPTIONS)
    optimizer.step(draw(1))
    return optimizer.step(draw(3))


@pytest.mark.parametrize(
    ("params", "options", "kind", "message"),
    [
        ({"w": jnp.ones(2)}, {"lr": -1.0}, ValueError, "Invalid learning rate: -1.0"),
        ({"n": jnp.arange(2)}, {"lr": 0.1}, ValueError, "optimizer got an empty parameter list"),
        ({"w": np.ones(2)}, {"lr": 0.1}, TypeError, "see jax_enable_x64"),
        ({"w": jnp.ones(2)}, {"lr": 0.1, "weight_decay_mask": 2}, TypeError, "weight_decay_mask must hold True"),
        ({"w": jnp.ones(2)}, {"lr": 0.1, "rule": "no"}, ValueError, "rule must be one of"),
    ],
)
def test_refusals(params: Any, options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        LARS(params, donate=True, **options)
    assert not any(isinstance(p, jax.Array) and p.is_deleted() for p in jax.tree.leaves(params))


def test_one_file_from_numpy_to_jax_and_back() -> None:
    """Three steps in NumPy, three eager ones, three traced ones, three in NumPy: as twelve in NumPy."""

    def numpy(tree: Any) -> dict[str, Any]:
        return {"w": np.array(tree["w"]), "b.0": np.array(tree["b"][0])}

    def gradient(t: int) -> Any:
        return draw(100 + t)

    whole, part = numpy(draw(0)), numpy(draw(0))
    reference, first = lars_array.LARS(whole, **OPTIONS), lars_array.LARS(part, **OPTIONS)
    for t in range(12):
        reference.step(numpy(gradient(t)))
    for t in range(3):
        first.step(numpy(gradient(t)))
    file = pickle.dumps((part, first.state_dict()))

    part, saved = pickle.loads(file)
    eager = LARS({"w": jnp.asarray(part["w"]), "b": [jnp.asarray(part["b.0"])]}, **OPTIONS)
    eager.load_state_dict(saved)
    for t in range(3, 6):
        params = eager.step(gradient(t))
    state = lars_jax.from_state_dict(eager.state_dict(), params)
    assert int(state.count) == 6
    arguments = {"learning_rate": 0.1, "momentum": 0.9, "weight_decay": 0.1, "trust_coefficient": 0.1}
    solver = lars(**arguments)
    for t in range(6, 9):
        updates, state = jax.jit(solver.update)(gradient(t), state, params)
        params = jax.tree.map(jnp.add, params, updates)
    saved = lars_jax.to_state_dict((state, ()), params, **arguments)
    part = numpy(params)
    last = lars_array.LARS({"b.0": part["b.0"], "w": part["w"]}, lr=0.0)
    last.load_state_dict(saved)
    assert last.steps == 9
    for t in range(9, 12):
        last.step(numpy(gradient(t)))
    for name, p in part.items():
        np.testing.assert_allclose(p, whole[name], rtol=1e-5, atol=1e-6)


def test_states_that_do_not_fit() -> None:
    params = draw(0)
    saved = LARS(params, **OPTIONS).state_dict()
    with pytest.raises(ValueError, match="state_dict must be of parameters named"):
        lars_jax.from_state_dict(saved, {"w": params["w"]})
    with pytest.raises(TypeError, match="state_dict must be what"):
        lars_jax.from_state_dict(3, params)
    with pytest.raises(ValueError, match="state must hold one state of lars; it holds 0"):
        lars_jax.to_state_dict((), params, 0.1)
    fresh = lars_jax.from_state_dict(saved, params)
    assert fresh.first.tolist() == [True, True] and int(fresh.count) == 0
    w, b = np.ones((40, 30), np.float32), np.ones(7, np.float32)
    parts = lars_array.LARS([{"params": {"w": w}, "momentum": 0.5}, {"params": {"b.0": b}}], lr=0.1)
    with pytest.raises(ValueError, match="their momentum differs"):
        LARS(params, lr=0.1).load_state_dict(parts.state_dict())


def test_a_state_is_read_from_other_groups() -> None:
    params = draw(0)
    optimizer = LARS(params, **OPTIONS, trust_ratio_mask={"w": True, "b": [False]}, layer_axes={"w": 1, "b": [0]})
    params = optimizer.step(draw(1))
    state = lars_jax.from_state_dict(optimizer.state_dict(), params)
    buffers = optimizer.state_dict()["state"]
    assert bits(state.trace) == [buffers[name]["momentum_buffer"].tobytes() for name in ("b.0", "w")]
    plain = LARS(params, **OPTIONS)
    with pytest.raises(ValueError, match="their adapt differs"):
        plain.load_state_dict(optimizer.state_dict())
    assert plain.state_dict()["state"]["w"] == {"previous_lr": 0.0}


def test_torch_goes_on_from_a_state() -> None:
    torch = pytest.importorskip("torch")
    import lars_torch

    optimizer = LARS(draw(0), **OPTIONS)
    params = optimizer.step(draw(1))
    theirs = [torch.nn.Parameter(torch.tensor(np.array(p))) for p in jax.tree.leaves(params)]
    other = lars_torch.LARS(list(zip(("b.0", "w"), theirs, strict=True)), lr=0.5)
    other.load_state_dict(optimizer.state_dict())
    for p, g in zip(theirs, jax.tree.leaves(draw(2)), strict=True):
        p.grad = torch.tensor(np.array(g))
    other.step()
    assert bits([p.detach().numpy() for p in theirs]) == bits(optimizer.step(draw(2)))


def test_what_is_donated_to_something_else_is_missed_if_it_was_the_parameters(donate: bool) -> None:
    optimizer, plain = LARS(draw(0), donate=donate, **OPTIONS), LARS(draw(0), **OPTIONS)
    doubled = jax.jit(lambda params: jax.tree.map(lambda p: 2 * p, params), donate_argnums=0)(optimizer.params)
    before = bits(doubled)
    if donate:
        with pytest.raises(ValueError, match=r"parameter 'b\.0' was deleted: with donate=True"):
            optimizer.step(draw(1))
        optimizer.replace_params(draw(0))
    assert bits(optimizer.step(draw(1))) == bits(plain.step(draw(1)))
    optimizer.step(draw(2))
    assert bits(doubled) == before


def test_a_rejected_hyperparameter_donates_nothing() -> None:
    optimizer = LARS({"w": jnp.ones(3)}, lr=0.1, donate=True)
    params = optimizer.step({"w": jnp.ones(3)})
    optimizer.param_groups[0]["lr"] = -1.0
    with pytest.raises(ValueError, match="Invalid learning rate"):
        optimizer.step({"w": jnp.ones(3)})
    assert not params["w"].is_deleted()
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.step({"w": jnp.ones(3)})


@pytest.mark.parametrize("donate", [False, True])
def test_a_rejected_step_keeps_no_gradients(donate: bool) -> None:
    optimizer = LARS({"w": jnp.ones(3)}, lr=0.1, donate=donate)
    g = {"w": jnp.full(3, jnp.nan)}
    with pytest.raises(NonFiniteError):
        optimizer.step(g)
    assert optimizer._memory._used == []
