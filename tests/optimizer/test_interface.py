"""`LARS` from outside: its signature, the forms of parameters and gradients, closures."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from assertions import assert_close, assert_refused, assert_same, flash_run, flash_step

from lars_array import LARS, NonFiniteError, param_groups, warmup_cosine
from lars_array.kernels import NUMPY_KERNELS as KERNELS
from lars_array.optimizer import required

W, B = np.array([[3.0, 4.0]]), np.array([0.6, 0.8])
GW, GB = np.array([[0.3, 0.4]]), np.array([0.05, -0.12])
HYPER: dict[str, Any] = {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.1}


def arrays() -> tuple[Any, Any]:
    return W.copy(), B.copy()


def test_the_arguments_are_those_of_flash_in_its_order() -> None:
    parameters = list(inspect.signature(LARS).parameters.values())
    positional = [(p.name, p.default) for p in parameters if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    assert positional == [
        ("params", inspect.Parameter.empty),
        ("lr", required),
        ("momentum", 0),
        ("dampening", 0),
        ("weight_decay", 0),
        ("nesterov", False),
        ("trust_coefficient", 0.001),
        ("eps", 1e-8),
    ]
    assert repr(required) == "<required parameter>"
    assert [type(default) for _, default in positional[2:]] == [int, int, int, bool, float, float]


def test_the_options_that_flash_does_not_have_go_by_name() -> None:
    parameters = inspect.signature(LARS).parameters.values()
    assert {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY} == {
        "rule": "flash",
        "trust_clip": False,
        "trust_bounds": None,
        "always_adapt": False,
        "adapt": True,
        "maximize": False,
        "rescale_grad": 1.0,
        "max_grad_norm": None,
        "nonfinite": "raise",
        "layer_axes": 0,
        "layer_of": None,
        "master_weights": False,
        "kernel": None,
        "all_reduce": None,
        "layers": None,
    }
    assert [*inspect.signature(LARS.step).parameters] == ["self", "grads", "closure", "found_inf"]


def test_arguments_by_position_reach_what_they_are_named_for() -> None:
    optimizer = LARS([np.ones(2)], 0.1, 0.2, 0.3, 0.4, False, 0.5, 0.6)
    given = {"lr": 0.1, "momentum": 0.2, "dampening": 0.3, "weight_decay": 0.4, "nesterov": False}
    given |= {"trust_coefficient": 0.5, "eps": 0.6}
    group = optimizer.param_groups[0]
    assert {key: group[key] for key in given} == given
    assert {key: optimizer.defaults[key] for key in given} == given


def test_every_argument_stands_in_the_group_and_in_the_defaults() -> None:
    given = {
        "lr": 0.1,
        "momentum": 0.2,
        "dampening": 0.3,
        "weight_decay": 0.4,
        "nesterov": True,
        "trust_coefficient": 0.5,
        "eps": 0.6,
        "rule": "kozistr",
        "trust_clip": True,
        "trust_bounds": (0.1, 0.2),
        "always_adapt": True,
        "adapt": False,
        "maximize": True,
        "rescale_grad": 0.7,
        "max_grad_norm": 0.8,
        "nonfinite": "skip",
        "layer_axes": 1,
        "master_weights": True,
    }
    p = np.ones(2)
    optimizer = LARS({"p": p}, **given, kernel="portable")
    assert optimizer.defaults == given
    (group,) = optimizer.param_groups
    assert group.pop("params")[0] is p
    assert group == given | {"names": ["p"]}
    assert (optimizer.steps, optimizer.skipped_steps) == (0, 0)


def test_lr_is_required_with_the_message_of_torch() -> None:
    message = "parameter group {} didn't specify a value of required optimization parameter lr"
    assert_refused(lambda: LARS([np.ones(2)]), ValueError, message.format(0))
    groups = [{"params": [np.ones(2)], "lr": 0.1}, {"params": [np.ones(2)]}]
    assert_refused(lambda: LARS(groups), ValueError, message.format(1))


FORMS: dict[str, tuple[Callable[[Any, Any], Any], list[list[str]]]] = {
    "list": (lambda w, b: [w, b], [["0", "1"]]),
    "tuple": (lambda w, b: (w, b), [["0", "1"]]),
    "generator": (lambda w, b: (x for x in (w, b)), [["0", "1"]]),
    "values of a dict": (lambda w, b: {"w": w, "b": b}.values(), [["0", "1"]]),
    "mapping": (lambda w, b: {"w": w, "b": b}, [["w", "b"]]),
    "pairs": (lambda w, b: [("w", w), ("b", b)], [["w", "b"]]),
    "tuple of pairs": (lambda w, b: (("w", w), ("b", b)), [["w", "b"]]),
    "items": (lambda w, b: {"w": w, "b": b}.items(), [["w", "b"]]),
    "generator of pairs": (lambda w, b: (pair for pair in [("w", w), ("b", b)]), [["w", "b"]]),
    "groups": (lambda w, b: [{"params": [w]}, {"params": (x for x in [b])}], [["0"], ["1"]]),
    "tuple of groups": (lambda w, b: ({"params": [w]}, {"params": (b,)}), [["0"], ["1"]]),
    "generator of groups": (lambda w, b: ({"params": [x]} for x in (w, b)), [["0"], ["1"]]),
    "groups of mappings": (lambda w, b: [{"params": {"w": w}}, {"params": {"b": b}}], [["w"], ["b"]]),
    "groups of pairs": (lambda w, b: [{"params": [("w", w)]}, {"params": [("b", b)]}], [["w"], ["b"]]),
    "named and unnamed groups": (lambda w, b: [{"params": {"w": w}}, {"params": [b]}], [["w"], ["1"]]),
    "an empty group": (lambda w, b: [{"params": []}, {"params": [w, b]}], [[], ["0", "1"]]),
}


@pytest.mark.parametrize("form", FORMS)
def test_parameters_come_in_many_forms(form: str) -> None:
    make, names = FORMS[form]
    w, b = arrays()
    optimizer = LARS(make(w, b), **HYPER)
    assert [group["names"] for group in optimizer.param_groups] == names
    assert next(p for group in optimizer.param_groups for p in group["params"]) is w
    flat = [name for group in names for name in group]
    for grads in ([GW, GB], (GW, GB), dict(zip(flat, [GW, GB], strict=True)), list(zip(flat, [GW, GB], strict=True))):
        assert optimizer.step(grads) is None
    assert_close(w, flash_run(W, [GW] * 4, **HYPER))
    assert_close(b, flash_run(B, [GB] * 4, **HYPER))
    assert list(optimizer.norms()) == flat


def test_gradients_by_name_may_come_in_any_order_and_as_a_generator() -> None:
    w, b = arrays()
    optimizer = LARS({"w": w, "b": b}, **HYPER)
    optimizer.step({"b": GB, "w": GW})
    optimizer.step(pair for pair in [("b", GB), ("w", GW)])
    optimizer.step(g for g in (GW, GB))
    assert_close(w, flash_run(W, [GW] * 3, **HYPER))
    assert_close(b, flash_run(B, [GB] * 3, **HYPER))


def test_gradients_of_regrouped_unnamed_parameters_go_by_their_original_position() -> None:
    params = [np.full(2, 1.0), np.full((2, 1), 2.0), np.full(2, 3.0)]
    optimizer = LARS(param_groups(params, 0.0), lr=1.0)
    assert [group["names"] for group in optimizer.param_groups] == [["0", "2"], ["1"]]
    optimizer.step([np.full(2, 0.1), np.full((2, 1), 0.2), np.full(2, 0.3)])
    assert [float(p.ravel()[0]) for p in params] == [0.9, 1.8, 2.7]


def test_gradients_of_more_than_ten_regrouped_parameters_are_counted_not_spelled() -> None:
    params = [np.full(2 if i % 2 else (2, 1), float(i)) for i in range(12)]
    optimizer = LARS(param_groups(params, 0.0), lr=1.0)
    optimizer.step([np.full(p.shape, float(i)) for i, p in enumerate(params)])
    assert [float(p.ravel()[0]) for p in params] == [0.0] * 12


def test_a_further_group_does_not_change_which_gradients_are_whose() -> None:
    params = [np.full(2, 1.0), np.full((2, 1), 2.0), np.full(2, 3.0)]
    optimizer = LARS(param_groups(params, 0.0), lr=1.0)
    optimizer.add_param_group({"params": {"head": np.full(2, 4.0)}})
    grads = [np.full(2, 0.1), np.full((2, 1), 0.2), np.full(2, 0.3), np.full(2, 0.4)]
    optimizer.step(grads)
    assert [float(p.ravel()[0]) for p in params] == [0.9, 1.8, 2.7]


def test_gradients_of_named_parameters_go_in_the_order_given_whatever_the_names() -> None:
    one, zero = np.zeros(1), np.zeros(1)
    optimizer = LARS({"1": one, "0": zero}, lr=1.0)
    optimizer.step([np.array([1.0]), np.array([2.0])])
    assert (one[0], zero[0]) == (-1.0, -2.0)


def test_a_parameter_without_gradient_is_skipped_and_keeps_its_state() -> None:
    w, b = arrays()
    optimizer = LARS({"w": w, "b": b}, **HYPER | {"dampening": 0.5})
    optimizer.step([GW, None])
    assert_same(b, B)
    assert list(optimizer.norms()) == ["w"] == list(optimizer.trust_ratios())
    assert optimizer.state_dict()["state"]["b"] == {"previous_lr": 0.0}
    optimizer.step([GW, GB])  # the first step of b, so not dampened, as in flash
    before = optimizer.state_dict()["state"]["w"]
    optimizer.step({"w": None, "b": GB})
    assert_same(optimizer.state_dict()["state"]["w"], before)
    assert_close(w, flash_run(W, [GW] * 2, **HYPER, dampening=0.5))
    assert_close(b, flash_run(B, [GB] * 2, **HYPER, dampening=0.5))
    optimizer.step([GW, GB])
    assert_close(w, flash_run(W, [GW] * 3, **HYPER, dampening=0.5))


def test_a_step_without_any_gradient_counts_and_changes_nothing_else() -> None:
    w, b = arrays()
    optimizer = LARS({"w": w, "b": b}, lr=warmup_cosine(1.0, 4, warmup_steps=2), weight_decay=0.1)
    assert optimizer.step([None, None]) is None
    assert (optimizer.steps, optimizer.skipped_steps) == (1, 0)
    assert optimizer.norms() == {} == optimizer.trust_ratios()
    assert_same([w, b], [W, B])
    optimizer.step([GW, GB])
    assert_close(w, flash_step(W, GW, lr=0.5, weight_decay=0.1)[0])


def test_the_closure_is_called_once_and_its_loss_returned() -> None:
    w, b = arrays()
    optimizer = LARS({"w": w, "b": b}, **HYPER)
    calls, loss = [], object()

    def closure() -> tuple[object, Any]:
        calls.append(w.copy())
        return loss, [GW, GB]

    assert optimizer.step(closure=closure) is loss
    assert optimizer.step(None, closure) is loss
    assert len(calls) == 2
    assert_same(calls[0], W)
    assert_close(w, flash_run(W, [GW] * 2, **HYPER))


def test_what_a_closure_may_not_do() -> None:
    w, b = arrays()
    optimizer = LARS({"w": w, "b": b}, **HYPER)
    optimizer.step([GW, GB])

    def fails() -> tuple[float, Any]:
        raise RuntimeError("no data")

    pair = "closure must return the pair (loss, grads); got "
    needs = "step needs grads, or closure=... with a function that returns (loss, grads)"
    for call, kind, message in [
        (lambda: optimizer.step(closure=fails), RuntimeError, "no data"),
        (lambda: optimizer.step(closure=lambda: 1.0), TypeError, pair + "1.0"),
        (lambda: optimizer.step(closure=lambda: [1.0, [GW, GB]]), TypeError, pair + repr([1.0, [GW, GB]])),
        (lambda: optimizer.step(closure=lambda: (1.0, 2.0, 3.0)), TypeError, pair + "(1.0, 2.0, 3.0)"),
        (lambda: optimizer.step([GW, GB], fails), TypeError, "step takes grads or a closure, not both"),
        (lambda: optimizer.step(), TypeError, needs),
        (lambda: optimizer.step(fails), TypeError, needs),
        (
            lambda: optimizer.step(closure=lambda: (1.0, None)),
            TypeError,
            "grads must be an iterable of arrays or a mapping; got None",
        ),
    ]:
        assert_refused(call, kind, message, optimizer, w, b)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_refused_step_leaves_no_buffer_behind(kernel: str) -> None:
    p = np.ones(4)
    optimizer = LARS([p], lr=0.5, momentum=0.9, dampening=0.5, kernel=kernel)
    with pytest.raises(NonFiniteError):
        optimizer.step([np.full(4, np.nan)])
    optimizer.param_groups[0]["momentum"] = 0
    optimizer.step([np.ones(4)])
    assert "momentum_buffer" not in optimizer.state_dict()["state"]["0"]
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.param_groups[0]["momentum"] = 0.9
    optimizer.step([np.ones(4)])  # the first with momentum, so it is not dampened
    assert p.tolist() == [0.0] * 4


@pytest.mark.parametrize("kernel", KERNELS)
def test_running_out_of_memory_for_buffers_changes_nothing(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    p = np.ones(4)
    optimizer = LARS([p], lr=0.5, kernel=kernel)
    optimizer.step([np.ones(4)])
    optimizer.param_groups[0]["momentum"] = 0.9

    def fails(*_: Any, **__: Any) -> Any:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(np, "zeros", fails)
        with pytest.raises(MemoryError):
            optimizer.step([np.ones(4)])
    for want in (0.0, -0.95):
        optimizer.step([np.ones(4)])
        assert p.tolist() == pytest.approx([want] * 4)
