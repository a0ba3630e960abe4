"""Types and layouts of tensors, as torch compares them in C++ and as `lars_torch` does by their attributes."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import pytest
import torch

from lars_torch import _arrays
from lars_torch._arrays import TensorSpecs

WAYS = ["guards", "attributes"]
SHAPE = (4, 6)

# Of these a step must take notice.
OTHERS: dict[str, Callable[[], torch.Tensor]] = {
    "another shape": lambda: torch.zeros(6, 4),
    "fewer axes": lambda: torch.zeros(24),
    "another type": lambda: torch.zeros(SHAPE, dtype=torch.float64),
    "other strides": lambda: torch.zeros(6, 4).T,
    "not contiguous": lambda: torch.zeros(4, 12)[:, ::2],
    "lazily negated": lambda: torch.complex(torch.zeros(SHAPE), torch.zeros(SHAPE)).conj().imag,
    "another class": lambda: torch.nn.Parameter(torch.zeros(SHAPE)),
    "sparse": lambda: torch.zeros(SHAPE).to_sparse(),
}


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Have tensors compared in one of two ways."""
    name: str = request.param
    if name == "attributes":
        monkeypatch.setattr(_arrays, "_guards_of", lambda tensors: None)
    return name


def tensors() -> list[torch.Tensor]:
    return [torch.zeros(3), torch.zeros(SHAPE), torch.zeros(5, 2)]


def known() -> TensorSpecs:
    """Return specs that have compared tensors once, after which guards are there if torch has them."""
    specs = TensorSpecs(tensors())
    assert specs.addresses(tensors()) is not None
    return specs


def test_this_torch_has_the_comparison_in_cpp() -> None:
    assert known()._guards is not None


def test_tensors_elsewhere_are_recognised(way: str) -> None:
    specs, new = known(), tensors()
    found = specs.addresses(new)
    assert found is not None and found.tolist() == [x.data_ptr() for x in new]


@pytest.mark.parametrize("name", OTHERS)
def test_another_tensor_is_not(way: str, name: str) -> None:
    specs, new = known(), tensors()
    new[1] = OTHERS[name]()
    assert specs.addresses(new) is None
    assert specs.addresses(tensors()) is not None


def test_a_parameter_that_is_given_other_data_is_noticed(way: str) -> None:
    p = torch.nn.Parameter(torch.zeros(SHAPE))
    specs = TensorSpecs([p])
    assert specs.addresses([p]) is not None
    p.data = p.data[:2]  # at the same address
    assert specs.addresses([p]) is None


def test_requires_grad_is_no_matter(way: str) -> None:
    specs, new = known(), tensors()
    for x in new:
        x.requires_grad_()
    assert specs.addresses(new) is not None and specs.addresses(tensors()) is not None


def test_one_gradient_of_several_parameters_is_recognised(way: str) -> None:
    g = torch.zeros(3)
    specs = TensorSpecs([g, torch.zeros(3)])
    for _ in range(2):
        found = specs.addresses([g, g])
        assert found is not None and found.tolist() == [g.data_ptr()] * 2


def test_specs_of_some_of_the_tensors(way: str) -> None:
    specs = known().at([0, 2])
    for _ in range(2):
        assert specs.addresses([torch.zeros(3), torch.zeros(5, 2)]) is not None
        assert specs.addresses([torch.zeros(3), torch.zeros(SHAPE)]) is None


def test_no_tensor_is_kept(way: str) -> None:
    new = tensors()
    specs, seen = TensorSpecs(new), [weakref.ref(x) for x in new]
    for _ in range(2):
        assert specs.addresses(new) is not None
    del new
    assert [x() for x in seen] == [None] * 3
