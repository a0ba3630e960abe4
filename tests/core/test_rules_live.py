"""Rules beside their originals, where these are installed, and presets."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
from assertions import assert_close, assert_refused, to_numpy

from lars_array import LARS, RULES, init, preset, update
from lars_array.rules import PRESETS

SHAPES = {"conv": (4, 3, 2), "bias": (4,), "head": (2, 4)}
LRS = [0.5 * (1 + np.cos(t)) + 0.01 * t for t in range(20)]


def draw(seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape) for name, shape in SHAPES.items()}


GRADS = [draw(100 + t) for t in range(20)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.9},
        {"momentum": 0.9, "weight_decay": 0.1},
        {"momentum": 0.9, "weight_decay": 0.1, "nesterov": True},
        {"momentum": 0.5, "weight_decay": 0.1, "dampening": 0.25},
        {"weight_decay": 0.1, "trust_coefficient": 0.5, "eps": 0.1},
    ],
    ids=str,
)
@pytest.mark.parametrize("kernel", ["blocked", "portable"])
def test_flash_is_torch_optimizers_lars(options: dict[str, Any], kernel: str) -> None:
    torch = pytest.importorskip("torch")
    original = pytest.importorskip("torch_optimizer").LARS
    initial = draw(0)
    theirs = {name: torch.tensor(p, requires_grad=True) for name, p in initial.items()}
    ours = {name: p.copy() for name, p in initial.items()}

    def groups(params: dict[str, Any]) -> list[dict[str, Any]]:
        apart = {"weight_decay": 0.0, "momentum": 0.8}
        return [{"params": [params["conv"], params["head"]]}, {"params": [params["bias"]], **apart}]

    reference = original(groups(theirs), **{"lr": 1.0, "trust_coefficient": 0.001} | options)
    optimizer = LARS(groups(ours), lr=1.0, kernel=kernel, **options)
    for t, (lr, grads) in enumerate(zip(LRS, GRADS, strict=True)):
        for group in [*reference.param_groups, *optimizer.param_groups]:
            group["lr"] = lr
        given = {name: None if (t, name) == (3, "head") else g for name, g in grads.items()}
        for name, p in theirs.items():
            p.grad = None if given[name] is None else torch.tensor(given[name])
        reference.step()
        optimizer.step([given["conv"], given["head"], given["bias"]])
        for name, p in ours.items():
            assert_close(p, theirs[name].detach().numpy(), 1e-12)


def test_the_signature_differs_from_torch_optimizers_in_two_defaults() -> None:
    original = inspect.signature(pytest.importorskip("torch_optimizer").LARS).parameters
    ours = [p for p in inspect.signature(LARS).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [p.name for p in ours] == list(original)
    differing = {p.name for p in ours if p.default != original[p.name].default}
    assert differing == {"lr", "trust_coefficient"}


@pytest.mark.parametrize(
    "options",
    [
        {"momentum": 0.9},
        {"momentum": 0.9, "weight_decay": 0.1},
        {"momentum": 0.9, "weight_decay": 0.1, "nesterov": True},
        {"momentum": 0.0, "weight_decay": 0.1, "trust_coefficient": 0.5, "eps": 0.1},
    ],
    ids=str,
)
@pytest.mark.parametrize("xp", ["numpy", "jax"], indirect=True)
def test_optax_is_optaxs_lars(options: dict[str, Any], xp: Any) -> None:
    jax, optax = pytest.importorskip("jax"), pytest.importorskip("optax")
    with jax.enable_x64(True):
        lr = jax.numpy.asarray(LRS)
        transformation = optax.lars(lambda step: lr[step], **options)
        theirs = jax.tree.map(jax.numpy.asarray, draw(0))
        their_state = transformation.init(theirs)
        ours = {name: xp.asarray(p) for name, p in draw(0).items()}
        state = init(ours)
        in_place = draw(0)
        given = {"eps": 0.0, "rule": "optax"} | options
        optimizer = LARS(in_place, lr=LRS.__getitem__, **given)
        for t, grads in enumerate(GRADS):
            updates, their_state = transformation.update(jax.tree.map(jax.numpy.asarray, grads), their_state, theirs)
            theirs = optax.apply_updates(theirs, updates)
            ours, state = update(ours, {name: xp.asarray(g) for name, g in grads.items()}, state, lr=LRS[t], **given)
            optimizer.step(grads)
            for name in SHAPES:
                assert_close(ours[name], theirs[name], 1e-12)
                assert_close(in_place[name], theirs[name], 1e-12)


@pytest.mark.parametrize("name", sorted(RULES))
def test_every_preset_makes_an_optimizer(name: str) -> None:
    options = preset(name)
    assert options == {"rule": name, **PRESETS.get(name, {})}
    p = np.array([3.0, 4.0])
    optimizer = LARS([p], lr=0.1, **options)
    assert {key: optimizer.param_groups[0][key] for key in options} == options
    optimizer.step([np.array([0.3, 0.4])])
    assert np.all(np.isfinite(to_numpy(p)))
    options["momentum"] = 0.123
    assert preset(name).get("momentum") != 0.123


def test_presets_are_of_rules_there_are() -> None:
    assert PRESETS.keys() <= RULES.keys()
    message = f"name must be one of {', '.join(sorted(RULES))}; got 'larc'"
    assert_refused(lambda: preset("larc"), ValueError, message)


def test_the_preset_of_optax_has_optaxs_defaults() -> None:
    original = inspect.signature(pytest.importorskip("optax").lars).parameters
    group = LARS([np.ones(1)], lr=0.1, **preset("optax")).param_groups[0]
    for name in ("weight_decay", "trust_coefficient", "eps", "momentum", "nesterov"):
        assert group[name] == original[name].default


def test_the_preset_of_torch_optimizer_has_its_defaults() -> None:
    original = inspect.signature(pytest.importorskip("torch_optimizer").LARS).parameters
    group = LARS([np.ones(1)], lr=0.1, **preset("torch-optimizer")).param_groups[0]
    for name in ("weight_decay", "trust_coefficient", "eps", "momentum", "nesterov", "dampening"):
        assert group[name] == original[name].default
