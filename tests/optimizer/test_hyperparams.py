"""What is remembered of hyper-parameters from step to step: nothing that has changed."""

from __future__ import annotations

import copy
import pickle
import weakref
from contextlib import nullcontext
from typing import Any

import cuda_on_cpu
import numpy as np
import pytest

from lars_array import LARS, RULES, Rule, init, update
from lars_array.core import momentum_form
from lars_array.hyperparams import Hyperparams, complete
from lars_array.kernels import NUMPY_KERNELS as KERNELS

START = [np.linspace(-1, 1, 12).reshape(3, 4), np.arange(1.0, 6.0)]
GRADIENTS = [np.full((3, 4), 0.25), np.linspace(1, 2, 5)]
OPTIONS: dict[str, Any] = {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.01}

# Another value for each hyper-parameter with which steps differ.
CHANGES: dict[str, Any] = {
    "lr": 0.25,
    "momentum": 0.5,
    "dampening": 0.5,
    "weight_decay": 0.1,
    "nesterov": True,
    "trust_coefficient": 0.01,
    "eps": 1.0,
    "rule": "paper",
    "trust_clip": True,
    "trust_bounds": (0.0, 1e-4),
    "always_adapt": True,
    "adapt": False,
    "maximize": True,
    "rescale_grad": 0.5,
    "max_grad_norm": 0.1,
}

# What they show with.
WITH: dict[str, Any] = {
    "trust_clip": {"weight_decay": 1e-6, "trust_coefficient": 1.0},
    "always_adapt": {"weight_decay": 0.0},
}


def own_rule(S: Any, hyper: Any, xp: Any) -> Any:
    return momentum_form(hyper.trust_coefficient * S[:, 0], hyper.lr, hyper.weight_decay, hyper, xp)


def steps(kernel: str, *options: dict[str, Any]) -> list[Any]:
    """Return parameters after a step with each of these, by an optimizer that is made anew for each."""
    params, state = [p.copy() for p in START], None
    for own in options:
        optimizer = LARS(params, **OPTIONS | own, kernel=kernel)
        if state is not None:
            optimizer.attach_state(state)
        optimizer.step(GRADIENTS)
        state = optimizer.state_views()
    return params


def assert_same(params: list[Any], expected: list[Any]) -> None:
    for p, q in zip(params, expected, strict=True):
        np.testing.assert_array_equal(p, q)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", CHANGES)
def test_what_is_changed_between_steps_counts_at_once(name: str, kernel: str) -> None:
    lasting = WITH.get(name, {})
    params = [p.copy() for p in START]
    optimizer = LARS(params, **OPTIONS | lasting, kernel=kernel)
    optimizer.step(GRADIENTS)
    before = optimizer.param_groups[0][name]
    optimizer.step(GRADIENTS)
    optimizer.param_groups[0][name] = CHANGES[name]
    optimizer.step(GRADIENTS)
    optimizer.param_groups[0][name] = before
    optimizer.step(GRADIENTS)
    changed = lasting | {name: CHANGES[name]}
    assert_same(params, steps(kernel, lasting, lasting, changed, lasting))
    unchanged = steps(kernel, *4 * [lasting])
    assert any(not np.array_equal(p, q) for p, q in zip(params, unchanged)), "then this test says nothing"


def test_a_schedule_is_asked_at_every_step() -> None:
    asked: list[int] = []

    def schedule(step: int) -> float:
        asked.append(step)
        return 0.1 * (step + 1)

    params = [p.copy() for p in START]
    optimizer = LARS(params, **OPTIONS | {"lr": schedule})
    asked.clear()
    for _ in range(3):
        optimizer.step(GRADIENTS)
    assert asked == [0, 1, 2]
    here = [p.copy() for p in START]
    plain = LARS(here, **OPTIONS)
    for k in range(3):
        plain.param_groups[0]["lr"] = 0.1 * (k + 1)
        plain.step(GRADIENTS)
    assert_same(params, here)


def test_what_is_changed_in_place_counts_too() -> None:
    lr, bounds = np.array(0.5), [0.0, 1.0]
    params, here = ([p.copy() for p in START] for _ in range(2))
    options = OPTIONS | {"always_adapt": True}
    optimizer, plain = (LARS(ps, **options | {"lr": lr, "trust_bounds": bounds}) for ps in (params, here))
    optimizer.step(GRADIENTS)
    plain.step(GRADIENTS)
    lr[...], bounds[1] = 0.125, 1e-4
    optimizer.step(GRADIENTS)
    plain.param_groups[0].update(lr=0.125, trust_bounds=(0.0, 1e-4))
    plain.step(GRADIENTS)
    assert_same(params, here)
    assert max(optimizer.trust_ratios().values()) == 1e-4


