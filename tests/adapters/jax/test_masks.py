"""Masks and other options that differ by leaf: trees of all kinds, in all wrappers, eagerly and under jit."""

from __future__ import annotations

import collections
import dataclasses
import enum
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lars_jax import LARS, lars

OPTIONS: dict[str, Any] = {"weight_decay": 0.1, "trust_coefficient": 0.1}


def params() -> dict[str, Any]:
    return {"w": jnp.array([[3.0, 4.0]]), "b": jnp.array([1.0, 2.0])}


def grads() -> dict[str, Any]:
    return {"w": jnp.array([[0.5, -1.0]]), "b": jnp.array([2.0, 1.0])}


def updated(tree: Any, gradients: Any, solver: Any, *, jit: bool = True) -> Any:
    update = jax.jit(solver.update) if jit else solver.update
    return update(gradients, solver.init(tree), tree)[0]


def expected(**masks: Any) -> Any:
    return updated(params(), grads(), lars(0.1, **OPTIONS, **masks))


def assert_equal(ours: Any, theirs: Any) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=1e-6)


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize(
    "values",
    [(jnp.bool_(True), jnp.bool_(False)), (np.True_, np.False_), (1, 0), (1.0, 0.0), (np.int8(1), np.array(0))],
)
@pytest.mark.parametrize("option", ["weight_decay_mask", "trust_ratio_mask"])
def test_true_and_false_in_other_types(option: str, values: Any, jit: bool) -> None:
    yes, no = values
    plain = expected(**{option: {"w": True, "b": False}})
    for mask in ({"w": yes, "b": no}, lambda p: {"w": yes, "b": no}):
        solver = lars(0.1, **OPTIONS, **{option: mask})
        assert_equal(updated(params(), grads(), solver, jit=jit), plain)
    after = LARS(params(), 0.1, 0.9, **OPTIONS, **{option: {"w": yes, "b": no}}).step(grads())
    assert_equal(after, jax.tree.map(jnp.add, params(), plain))


def test_a_mask_of_traced_values() -> None:
    def update(flags: Any) -> Any:
        solver = lars(0.1, **OPTIONS, weight_decay_mask=flags, trust_ratio_mask=lambda p: flags)
        return solver.update(grads(), solver.init(params()), params())[0]

    plain = expected(weight_decay_mask={"w": True, "b": False}, trust_ratio_mask={"w": True, "b": False})
    assert_equal(jax.jit(update)({"w": True, "b": jnp.bool_(False)}), plain)


@jax.tree_util.register_pytree_node_class
class Checked:
    """A node that takes arrays only, as those do that check their fields."""

    def __init__(self, w: Any, b: Any) -> None:
        if not all(isinstance(x, jax.Array | np.ndarray) or type(x) is object for x in (w, b)):
            raise TypeError(f"arrays only; got {w!r} and {b!r}")
        self.w, self.b = w, b

    def tree_flatten(self) -> Any:
        return (self.w, self.b), None

    @classmethod
    def tree_unflatten(cls, _: Any, children: Any) -> Checked:
        return cls(*children)


@pytest.mark.parametrize("masks", [{}, {"weight_decay_mask": False}, {"axis_name": None, "layer_axes": 0}], ids=str)
def test_no_tree_is_rebuilt_with_anything_but_arrays(masks: Any) -> None:
    p, g = (Checked(x["w"], x["b"]) for x in (params(), grads()))
    found = updated(p, g, lars(0.1, **OPTIONS, **masks))
    assert_equal({"w": found.w, "b": found.b}, expected(**masks))
    masks = {key: x for key, x in masks.items() if key != "axis_name"}
    assert isinstance(LARS(p, lr=0.1, **OPTIONS, **masks).step(g), Checked)


# ----------------------------------------------------------------------------------------------------- trees that fit


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Model:
    """A module with ``__call__``, as any of Equinox is."""

    w: Any
    b: Any

    def __call__(self, x: Any) -> Any:
        return self.w @ x + self.b


Pair = collections.namedtuple("Pair", ["w", "b"])


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("kind", [dict, Model, Pair])
@pytest.mark.parametrize("of_mask", [dict, Model, Pair, collections.OrderedDict])
def test_a_mask_fits_by_the_names_in_it(kind: Any, of_mask: Any, jit: bool) -> None:
    p, g = kind(**params()), kind(**grads())
    masks = {"weight_decay_mask": of_mask(w=True, b=False), "trust_ratio_mask": of_mask(w=False, b=True)}
    plain = expected(weight_decay_mask={"w": True, "b": False}, trust_ratio_mask={"w": False, "b": True})
    assert_equal(updated(p, g, lars(0.1, **OPTIONS, **masks), jit=jit), kind(**plain))
    after = LARS(p, 0.1, 0.9, **OPTIONS, **masks).step(g)
    assert_equal(after, jax.tree.map(jnp.add, p, kind(**plain)))


