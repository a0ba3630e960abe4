"""Messages are short whatever they are about, and say what was meant."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

import lars_array
from lars_array import LARS, RULES, init, lars_step, param_groups, preset, update
from lars_array._messages import near, shown
from lars_array.hyperparams import DEFAULTS, unknown_option

LONGEST = 500
HYPER: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}


class Huge:
    """A representation of a megabyte."""

    def __repr__(self) -> str:
        return "x\n" * (1 << 19)

    __str__ = __repr__


class Raising:
    """No representation at all, nor a truth value."""

    def __repr__(self) -> str:
        raise RuntimeError("y" * 10_000)

    __str__ = __bool__ = __len__ = __float__ = __iter__ = __repr__


class Endless:
    """An iterator over itself."""

    def __repr__(self) -> str:
        return repr(self)


def nested(depth: int) -> dict[str, Any]:
    return {f"layer{i}": nested(depth - 1) if depth else np.ones((50, 50)) for i in range(5)}


ODD: dict[str, Any] = {
    "a huge array": np.zeros((1000, 1000)),
    "an array of strings": np.array(["z" * 2000] * 10),
    "an array of objects": np.array([Huge()], object),
    "a structured array": np.zeros(2, [(f"field{i}", "f4") for i in range(500)]),
    "an array of many axes": np.ones((1,) * 60),
    "integers": np.arange(100_000),
    "a masked array": np.ma.ones(10_000),
    "a scalar": np.float32(0.1),
    "complex": np.array(1j),
    "a string array": np.array("w" * 10_000),
    "a tree": nested(3),
    "a list of arrays": [np.ones((100, 100))] * 100,
    "pairs": [("n" * 10_000, np.ones(3))] * 3,
    "named": {"n" * 10_000: np.ones(3)},
    "a long string": "s" * 100_000,
    "bytes": b"s" * 100_000,
    "a long list": list(range(100_000)),
    "a deep list": [[[[[[[["a" * 1000]]]]]]]] * 100,
    "a set": set(range(10_000)),
    "a huge representation": Huge(),
    "a list of them": [Huge()] * 100,
    "keys of them": {Huge(): Huge()},
    "a representation that raises": Raising(),
    "a list of those": [Raising()] * 3,
    "one without end": Endless(),
    "a large integer": 10**400,
    "too large to print": 10**5000,
    "a fraction": Fraction(10**400, 3),
    "minus": -(10**400),
    "nan": float("nan"),
    "None": None,
    "a function": lambda *_, **__: "r" * 10_000,
    "a class": type("C" * 50, (), {}),
    "a module": types,
    "groups": [{"params": [np.ones(3)], "k" * 10_000: 1}] * 2,
    "a generator": (np.ones((100, 100)) for _ in range(3)),
}


def calls() -> Iterator[tuple[str, Callable[[Any], Any]]]:
    """All arguments of all public functions and methods, each as a function of its value."""

    def optimizer() -> LARS:
        made = LARS({"w": np.ones(3), "b": np.ones((2, 2))}, **HYPER)
        made.step([np.ones(3), np.ones((2, 2))])
        return made

    def changed(**options: Any) -> Any:
        made = optimizer()
        made.param_groups[0].update(options)
        return made.step([np.ones(3), np.ones((2, 2))])

    def saved(where: list[Any], x: Any) -> Any:
        made = optimizer()
        state = place = made.state_dict()
        for key in where[:-1]:
            place = place[key]
        place[where[-1]] = x
        return made.load_state_dict(state)

    p, g = np.ones(3), np.ones(3)
    yield "params", lambda x: LARS(x, lr=0.1)
    yield "a parameter", lambda x: LARS([p, x], lr=0.1)
    yield "a named parameter", lambda x: LARS({"w": x}, lr=0.1)
    yield "group", lambda x: LARS([{"params": x}], lr=0.1)
    yield "names", lambda x: LARS([{"params": [p], "names": x}], lr=0.1)
    yield "the swapped", lambda x: LARS(0.1, x)
    for name in inspect.signature(LARS).parameters:
        if name != "params":
            yield name, lambda x, name=name: LARS([p], **{**HYPER, name: x})
            yield f"{name} of a group", lambda x, name=name: LARS([{"params": [p], name: x}], **HYPER)
            yield f"{name} of lars_step", lambda x, name=name: lars_step(p, g, **{**HYPER, name: x})
            yield f"{name} of update", lambda x, name=name: update([p], [g], init([p]), **{**HYPER, name: x})
    for name in ("lr", *DEFAULTS, "params", "names", "what"):
        yield f"{name} later", lambda x, name=name: changed(**{name: x})
        yield f"{name} in a checkpoint", lambda x, name=name: saved(["param_groups", 0, name], x)
        yield f"{name} of a schedule", lambda x, name=name: changed(**{name: lambda step: x})
    for where in (["steps"], ["skipped_steps"], ["param_groups"], ["state"], ["param_groups", 0], ["state", "w"]):
        yield f"{where} of a checkpoint", lambda x, where=where: saved(where, x)
    for key in ("previous_lr", "momentum_buffer", "master", "what"):
        yield f"{key} of a checkpoint", lambda x, key=key: saved(["state", "w", key], x)
        yield f"{key} attached", lambda x, key=key: optimizer().attach_state({"w": {key: x}})
    yield "a name attached", lambda x: optimizer().attach_state({x: {}})
    yield "state attached", lambda x: optimizer().attach_state(x)
    yield "state of w attached", lambda x: optimizer().attach_state({"w": x})
    yield "state_dict", lambda x: optimizer().load_state_dict(x)
    yield "added", lambda x: optimizer().add_param_group(x)
    yield "an unknown option", lambda x: optimizer().add_param_group({"params": [p], x: 1})
    yield "grads", lambda x: optimizer().step(x)
    yield "a gradient", lambda x: optimizer().step([np.ones(3), x])
    yield "a named gradient", lambda x: optimizer().step({"w": x, "b": None})
    yield "the name of a gradient", lambda x: optimizer().step({x: g})
    yield "closure", lambda x: optimizer().step(closure=x)
    yield "the result of a closure", lambda x: optimizer().step(closure=lambda: x)
    yield "the gradients of a closure", lambda x: optimizer().step(closure=lambda: (0, x))
    yield "found_inf", lambda x: optimizer().step([np.ones(3), np.ones((2, 2))], found_inf=x)
    yield "p of lars_step", lambda x: lars_step(x, g, lr=0.1)
    yield "g of lars_step", lambda x: lars_step(p, x, lr=0.1)
    yield "v of lars_step", lambda x: lars_step(p, g, x, lr=0.1)
    yield "params of init", init
    yield "params of update", lambda x: update(x, [g], init([p]), lr=0.1)
    yield "grads of update", lambda x: update([p], x, init([p]), lr=0.1)
    yield "state of update", lambda x: update([p], [g], x, lr=0.1)
    yield "buffers of update", lambda x: update([p], [g], init([p])._replace(momentum_buffers=x), lr=0.1)
    yield "a buffer of update", lambda x: update([p], [g], init([p])._replace(momentum_buffers={"0": x}), lr=0.1)
    yield "preset", preset
    yield "register", lambda x: lars_array.register(x)(lambda S, hyper, xp: S)
    yield "params of param_groups", lambda x: param_groups(x, 0.1)
    yield "no_decay", lambda x: param_groups([p], 0.1, no_decay=x)
    yield "no_adapt of a list", lambda x: param_groups([p], 0.1, no_adapt=[x])
    yield "linear_scaled_lr", lambda x: lars_array.linear_scaled_lr(x, 1)
    yield "batch size", lambda x: lars_array.linear_scaled_lr(0.1, x)
    for name in ("peak_lr", "total_steps", "warmup_steps", "end_lr", "power", "start_lr"):
        default = {"peak_lr": 0.1, "total_steps": 10}
        yield (
            f"{name} of a schedule",
            lambda x, name=name, own=default: lars_array.warmup_polynomial(**{**own, name: x}),
        )
    yield "step of a schedule", lars_array.warmup_cosine(0.1, 10)


CALLS = list(calls())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "call"), CALLS, ids=[name for name, _ in CALLS])
def test_no_message_is_long(name: str, call: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lars_array.core.RULES", dict(RULES))
    for what, x in ODD.items():
        try:
            call(x)
        except (ValueError, TypeError, AttributeError) as error:
            said = str(error)
            assert len(said) <= LONGEST, f"{what}: {len(said)} characters, {said[:300]}"
            assert type(error).__module__ in ("builtins", "lars_array.nonfinite"), what
        except RuntimeError as error:
            assert what in ("a representation that raises", "a list of those"), f"{what}: {error}"


def test_values_are_shown_as_they_are_where_they_are_short() -> None:
    for x in (1, -0.5, None, "larc", [1.0, 2.0], ("w", 1), {"a": 1}, np.ones(1), np.float32(0.5), float("nan")):
        assert shown(x) == repr(x)
    assert shown(np.ones((3, 400), np.float32)) == "ndarray of shape (3, 400) and dtype float32"
    assert shown({"w": np.ones(100)}) == "{'w': ndarray of shape (100,) and dtype float64}"
    assert shown("encoder.layers.11.self_attention.output.layer_norm.weight") == repr(
        "encoder.layers.11.self_attention.output.layer_norm.weight"
    )
    assert near("Flash", RULES) == "; did you mean 'flash'?"
    assert near(3, RULES) == near("qqq", RULES) == ""
    assert len(unknown_option("x" * 1000)) < LONGEST


# ------------------------------------------------------------------------------------------------ told as what they are


def used_up() -> Iterator[Any]:
    iterator = iter([np.ones(3)])
    list(iterator)
    return iterator


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: LARS(used_up(), lr=0.1), ValueError, "empty parameter list; an iterator is empty once something has"),
        (lambda: LARS([{"params": used_up()}], lr=0.1), ValueError, "an iterator is empty once something has"),
        (
            lambda: LARS([{"params": [np.ones(2)]}, {"params": used_up()}], lr=0.1),
            ValueError,
            "an iterator is empty once something has",
        ),
        (
            lambda: LARS([np.ones(3)], lr=0.1).step(used_up()),
            ValueError,
            "grads must not be empty; an iterator is empty once something has iterated over it",
        ),
        (lambda: LARS(0.1, [np.ones(3)]), TypeError, "params come first, and then lr; got params=0.1 and lr=[array"),
        (lambda: LARS(0.1, {"w": np.ones(3)}), TypeError, "params come first, and then lr"),
        (
            lambda: update([np.ones(3)], init([np.ones(3)]), [np.ones(3)], lr=0.1),
            TypeError,
            "update takes params, grads and state in this order; got the state before",
        ),
        (
            lambda: update(init([np.ones(3)]), [np.ones(3)], [np.ones(3)], lr=0.1),
            TypeError,
            "update takes params, grads and state in this order; got the state before",
        ),
        (lambda: LARS({"a": {"w": np.ones(3)}}, lr=0.1), TypeError, "trees of arrays are for lars_jax"),
        (lambda: LARS(LARS([np.ones(3)], lr=0.1), lr=0.1), TypeError, "not an optimizer; LARS is one, and wraps none"),
        (lambda: preset("falsh"), ValueError, "did you mean 'flash'?"),
        (lambda: LARS([np.ones(3)], lr=0.1, rule="simclr_popular"), ValueError, "did you mean 'simclr-popular'"),
        (lambda: LARS([np.ones(3)], lr=0.1, kernel="compile"), ValueError, "did you mean 'compiled'?"),
    ],
)
def test_what_was_meant_is_told(call: Callable[[], Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind) as caught:
        call()
    assert message in str(caught.value) and len(str(caught.value)) <= LONGEST


def test_objects_of_torch_are_sent_to_its_front_end() -> None:
    torch = pytest.importorskip("torch")
    module = torch.nn.Linear(3, 2)
    with pytest.raises(
        TypeError, match=r"^params must be arrays, not a Linear; for a torch module use lars_torch.LARS"
    ):
        LARS(module, lr=0.1)
    for params in (module.parameters(), dict(module.named_parameters()), list(module.parameters())):
        with pytest.raises(TypeError, match=r"must not require gradients; use lars_torch.LARS"):
            LARS(params, lr=0.1)
    with pytest.raises(TypeError, match="not an optimizer; LARS is one, and wraps none: got a SGD"):
        LARS(torch.optim.SGD(module.parameters(), 0.1), lr=0.1)


def test_objects_of_jax_are_sent_to_its_front_end() -> None:
    jnp, optax, equinox = (pytest.importorskip(name) for name in ("jax.numpy", "optax", "equinox"))
    with pytest.raises(TypeError, match=r"must be writable; ArrayImpl is not, use lars_jax, or lars_array.init"):
        LARS({"w": jnp.ones(3)}, lr=0.1)
    with pytest.raises(TypeError, match="not an optimizer; LARS is one"):
        LARS(optax.sgd(0.1), lr=0.1)
    with pytest.raises(TypeError, match="for a module of equinox use lars_jax"):
        LARS(equinox.nn.MLP(2, 2, 8, 2, key=__import__("jax").random.key(0)), lr=0.1)


def test_a_parameter_that_was_replaced_in_its_group() -> None:
    p, q, new = np.ones(3), np.ones(1), np.ones(1)
    optimizer = LARS([{"params": {"p": p}}, {"params": {"q": q}}], **HYPER)
    for change in (
        lambda: optimizer.param_groups[1]["params"].__setitem__(0, new),
        lambda: optimizer.param_groups[1].update(params=[new]),
        lambda: optimizer.param_groups[1]["params"].append(new),
        lambda: optimizer.param_groups[1]["params"].clear(),
    ):
        change()
        with pytest.raises(
            ValueError, match=r"can't be replaced, and 'q' in parameter group 1 was; write into its array"
        ):
            optimizer.step([p * 0, q * 0])
        optimizer.param_groups[1]["params"][:] = [q]
    optimizer.step([p * 0, q * 0])
    assert optimizer.steps == 1


def test_a_message_names_group_and_step() -> None:
    optimizer = LARS(
        [{"params": [np.ones(3)]}, {"params": [np.ones(2)], "lr": lambda step: 0.1 - 0.1 * (step == 2) * 2}], **HYPER
    )
    grads = [np.ones(3), np.ones(2)]
    optimizer.step(grads)
    optimizer.step(grads)
    with pytest.raises(ValueError, match=r"^Invalid learning rate: -0.1 \(parameter group 1, step 2\)$"):
        optimizer.step(grads)
    optimizer.param_groups[1]["lr"] = 0.1
    with pytest.raises(ValueError, match=r"^the gradient of '1' has 2 non-finite .* \(step 2\)$"):
        optimizer.step([np.ones(3), np.full(2, np.nan)])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0, 10**400])
def test_a_learning_rate_that_is_attached_is_checked(bad: Any) -> None:
    optimizer = LARS({"w": np.ones(3)}, **HYPER)
    optimizer.step([np.ones(3)])
    before = optimizer.state_dict()
    with pytest.raises(ValueError, match=r"^previous_lr of 'w' must be finite and at least 0; got "):
        optimizer.attach_state({"w": {"previous_lr": bad}})
    with pytest.raises(
        ValueError, match="must have no keys but 'previous_lr', 'momentum_buffer', 'master'; got 'momentum"
    ):
        optimizer.attach_state({"w": {"momentum": np.ones(3)}})
    with pytest.raises(ValueError, match=r"got the name 'W'; did you mean 'w'|got the name 'W'"):
        optimizer.attach_state({"W": {}})
    np.testing.assert_equal(optimizer.state_dict(), before)


@pytest.mark.parametrize("bad", [np.ones(2), np.ones(1), np.ones((0,)), [1.0], "1", np.array("1"), 1j], ids=repr)
def test_a_found_inf_that_is_no_number_is_refused(bad: Any) -> None:
    p = np.ones(3)
    optimizer = LARS([p], **HYPER)
    with pytest.raises(TypeError, match=r"^found_inf must be a number, or an array of shape \(\); got "):
        optimizer.step([p * 2], found_inf=bad)
    for yes in (1, 1.0, True, np.bool_(True), np.array(1.0), np.float32(2), float("nan")):
        optimizer.step([p * 2], found_inf=yes)
    assert (optimizer.steps, optimizer.skipped_steps, p.min()) == (0, 7, 1.0)


def test_checkpoints_of_other_optimizers_are_refused_with_their_keys() -> None:
    torch = pytest.importorskip("torch")
    optimizer = LARS({"w": np.ones(3)}, **HYPER)
    for other in (torch.optim.Adam, torch.optim.SGD, torch.optim.RMSprop):
        theirs = other([torch.ones(3)], 0.1)
        with pytest.raises(ValueError, match=r"must be of lars_array.LARS; got one of another optimizer") as caught:
            optimizer.load_state_dict(theirs.state_dict())
        assert "lars_torch.LARS loads those of torch" in str(caught.value)
        assert {"Adam": "betas", "SGD": "momentum", "RMSprop": "alpha"}[other.__name__] in str(caught.value)
