"""The default is SGD, as flash's: an optimizer that adapts nothing says so, once, unless that was asked for."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from lars_array import LARS, preset

MESSAGE = "no layer is adapted: with weight_decay=0 and the rule of flash, the default, LARS is plain SGD"


class Array:
    """`lars_array.LARS`."""

    def __init__(self, **options: Any) -> None:
        self.p = {"w": np.ones((2, 2)), "b": np.ones(2)}
        groups = options.pop("groups", None)
        self.optimizer = LARS(
            [{"params": {n: p}, **o} for (n, p), o in zip(self.p.items(), groups or [{}, {}])], **options
        )

    def step(self) -> None:
        self.optimizer.step({name: 0 * p for name, p in self.p.items()})


class Torch:
    """`lars_torch.LARS`."""

    def __init__(self, **options: Any) -> None:
        torch = pytest.importorskip("torch")
        import lars_torch

        self.p = [torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))]
        groups = options.pop("groups", None) or [{}, {}]
        self.optimizer = lars_torch.LARS([{"params": [p], **o} for p, o in zip(self.p, groups)], **options)
        for p in self.p:
            p.grad = torch.zeros_like(p)

    def step(self) -> None:
        self.optimizer.step()


class Jax:
    """`lars_jax.LARS`."""

    def __init__(self, **options: Any) -> None:
        jnp = pytest.importorskip("jax.numpy")
        import lars_jax

        if options.pop("groups", None) or "adapt" in options:
            pytest.skip("it has no groups")
        self.p = {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}
        self.optimizer: Any = lars_jax.LARS(self.p, **options)

    def step(self) -> None:
        self.optimizer.step({name: 0 * p for name, p in self.p.items()})


class Optax:
    """`lars_jax.lars`."""

    def __init__(self, lr: Any, **options: Any) -> None:
        jnp = pytest.importorskip("jax.numpy")
        import lars_jax

        if options.pop("groups", None) or "adapt" in options:
            pytest.skip("it has no groups")
        self.p = {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}
        self.optimizer = lars_jax.lars(lr, **options)
        self.state = self.optimizer.init(self.p)

    def step(self) -> None:
        _, self.state = self.optimizer.update({name: 0 * p for name, p in self.p.items()}, self.state, self.p)


FRONT_ENDS = [Array, Torch, Jax, Optax]
Make = Callable[..., Any]


def warned(step: Callable[[], None]) -> list[str]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        step()
    return [str(x.message) for x in found if issubclass(x.category, UserWarning)]


@pytest.mark.parametrize("make", FRONT_ENDS)
@pytest.mark.parametrize("options", [{}, {"rule": "flash"}, preset("bolts")], ids=["default", "flash", "bolts"])
def test_each_optimizer_warns_once_that_it_is_sgd(make: Make, options: dict[str, Any]) -> None:
    for _ in range(2):
        front = make(lr=0.1, momentum=0.9, **options)
        with pytest.warns(UserWarning, match=MESSAGE) as found:
            front.step()
        assert [x.filename for x in found] == [__file__]  # the line that stepped
        assert [warned(front.step) for _ in range(3)] == [[], [], []]


@pytest.mark.parametrize("make", FRONT_ENDS)
@pytest.mark.parametrize(
    "options",
    [
        {"weight_decay": 1e-4},
        {"always_adapt": True},
        {"adapt": False},
        {"rule": "paper"},
        {"rule": "timm"},
        {"groups": [{"weight_decay": 1e-4}, {}]},
        {"groups": [{}, {"rule": "barlow"}]},
        {"groups": [{}, {"adapt": False}]},
        {"groups": [{"always_adapt": True}, {}]},
    ],
    ids=lambda options: str(list(options)),
)
def test_who_adapts_something_or_has_thought_of_it_hears_nothing(make: Make, options: dict[str, Any]) -> None:
    front = make(lr=0.1, **options)
    assert warned(front.step) == []


def test_schedules_and_changes_before_the_first_step_count() -> None:
    assert warned(Array(lr=0.1, weight_decay=lambda step: 0.1).step) == []
    assert len(warned(Array(lr=0.1, weight_decay=lambda step: 0.0).step)) == 1
    for make in (Array, Torch):
        front = make(lr=0.1)
        front.optimizer.param_groups[0]["weight_decay"] = 0.1
        assert warned(front.step) == []
        front = make(lr=0.1, weight_decay=0.1)
        for group in front.optimizer.param_groups:
            group["weight_decay"] = 0
        assert len(warned(front.step)) == 1


def test_copies_that_go_on_say_nothing_more() -> None:
    front = Array(lr=0.1)
    front.step()
    for other in (copy.deepcopy(front), pickle.loads(pickle.dumps(front))):
        assert warned(other.step) == []


def test_as_an_error_it_comes_before_anything_is_written() -> None:
    front = Array(lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match=MESSAGE):
            front.optimizer.step({name: np.ones_like(p) for name, p in front.p.items()})
    assert front.p["w"].min() == 1 and front.optimizer.steps == 0


@pytest.mark.parametrize("make", [Array, Torch, Jax])
def test_the_representation_says_so_too(make: Make) -> None:
    assert "SGD" in repr(make(lr=0.1).optimizer)
    assert "SGD" not in repr(make(lr=0.1, weight_decay=0.1).optimizer)
    assert "SGD" not in repr(make(lr=0.1, rule="paper").optimizer)
    assert "SGD" not in repr(make(lr=0.1, always_adapt=True).optimizer)


def test_a_group_that_is_not_adapted_is_called_sgd_whatever_its_decay() -> None:
    optimizer = LARS([{"params": [np.ones(2)]}, {"params": [np.ones(2)], "adapt": False}], 0.1, weight_decay=0.1)
    _, first, second, _ = repr(optimizer).splitlines()
    assert not first.endswith("(SGD: its layers are not adapted)")
    assert second.endswith("(SGD: its layers are not adapted)")