def test_a_module_that_is_no_mask_is_called() -> None:
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class ByAxes:
        least: Any

        def __call__(self, tree: Any) -> Any:
            return jax.tree.map(lambda p: p.ndim >= self.least, tree)

    plain = expected(weight_decay_mask={"w": True, "b": False})
    for mask in (ByAxes(2), jax.tree_util.Partial(lambda p: {"w": True, "b": False})):
        solver = lars(0.1, **OPTIONS, weight_decay_mask=mask)
        assert_equal(updated(params(), grads(), solver), plain)
        assert_equal(updated(Model(**params()), Model(**grads()), solver), Model(**plain))
    wrong = lars(0.1, weight_decay_mask=Model(w=True, b=None))
    with pytest.raises(TypeError, match="weight_decay_mask must hold True or False; got None for 'b'"):
        updated(params(), grads(), wrong)


def test_a_module_may_hold_more_than_is_trained() -> None:
    """As those of Flax hold statistics beside the parameters that its State of gradients is of."""
    more = Model(**params() | {"b": {"bias": params()["b"], "mean": jnp.ones(2)}})
    g = {"w": grads()["w"], "b": {"bias": grads()["b"]}}
    after = LARS(more, 0.1, 0.9, **OPTIONS, weight_decay_mask={"w": True, "b": {"bias": False}}).step(g)
    plain = jax.tree.map(jnp.add, params(), expected(weight_decay_mask={"w": True, "b": False}))
    assert_equal(after, Model(w=plain["w"], b={"bias": plain["b"], "mean": jnp.ones(2)}))
    for wrong in ({"w": grads()["w"], "b": {"typo": grads()["b"]}}, {"x": grads()["w"]}, {}, {"b": grads()["b"]}):
        with pytest.raises(ValueError, match="grads must have the structure of the parameters"):
            LARS(more, 0.1).step(wrong)


def test_modules_of_equinox() -> None:
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(2, 3, 4, 1, key=jax.random.key(0))
    trained = eqx.filter(model, eqx.is_inexact_array)
    g = eqx.filter_grad(lambda m: jnp.sum(m(jnp.ones(2)) ** 2))(model)
    matrices = jax.tree.map(lambda p: p.ndim > 1, trained)
    everywhere = jax.tree.map(lambda x: eqx.is_inexact_array(x) and x.ndim > 1, model)
    where = lambda m: [layer.weight for layer in m.layers]  # noqa: E731
    of_false = jax.tree.map(lambda _: False, trained)
    by_hand = eqx.tree_at(where, of_false, replace=[True] * len(where(model)))
    plain = [p.ndim > 1 for p in jax.tree.leaves(trained)]
    solver = lars(0.1, **OPTIONS, weight_decay_mask=plain, trust_ratio_mask=plain)
    reference = updated(jax.tree.leaves(trained), jax.tree.leaves(g), solver)
    for mask in (matrices, everywhere, by_hand, lambda p: jax.tree.map(lambda x: x.ndim > 1, p)):
        solver = lars(0.1, **OPTIONS, weight_decay_mask=mask, trust_ratio_mask=mask)
        for jit in (False, True):
            update = eqx.filter_jit(solver.update) if jit else solver.update
            found, _ = update(g, solver.init(trained), trained)
            assert_equal(jax.tree.leaves(found), reference)
            assert callable(eqx.apply_updates(model, found))
        if not callable(mask) or isinstance(mask, eqx.Module):
            eager = LARS(model, 0.1, 0.9, **OPTIONS, weight_decay_mask=mask, trust_ratio_mask=mask)
            after = eqx.filter(eager.step(g), eqx.is_inexact_array)
            assert_equal(jax.tree.leaves(after), [p + u for p, u in zip(jax.tree.leaves(trained), reference)])


def test_a_mask_has_none_or_more_only_where_no_parameter_is() -> None:
    tree, g = {"w": params()["w"], "none": None, "empty": {}}, {"w": grads()["w"], "none": None, "empty": {}}
    for mask in (
        {"w": True, "none": None, "empty": None},
        {"w": True, "none": True, "empty": {"x": True}},
        {"w": True, "none": {"x": {"y": 1}}},
    ):
        assert updated(tree, g, lars(0.1, **OPTIONS, weight_decay_mask=mask))["none"] is None
    for mask, said in (
        ({"w": True, "other": None}, None),
        ({"w": None}, "got None for 'w'"),
        ({"w": True, "v": True}, "no parameter is at 'v'"),
        ({"w": {"x": True}}, "it has nothing for 'w' and no parameter is at 'w.x'"),
    ):
        solver = lars(0.1, weight_decay_mask=mask)
        if said is None:
            updated(tree, g, solver)
            continue
        with pytest.raises((ValueError, TypeError), match=said):
            updated(tree, g, solver)