@pytest.mark.parametrize(
    ("name", "value", "kind", "message"),
    [
        ("momentum", True, TypeError, "^momentum must be a number; got True$"),
        ("nesterov", 0, TypeError, "^nesterov must be True or False; got 0$"),
        ("weight_decay", np.ones(2), TypeError, "^weight_decay must be a number; got array"),
        ("lr", -1.0, ValueError, "^Invalid learning rate: -1.0$"),
        ("weight", 1, ValueError, "^unknown hyper-parameter 'weight'"),
        ("rule", "no such", ValueError, "^rule must be one of .* got 'no such'$"),
    ],
)
def test_what_is_wrong_is_refused_and_can_be_put_right(
    name: str, value: Any, kind: type[Exception], message: str
) -> None:
    params = [p.copy() for p in START]
    optimizer = LARS(params, **OPTIONS | {"momentum": 1.0})
    group = optimizer.param_groups[0]
    optimizer.step(GRADIENTS)
    before, after_one = group.get(name), [p.copy() for p in params]
    for _ in range(2):
        group[name] = value
        with pytest.raises(kind, match=message):
            optimizer.step(GRADIENTS)
    assert_same(params, after_one)
    group[name] = before
    if before is None:
        del group[name]
    optimizer.step(GRADIENTS)
    here = [p.copy() for p in START]
    plain = LARS(here, **OPTIONS | {"momentum": 1.0})
    for _ in range(2):
        plain.step(GRADIENTS)
    assert_same(params, here)


def test_without_lr_there_is_no_step() -> None:
    optimizer = LARS([START[0].copy()], **OPTIONS)
    del optimizer.param_groups[0]["lr"]
    with pytest.raises(ValueError, match=r"^a parameter group must have the key 'lr'$"):
        optimizer.step(GRADIENTS[:1])


def test_the_same_object_comes_back_while_nothing_changes() -> None:
    hyperparams = Hyperparams()
    groups = [{"params": [], "names": [], **complete({"lr": 0.1, "rule": Rule(own_rule)})} for _ in range(2)]
    found = hyperparams.read(groups, 0)
    assert hyperparams.read(groups, 1) is found
    assert hyperparams.read(copy.copy(groups), 2) is found
    groups[1]["momentum"] = 0.5
    changed = hyperparams.read(groups, 3)
    assert changed is not found and [group["momentum"] for group in changed] == [0, 0.5]
    assert hyperparams.read(groups, 4) is changed
    assert hyperparams.read([*groups, groups[0]], 5) is not changed
    groups[0]["trust_bounds"] = [0.0, 1.0]  # may be changed in place
    assert hyperparams.read(groups, 6) is not hyperparams.read(groups, 6)


def test_the_same_objects_in_a_group_do_not_hide_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RULES, "own", Rule(own_rule))
    asked: list[int] = []

    def schedule(step: int) -> float:
        asked.append(step)
        return 0.1

    group = {"params": [], "names": [], **complete({"lr": 0.1, "rule": "own"})}
    hyperparams = Hyperparams()
    found = hyperparams.read([group], 0)
    assert hyperparams.read([group], 1) is found
    monkeypatch.setitem(RULES, "own", Rule(own_rule, norm_of="update"))
    changed = hyperparams.read([group], 2)  # the name of the rule stands for another
    assert changed is not found and hyperparams.read([group], 3) is changed
    group["momentun"] = group.pop("momentum")  # the same values, and as many keys
    with pytest.raises(ValueError, match="must have the key 'momentum'"):
        hyperparams.read([group], 4)
    with pytest.raises(ValueError, match="must have the key 'momentum'"):
        hyperparams.read([group], 5)
    group["momentum"] = group.pop("momentun")
    assert hyperparams.read([group], 6)[0]["momentum"] == 0
    group["lr"] = schedule
    for step in (7, 8, 9):
        hyperparams.read([group], step)
    assert asked == [7, 8, 9]
    group["lr"] = 0.1
    own = hyperparams.read([group], 10)
    scaled = hyperparams.read([group], 10, [{**complete({"lr": 0.1, "rule": "own"}), "rescale_grad": 0.5}])
    assert scaled[0]["rescale_grad"] == 0.5 and not hyperparams.are_unchanged([group])
    assert hyperparams.read([group], 11)[0]["rescale_grad"] == own[0]["rescale_grad"] == 1


