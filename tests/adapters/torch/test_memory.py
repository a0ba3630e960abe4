"""Torch tensors are written to in place as well: what NumPy arrays are refused for, they must be."""

from __future__ import annotations

import numpy as np
import pytest

from lars_array import LARS, init, update

torch = pytest.importorskip("torch")


def test_a_gradient_that_is_the_parameter_is_refused() -> None:
    p = torch.ones(3)
    optimizer = LARS([p], lr=0.1)
    with pytest.raises(ValueError, match="must not share memory"):
        optimizer.step([p])
    assert torch.equal(p, torch.ones(3))


def test_a_gradient_with_a_graph_leaves_no_graph_in_the_parameters() -> None:
    # From backward(create_graph=True), say: each step would hang on to the graph of the one before.
    p = torch.ones(3)
    g = torch.ones(3, requires_grad=True) * 2
    optimizer = LARS([p], lr=0.1, momentum=0.9)
    optimizer.step([g])
    assert not p.requires_grad and p.grad_fn is None
    assert not optimizer.state_dict()["state"]["0"]["momentum_buffer"].requires_grad


@pytest.mark.filterwarnings("ignore:torch.asarray:UserWarning")  # of the result's graph, which is wanted here
def test_update_can_be_differentiated() -> None:
    g = torch.full((3,), 0.5, dtype=torch.float64, requires_grad=True)
    params = {"w": torch.ones(3, dtype=torch.float64)}
    new, _ = update(params, {"w": g}, init(params), lr=0.1, weight_decay=0.1, nonfinite="propagate")
    new["w"].sum().backward()
    assert g.grad is not None and bool((g.grad != 0).all())


def test_parameters_of_another_library_do_not_disturb() -> None:
    # Names of dtypes are remembered; two libraries' float64 must not be taken for the same one, nor be compared.
    strict = pytest.importorskip("array_api_strict")
    for one in (np.ones(3), strict.ones(3), torch.ones(3, dtype=torch.float64)):
        LARS([one], lr=0.1).step([one * 2])
    for one in (strict.ones(3), np.ones(3)):
        LARS([one], lr=0.1).step([one * 2])