# ----------------------------------------------------------------------------------------------------- in all wrappers


MASK = {"w": True, "b": False}
WRAPPERS: dict[str, Any] = {
    "chain": lambda solver: optax.chain(optax.identity(), solver),
    "masked": lambda solver: optax.masked(solver, {"w": True, "b": True}),
    "partition": lambda solver: optax.partition({"x": solver}, {"w": "x", "b": "x"}),
    "MultiSteps": lambda solver: optax.MultiSteps(solver, 1),
}


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("kind", [dict, Model], ids=["dict", "module"])
def test_masks_in_wrappers_of_optax(wrapper: str, kind: Any, jit: bool) -> None:
    p, g, mask = kind(**params()), kind(**grads()), kind(**MASK)
    if kind is Model and wrapper in ("masked", "partition"):
        p, g = {"w": p.w, "b": p.b}, {"w": g.w, "b": g.b}  # optax calls a module
    solver = WRAPPERS[wrapper](lars(0.1, **OPTIONS, weight_decay_mask=mask))
    found = updated(p, g, solver, jit=jit)
    plain = expected(weight_decay_mask=MASK)
    assert_equal(jax.tree.leaves(found), jax.tree.leaves(kind(**plain) if isinstance(found, Model) else plain))


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_a_mask_of_the_whole_model_where_only_a_part_is_trained(jit: bool) -> None:
    tree = {"head": params(), "body": {"x": jnp.ones(2), "y": jnp.ones((2, 2))}}
    g = {"head": grads(), "body": {"x": jnp.ones(2), "y": jnp.ones((2, 2))}}
    mask = {"head": MASK, "body": {"x": False, "y": True}}
    solver = lars(0.1, **OPTIONS, weight_decay_mask=mask)
    plain = expected(weight_decay_mask=MASK)
    for wrapped in (
        optax.masked(solver, {"head": True, "body": False}),
        optax.partition({"t": solver, "f": optax.set_to_zero()}, {"head": "t", "body": "f"}),
        optax.partition({"t": solver, "f": optax.set_to_zero()}, {"head": {"w": "t", "b": "t"}, "body": "f"}),
    ):
        assert_equal(updated(tree, g, wrapped, jit=jit)["head"], plain)


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize(
    "masks", [{"weight_decay_mask": MASK}, {"trust_ratio_mask": MASK}, {"trust_ratio_mask": 1}], ids=str
)
def test_masks_with_injected_hyperparameters(masks: Any, jit: bool) -> None:
    solver = optax.inject_hyperparams(lars)(0.1, **OPTIONS, **masks)
    assert_equal(updated(params(), grads(), solver, jit=jit), expected(**masks))


@pytest.mark.parametrize("name", ["learning_rate", "momentum", "weight_decay", "dampening", "eps", "rescale_grad"])
def test_integers_can_be_injected(name: str) -> None:
    options = {"learning_rate": 0.1, **OPTIONS, name: 1}
    solver = optax.inject_hyperparams(lars)(**options)
    assert_equal(updated(params(), grads(), solver), updated(params(), grads(), lars(**options)))


def test_layer_axes_are_not_injected_but_static() -> None:
    injected = optax.inject_hyperparams(lars)(0.1, **OPTIONS, layer_axes=1)
    with pytest.raises(TypeError, match=r"layer_axes must be known .* list it in static_args; got ArrayImpl"):
        injected.init(params())
    static = optax.inject_hyperparams(lars, static_args="layer_axes")(0.1, **OPTIONS, layer_axes=1)
    assert_equal(updated(params(), grads(), static), expected(layer_axes=1))


# ------------------------------------------------------------------------------------- the same decay in other forms


