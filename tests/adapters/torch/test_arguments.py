"""Wrong arguments are told as what they are, in messages that a person can read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lars_torch import LARS

MODEL = nn.Linear(3, 2)


def used_up() -> Any:
    params = MODEL.parameters()
    list(params)
    return params


WRONG: dict[str, tuple[Callable[[], Any], Any, str]] = {
    "module": (lambda: LARS(MODEL, lr=0.1), TypeError, "got the module Linear, give its parameters"),
    "module in a group": (
        lambda: LARS([{"params": MODEL}], lr=0.1),
        TypeError,
        "params of parameter group 0 must be parameters; got the module Linear",
    ),
    "modules": (lambda: LARS([MODEL], lr=0.1), TypeError, "parameter '0' of group 0 is .*Linear; give its parameters"),
    "optimizer": (
        lambda: LARS(torch.optim.SGD(MODEL.parameters(), lr=0.1)),
        TypeError,
        "LARS is an optimizer itself and wraps none, got SGD",
    ),
    "swapped": (lambda: LARS(0.1, MODEL.parameters()), TypeError, "and lr a number; got float 0.1 first"),
    "mapping": (lambda: LARS(dict(MODEL.named_parameters()), lr=0.1), TypeError, "got a mapping, give its items"),
    "numpy": (lambda: LARS([np.ones(3)], lr=0.1), TypeError, "arrays of NumPy are stepped by lars_array.LARS"),
    "used up": (lambda: LARS(used_up(), lr=0.1), ValueError, "params is a generator that was used up before"),
    "used up in a group": (
        lambda: LARS([{"params": MODEL.parameters()}, {"params": used_up()}], lr=0.1),
        ValueError,
        "params of parameter group 1 is a generator that was used up before",
    ),
    "tensor": (lambda: LARS(torch.ones(3), lr=0.1), TypeError, "should be an iterable of Tensors or dicts"),
    "list as lr": (lambda: LARS(MODEL.parameters(), [0.1] * 100_000), TypeError, "lr must be a number or a tensor"),
    "module as lr": (lambda: LARS(MODEL.parameters(), MODEL), TypeError, "lr must be a number or a tensor"),
    "loss as closure": (
        lambda: LARS(MODEL.parameters(), lr=0.1).step(torch.ones(100_000)),
        TypeError,
        "closure must be a function that returns the loss; got Tensor of shape",
    ),
    "group out of range": (
        lambda: LARS([{"params": [torch.ones(1)]}, {"params": [torch.ones(1)], "lr": -1.0}], lr=0.1),
        ValueError,
        r"Invalid learning rate: -1.0 \(parameter group 1\)",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(case: str) -> None:
    call, kind, message = WRONG[case]
    with pytest.raises(kind, match=message) as caught:
        call()
    assert len(str(caught.value)) <= 500


@pytest.mark.parametrize("given", [iter, lambda x: (p for p in x), lambda x: map(torch.Tensor.detach, x), set, tuple])
@pytest.mark.filterwarnings("ignore:optimizer parameters need to be organized in ordered")  # of sets, since torch 2.15
def test_any_iterable_of_parameters_is_taken(given: Callable[[Any], Any]) -> None:
    assert len(LARS(given(list(MODEL.parameters())), lr=0.1).param_groups[0]["params"]) == 2


@pytest.mark.parametrize("name", ["lr", "momentum", "weight_decay", "rule"])
def test_hyper_parameters_are_no_attributes(name: str) -> None:
    optimizer = LARS(MODEL.parameters(), lr=0.1)
    with pytest.raises(AttributeError, match=rf"{name} belongs to the parameter groups: write .*\['{name}'\] = 0.2"):
        setattr(optimizer, name, 0.2)


def parameter(size: int = 3) -> nn.Parameter:
    p = nn.Parameter(torch.ones(size))
    p.grad = torch.ones(size)
    return p


def test_a_parameter_replaced_in_its_group_is_stepped_as_by_sgd() -> None:
    p, q = parameter(), parameter()
    optimizer = LARS([p], lr=0.1, momentum=0.9)
    optimizer.step()
    optimizer.param_groups[0]["params"][0] = q
    optimizer.step()
    assert torch.allclose(q, torch.tensor(0.9)) and torch.allclose(p, torch.tensor(0.9))
    optimizer.param_groups[0]["params"][0] = np.ones(3)
    with pytest.raises(TypeError, match=r"parameter '0' of group 0 is numpy\.ndarray"):
        optimizer.step()


def test_a_rejected_step_names_parameter_group_and_step() -> None:
    p, q = parameter(), parameter()
    optimizer = LARS([{"params": [p]}, {"params": [q]}], lr=0.1, nonfinite="raise")
    optimizer.step()
    q.grad = torch.full((3,), torch.nan)
    with pytest.raises(ValueError, match=r"the gradient of '1' has 3 .*\(parameter group 1, step 2\)"):
        optimizer.step()
    q.grad = None
    q.grad = torch.ones(3).to_sparse()
    with pytest.raises(TypeError, match=r"the gradient of '1' must be dense.*\(parameter group 1, step 3\)"):
        optimizer.step()
    optimizer.param_groups[0]["lr"] = -1.0
    with pytest.raises(ValueError, match=r"Invalid learning rate: -1.0.*step 4\)"):
        optimizer.step()
    assert torch.allclose(p, torch.tensor(0.9)) and torch.equal(p, q)


def test_messages_stay_short_with_long_names() -> None:
    optimizer = LARS([("layer." * 1000, parameter())], lr=0.1)
    optimizer.param_groups[0]["params"][0].grad = torch.ones(3).to_sparse()
    with pytest.raises(TypeError) as caught:
        optimizer.step()
    assert len(str(caught.value)) <= 500
