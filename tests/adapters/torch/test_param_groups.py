"""`param_groups` of a torch model: as of arrays, and by types of modules."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lars_array
from lars_array import is_bias_or_norm
from lars_torch import LARS, param_groups
from lars_torch.param_groups import NORMALIZATIONS


class RMSNorm(nn.Module):
    """A user's own, and Llama's and T5's."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))


class LayerScale(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(size))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.ln = nn.LayerNorm((4, 3))
        self.rms = RMSNorm(4)
        self.scale = LayerScale(4)
        self.temperature = nn.Parameter(torch.ones(()))
        self.attention = nn.MultiheadAttention(4, 2)
        self.rnn = nn.LSTM(4, 4)
        self.wide = nn.Module()
        self.wide.bias = nn.Parameter(torch.ones(1, 4, 1))
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.tied = nn.Linear(4, 5, bias=False)
        self.tied.weight = self.embedding.weight


def names(groups: list[dict[str, Any]]) -> dict[tuple[bool, bool], set[str]]:
    """Return names by (decays, adapts)."""
    return {(g["weight_decay"] != 0, g.get("adapt", True)): {name for name, _ in g["params"]} for g in groups}


WEIGHTS = {"embedding.weight", "conv.weight", "attention.in_proj_weight", "attention.out_proj.weight"}
WEIGHTS |= {"rnn.weight_ih_l0", "rnn.weight_hh_l0"}
ALL = {name for name, p in Model().named_parameters() if p.requires_grad}


def test_by_default_what_has_one_axis_biases_and_norms_are_excluded() -> None:
    groups = param_groups(Model(), 1e-4, named=True)
    assert names(groups) == {(True, True): WEIGHTS, (False, False): ALL - WEIGHTS}
    assert [{k: v for k, v in g.items() if k != "params"} for g in groups] == [
        {"weight_decay": 1e-4},
        {"weight_decay": 0.0, "adapt": False},
    ]
    plain = param_groups(Model(), 1e-4)
    assert all(isinstance(p, nn.Parameter) for group in plain for p in group["params"])
    assert [len(a["params"]) for a in plain] == [len(b["params"]) for b in groups]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            {"no_decay": [nn.Embedding]},
            {(True, True): WEIGHTS - {"embedding.weight"}, (False, False): ALL - WEIGHTS | {"embedding.weight"}},
        ),
        (
            {"no_decay": nn.Embedding},
            {(True, True): WEIGHTS - {"embedding.weight"}, (False, False): ALL - WEIGHTS | {"embedding.weight"}},
        ),
        ({"no_decay": [*NORMALIZATIONS, RMSNorm]}, {(True, True): WEIGHTS, (False, False): ALL - WEIGHTS}),
        ({"no_adapt": None}, {(True, True): WEIGHTS, (False, True): ALL - WEIGHTS}),
        ({"no_decay": None, "no_adapt": None}, {(True, True): ALL}),
        (
            {"no_decay": [is_bias_or_norm, "rnn"], "no_adapt": ["conv"]},
            {
                (True, True): {x for x in WEIGHTS if "rnn" not in x and "conv" not in x},
                (True, False): {"conv.weight"},
                (False, False): {"conv.bias"},
                (False, True): ALL - WEIGHTS - {"conv.bias"} | {x for x in WEIGHTS if "rnn" in x},
            },
        ),
        (
            {"no_decay": lambda name, p: p.ndim == 4, "no_adapt": [nn.LSTM, "conv"]},
            {
                (True, True): {x for x in ALL if "rnn" not in x and "conv" not in x},
                (False, False): {"conv.weight"},
                (True, False): {x for x in ALL if "rnn" in x} | {"conv.bias"},
            },
        ),
    ],
    ids=lambda x: "",
)
def test_criteria_of_all_kinds(options: dict[str, Any], expected: Any) -> None:
    assert names(param_groups(Model(), 0.1, named=True, **options)) == expected


def test_other_forms_than_a_module() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    of_model = param_groups(model, 0.1)
    for form, has_names in (
        (list(model.parameters()), False),
        (model.named_parameters(), True),
        (dict(model.named_parameters()), True),
    ):
        groups = param_groups(form, 0.1)
        found = [[x[1] if has_names else x for x in group["params"]] for group in groups]
        assert [[id(p) for p in own] for own in found] == [[id(p) for p in group["params"]] for group in of_model]
        LARS(groups, lr=0.1)


def test_groups_of_each_front_end_are_taken_by_the_others() -> None:
    tensors = {"w": torch.ones(2, 3), "b": torch.ones(3)}
    for make in (lars_array.param_groups, param_groups):
        mine, theirs = ({name: x.clone() for name, x in tensors.items()} for _ in range(2))
        optimizer = LARS(make({name: p.requires_grad_() for name, p in mine.items()}, 0.1), lr=0.5, momentum=0.9)
        assert [group["param_names"] for group in optimizer.param_groups] == [["w"], ["b"]]
        arrays = lars_array.LARS(make(theirs, 0.1), lr=0.5, momentum=0.9)
        for _ in range(2):
            for p in mine.values():
                p.grad = torch.full_like(p, 0.25)
            optimizer.step()
            arrays.step({name: torch.full_like(p, 0.25) for name, p in theirs.items()})
        for name, p in mine.items():
            np.testing.assert_allclose(p.detach().numpy(), theirs[name].numpy(), rtol=1e-6)


def test_what_is_missing_or_gone_is_told() -> None:
    model = nn.Linear(2, 3)
    with pytest.warns(UserWarning, match="^no parameter matches 'bais' of no_decay; did you mean 'bias'"):
        param_groups(model, 0.1, no_decay=["bais"])
    with pytest.warns(UserWarning, match="^no parameter belongs to a module of the types LayerNorm of no_adapt"):
        param_groups(model, 0.1, no_adapt=[nn.LayerNorm])
    for options, way in (
        ({"decay_bias": True}, "takes no decay_bias any more; use no_decay and no_adapt, such as lambda name, p"),
        ({"adapt_excluded": True}, "takes no adapt_excluded any more; use no_adapt=None"),
        ({"nodecay": None}, "got an unexpected keyword argument 'nodecay'"),
    ):
        with pytest.raises(TypeError, match=way):
            param_groups(model, 0.1, **options)
    with pytest.raises(TypeError, match="no_decay can hold types of modules only if params is a module"):
        param_groups(model.parameters(), 0.1, no_decay=[nn.LayerNorm])
    with pytest.raises(ValueError, match="must have parameters that require a gradient; Linear has none"):
        param_groups(model.requires_grad_(False), 0.1)
    for bad in ("bias", 3, [3]):
        with pytest.raises(TypeError, match=r"^no_decay must be a predicate, a list of regular expressions or None"):
            param_groups(nn.Linear(2, 3), 0.1, no_decay=bad)