FORMS: dict[str, Any] = {
    "number": lambda solver, w: solver(weight_decay=w),
    "integer": lambda solver, w: solver(weight_decay=int(w) if w == int(w) else w),
    "array": lambda solver, w: solver(weight_decay=jnp.asarray(w)),
    "numpy": lambda solver, w: solver(weight_decay=np.float32(w)),
    "schedule": lambda solver, w: solver(weight_decay=lambda step: w),
    "schedule of arrays": lambda solver, w: solver(weight_decay=optax.constant_schedule(jnp.asarray(w))),
    "injected": lambda solver, w: optax.inject_hyperparams(lars)(**solver.keywords, weight_decay=w),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("decay", [0.0, 0.5])
@pytest.mark.parametrize("rule", ["flash", "optax"])
def test_weight_decay_is_one_algorithm_in_all_its_forms(form: str, decay: float, rule: str) -> None:
    options: dict[str, Any] = {"rule": rule, "weight_decay_mask": MASK, "eps": 1e-8}
    plain = updated(params(), grads(), lars(0.1, weight_decay=decay, **options))
    if decay == 0 and rule == "flash":
        assert_equal(plain, jax.tree.map(lambda g: -0.1 * g, grads()))
    solver = FORMS[form](functools.partial(lars, learning_rate=0.1, **options), decay)
    for jit in (False, True):
        assert_equal(updated(params(), grads(), solver, jit=jit), plain)
    if form != "injected":
        eager = FORMS[form](functools.partial(LARS, params(), 0.1, 0.9, **options), decay)
        assert_equal(eager.step(grads()), jax.tree.map(jnp.add, params(), plain))


def test_weight_decay_that_is_zero_for_some_steps() -> None:
    """Excluded layers are adapted in the steps in which the others are decayed, in both optimizers."""

    def decay(step: Any) -> Any:
        return 0.5 * (step % 2)

    options: dict[str, Any] = {"weight_decay": decay, "weight_decay_mask": MASK, "trust_coefficient": 0.1}
    solver, eager, tree = lars(0.1, momentum=0.0, **options), LARS(params(), 0.1, **options), params()
    state, update = solver.init(tree), jax.jit(solver.update)
    for step in range(4):
        updates, state = update(grads(), state, tree)
        tree = optax.apply_updates(tree, updates)
        assert_equal(eager.step(grads()), tree)
        is_sgd = np.allclose(updates["b"], -0.1 * grads()["b"])
        assert is_sgd == (step % 2 == 0)


# ------------------------------------------------------------------------------------------------- names of mapped axes


class Axis(enum.Enum):
    MODEL = 1


def split(axis_name: Any, tree: Any, g: Any, mapped: list[Any]) -> Any:
    """Return the updates on one device of as many axes of length 1."""
    solver = lars(0.1, **OPTIONS, axis_name=axis_name)

    def step(p: Any, g: Any) -> Any:
        return solver.update(g, solver.init(p), p)[0]

    found: Any = step
    for name in mapped:
        found = jax.vmap(found, axis_name=name)
    given = (jax.tree.map(lambda x: x.reshape((1,) * len(mapped) + x.shape), x) for x in (tree, g))
    return jax.tree.map(lambda u: u.reshape(u.shape[len(mapped) :]), found(*given))


@pytest.mark.parametrize(
    ("axis_name", "mapped"),
    [
        (Axis.MODEL, [Axis.MODEL]),
        ((Axis.MODEL, "x"), [Axis.MODEL, "x"]),
        (("x", None), ["x"]),
        (("x", "y"), ["x", "y"]),
        ((("x", "y"), None), ["x", "y"]),
        ([("x", "y"), ()], ["x", "y"]),
        (((), "x"), ["x"]),
        (lambda p: ("x", None), ["x"]),
    ],
    ids=lambda x: "" if callable(x) else str(x),
)
def test_names_of_axes_may_be_any_and_tuples_of_them(axis_name: Any, mapped: list[Any]) -> None:
    tree, g = tuple(params().values()), tuple(grads().values())
    found = split(axis_name, tree, g, mapped)
    assert_equal(found, updated(tree, g, lars(0.1, **OPTIONS)))


def test_a_tuple_of_names_is_leaf_by_leaf_for_a_tuple_of_parameters() -> None:
    from lars_jax._collective import mapped_axes
    from lars_jax._trees import Leaves

    pair, named = Leaves.of((jnp.ones(1), jnp.ones(2))), Leaves.of({"w": jnp.ones(1), "b": jnp.ones(2)})
    assert mapped_axes(("x", "y"), pair) == [("x",), ("y",)]
    assert mapped_axes(("x", "y"), named) == [("x", "y")] * 2
    assert mapped_axes({"w": ("x", "y"), "b": None}, named) == [(), ("x", "y")]
    assert mapped_axes((("x", "y"), None), pair) == [("x", "y"), ()]
    assert mapped_axes((), pair) == mapped_axes(None, pair) == [(), ()]


def test_functions_see_parameters_alone() -> None:
    """A whole module is given to the eager optimizer, with functions among its leaves."""
    equinox = pytest.importorskip("equinox")
    model = equinox.nn.MLP(2, 1, 4, 1, key=jax.random.key(0))
    mask = lambda params: jax.tree.map(lambda p: p.ndim > 1, params)  # noqa: E731
    optimizer = LARS(model, 0.1, weight_decay=0.1, weight_decay_mask=mask)
    assert sorted(len(group["names"]) for group in optimizer.param_groups) == [2, 2]