@pytest.mark.parametrize("kind", [str, np.str_])
@pytest.mark.parametrize("place", ["here", "cuda"])
def test_another_rule_by_the_same_name_counts_at_once(kind: Any, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if place == "cuda" and cuda_on_cpu.missing():
        pytest.skip(str(cuda_on_cpu.missing()))
    monkeypatch.setitem(RULES, "own", Rule(own_rule))
    with cuda_on_cpu.pretended() if place == "cuda" else nullcontext():
        put = cuda_on_cpu.far if place == "cuda" else np.array
        params, here = [put(p) for p in START], [p.copy() for p in START]
        optimizer, plain = LARS(params, **OPTIONS, rule=kind("own")), LARS(here, **OPTIONS, rule=own_rule)
        optimizer.step([put(g) for g in GRADIENTS])
        monkeypatch.setitem(RULES, "own", Rule(lambda S, hyper, xp: own_rule(S, hyper, xp) * 0.5, keeps_buffer=True))
        optimizer.step([put(g) for g in GRADIENTS])
    plain.step(GRADIENTS)
    plain.param_groups[0]["rule"] = RULES["own"]
    plain.step(GRADIENTS)
    for p, q in zip(params, here, strict=True):
        np.testing.assert_allclose(np.asarray(p), q, rtol=1e-12)


def test_what_else_is_in_a_group_is_not_kept() -> None:
    class Large:
        pass

    group = {"params": [], "names": [], "cache": Large(), **complete({"lr": 0.1})}
    hyperparams, left = Hyperparams(), weakref.ref(group["cache"])
    hyperparams.read([group], 0, [complete({"lr": 0.1})])
    assert hyperparams.are_unchanged([group])
    del group["cache"]
    assert left() is None and not hyperparams.are_unchanged([group])


class Odd:
    """A rule that calls itself equal to others, or to nothing that can be told."""

    def __init__(self, equal: Any, lr: float) -> None:
        self.equal, self.lr = equal, lr

    def __eq__(self, other: object) -> Any:
        return self.equal

    __hash__ = None  # type: ignore[assignment]

    def __call__(self, S: Any, hyper: Any, xp: Any) -> Any:
        return own_rule(S, hyper._replace(lr=hyper.lr * self.lr), xp)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("equal", [True, np.ones(2)])
@pytest.mark.parametrize("as_rule", [lambda f: f, Rule])
def test_rules_are_not_asked_whether_they_are_equal(as_rule: Any, equal: Any, kernel: str) -> None:
    params = [p.copy() for p in START]
    optimizer = LARS(params, **OPTIONS, rule=as_rule(Odd(equal, 1.0)), kernel=kernel)
    optimizer.step(GRADIENTS)
    optimizer.step(GRADIENTS)
    optimizer.param_groups[0].update(rule=as_rule(Odd(equal, 0.0)))
    before = [p.copy() for p in params]
    optimizer.step(GRADIENTS)
    assert_same(params, before)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_name_stands_for_the_rule_that_it_is_registered_for_now(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RULES, "own", Rule(own_rule))
    params = [p.copy() for p in START]
    optimizer = LARS(params, **OPTIONS, rule="own", kernel=kernel)
    optimizer.step(GRADIENTS)
    optimizer.step(GRADIENTS)
    monkeypatch.setitem(RULES, "own", Rule(Odd(True, 0.0)))
    before = [p.copy() for p in params]
    optimizer.step(GRADIENTS)
    assert_same(params, before)
    monkeypatch.delitem(RULES, "own")
    with pytest.raises(ValueError, match=r"^rule must be one of"):
        optimizer.step(GRADIENTS)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_rule_that_writes_to_what_it_is_given_does_so_once(kernel: str) -> None:
    def rule(S: Any, hyper: Any, xp: Any) -> Any:
        hyper.lr[...] *= 0.5  # none should, but nothing of it may last
        return momentum_form(1.0, hyper.lr, hyper.weight_decay, hyper, xp)

    params = [p.copy() for p in START]
    optimizer = LARS(params, 1.0, rule=rule, kernel=kernel)
    for k in range(1, 4):
        optimizer.step(GRADIENTS)
        np.testing.assert_allclose(params[0], START[0] - 0.5 * k * GRADIENTS[0])


def test_order_and_types_are_not_mixed_up() -> None:
    optimizer = LARS([START[0].copy()], **OPTIONS | {"momentum": 1, "nesterov": True})
    optimizer.step(GRADIENTS[:1])
    group = optimizer.param_groups[0]
    swapped = {"momentum": "nesterov", "nesterov": "momentum"}
    optimizer.param_groups[0] = {swapped.get(key, key): value for key, value in group.items()}
    with pytest.raises(TypeError, match=r"^momentum must be a number; got True$"):
        optimizer.step(GRADIENTS[:1])


@pytest.mark.parametrize("bounds", [(np.array(0.0), np.array(5.0)), (np.array([0.0, 1.0]), 5.0)])
def test_bounds_are_checked_however_equal_they_are(bounds: Any) -> None:
    optimizer = LARS([START[0].copy()], **OPTIONS, trust_bounds=(0.0, 5.0))
    optimizer.step(GRADIENTS[:1])
    optimizer.param_groups[0]["trust_bounds"] = bounds
    with pytest.raises(TypeError, match=r"^trust_bounds must be None or a pair of numbers"):
        optimizer.step(GRADIENTS[:1])


def test_a_schedule_may_return_another() -> None:
    p = np.zeros(1)
    optimizer = LARS([p], lambda step: lambda step: 0.5 * (step + 1))
    for moved in (-0.5, -1.5, -3.0):
        optimizer.step([np.ones(1)])
        assert p.tolist() == [moved]


def test_a_function_as_rule_is_no_obstacle_to_pickling() -> None:
    optimizer = LARS([START[0].copy()], **OPTIONS, rule=own_rule)
    optimizer.step(GRADIENTS[:1])
    assert pickle.loads(pickle.dumps(optimizer)).steps == 1


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_remembers_nothing_wrong(twin: Any) -> None:
    params = [p.copy() for p in START]
    optimizer = LARS(params, **OPTIONS)
    optimizer.step(GRADIENTS)
    other = twin(optimizer)
    other.param_groups[0]["lr"] = 0.25
    for one in (optimizer, other):
        one.step(GRADIENTS)
        one.step(GRADIENTS)
    here = [p.copy() for p in START]
    plain = LARS(here, **OPTIONS)
    plain.step(GRADIENTS)
    plain.param_groups[0]["lr"] = 0.25
    plain.step(GRADIENTS)
    plain.step(GRADIENTS)
    assert_same(other.param_groups[0]["params"], here)


NUMBERS: dict[str, Any] = {
    "lr": 0.25,
    "momentum": 0.5,
    "dampening": 0.5,
    "weight_decay": 0.1,
    "trust_coefficient": 0.01,
    "eps": 1.0,
    "rescale_grad": 0.5,
    "max_grad_norm": 0.1,
}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", NUMBERS)
def test_every_number_may_be_a_function_of_the_step(name: str, kernel: str) -> None:
    values = [NUMBERS[name] * (step + 1) for step in range(3)]
    params = [p.copy() for p in START]
    optimizer = LARS(params, **OPTIONS | {name: values.__getitem__}, kernel=kernel)
    for _ in values:
        optimizer.step(GRADIENTS)
    assert_same(params, steps(kernel, *({name: value} for value in values)))


@pytest.mark.parametrize("name", NUMBERS)
def test_a_function_of_the_step_in_pure_steps(name: str) -> None:
    values = [NUMBERS[name] * (step + 1) for step in range(3)]
    ours = theirs = [p.copy() for p in START]
    mine, state = init(ours), init(theirs)
    for value in values:
        ours, mine = update(ours, GRADIENTS, mine, **OPTIONS | {name: lambda step: values[int(step)]})
        theirs, state = update(theirs, GRADIENTS, state, **OPTIONS | {name: value})
    assert_same(ours, theirs)


def test_a_function_of_the_step_is_checked_at_each_step() -> None:
    optimizer = LARS([START[0].copy()], **OPTIONS | {"weight_decay": lambda step: 0.1 - 0.1 * step})
    optimizer.step(GRADIENTS[:1])
    optimizer.step(GRADIENTS[:1])
    with pytest.raises(ValueError, match=r"^Invalid weight_decay value: -0\.1"):
        optimizer.step(GRADIENTS[:1])
    assert optimizer.steps == 2
    with pytest.raises(TypeError, match=r"^adapt must be True or False; got <function"):
        LARS([START[0].copy()], lr=1.0, adapt=lambda step: True)


def test_momentum_that_starts_at_zero() -> None:
    params, here = ([p.copy() for p in START] for _ in range(2))
    optimizer = LARS(params, **OPTIONS | {"momentum": lambda step: 0.0 if step == 0 else 0.9})
    plain = LARS(here, **OPTIONS | {"momentum": 0.0})
    for step in range(3):
        optimizer.step(GRADIENTS)
        plain.param_groups[0]["momentum"] = 0.0 if step == 0 else 0.9
        plain.step(GRADIENTS)
    assert_same(params, here)
