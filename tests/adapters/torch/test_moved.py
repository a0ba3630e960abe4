"""What becomes of tensors between two steps: memory under the same tensor, options taken back, parameters replaced."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch

from lars_torch import LARS


def parameter(value: Any = 1.0, size: int = 4, kind: Any = torch.float32) -> torch.nn.Parameter:
    p = torch.nn.Parameter(torch.full((size,), value, dtype=kind))
    p.grad = torch.ones_like(p)
    return p


def put_elsewhere(v: torch.Tensor) -> None:
    v.data = v.data.clone()


def set_elsewhere(v: torch.Tensor) -> None:
    v.set_(v.clone())


def shared(v: torch.Tensor) -> None:
    v.share_memory_()


@pytest.mark.parametrize("loaded", [True, False])
@pytest.mark.parametrize("move", [put_elsewhere, set_elsewhere, shared])
def test_buffers_are_followed_to_where_their_owner_puts_them(move: Any, loaded: bool) -> None:
    p = parameter()
    optimizer = LARS([p], lr=0.1, momentum=0.9)
    optimizer.step()
    if loaded:
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        optimizer.step()
    buffer = optimizer.state[p]["momentum_buffer"]
    before = buffer[0].item()
    move(buffer)
    for _ in range(2):
        optimizer.step()
        before = 0.9 * before + 1
        assert optimizer.state[p]["momentum_buffer"][0].item() == pytest.approx(before)
        assert optimizer.state_dict()["state"][0]["momentum_buffer"][0].item() == pytest.approx(before)
    optimizer.state[p]["momentum_buffer"].data = torch.zeros(4)
    start = p[0].item()
    optimizer.step()
    assert start - p[0].item() == pytest.approx(0.1, rel=1e-5)


def test_masters_are_followed_too() -> None:
    p = parameter(kind=torch.float16)
    optimizer = LARS([p], lr=0.1, master_weights=True)
    optimizer.step()
    master = optimizer.state[p]["master"]
    master.data = torch.full((4,), 3.0)
    optimizer.step()
    assert p[0].item() == pytest.approx(2.9, rel=1e-3)
    assert optimizer.state_dict()["state"][0]["master"][0].item() == pytest.approx(2.9)


def test_a_group_that_wants_no_masters_any_more_forgets_its_own() -> None:
    params = [parameter(size=1, kind=torch.float16) for _ in range(2)]
    optimizer = LARS([{"params": [p]} for p in params], lr=0.1, master_weights=True)
    optimizer.step()
    optimizer.param_groups[1]["master_weights"] = False
    for _ in range(3):
        optimizer.step()
    assert [list(optimizer.state[p]) for p in params] == [["master"], []]
    optimizer.param_groups[1]["master_weights"] = True
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
    assert params[1].item() == pytest.approx(0.4, rel=1e-2)


def test_a_model_cast_to_float_has_no_masters() -> None:
    model = torch.nn.Linear(2, 2).half()
    optimizer = LARS(model.parameters(), lr=0.1, momentum=0.9, master_weights=True)
    for turn in range(2):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        assert all(("master" in own) == (turn == 0) for own in optimizer.state.values())
        optimizer.zero_grad()
        model.float()


def test_a_parameter_that_became_a_conjugate_is_refused() -> None:
    p = torch.nn.Parameter(torch.tensor([1 + 2j]))
    optimizer = LARS([p], lr=0.1)
    p.grad = torch.full((1,), 1j)
    optimizer.step()
    p.data = p.data.conj()
    before = p.detach().resolve_conj().clone()
    with pytest.raises(TypeError):
        optimizer.step()
    assert torch.equal(p.detach().resolve_conj(), before)


def test_a_parameter_that_was_replaced_is_let_go() -> None:
    optimizer = LARS([parameter()], lr=0.1, momentum=0.9)
    optimizer.step()
    gone = weakref.ref(optimizer.param_groups[0]["params"][0])
    optimizer.state.clear()
    optimizer.param_groups[0]["params"] = [parameter()]
    optimizer.step()
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("how_many", [1, 2])
def test_a_compiled_step_steps_what_was_put_into_a_group_since(how_many: int) -> None:
    def trained(compiled: bool) -> list[float]:
        torch._dynamo.reset()
        old = [parameter() for _ in range(2)]
        optimizer = LARS(old, lr=0.1)
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        step()
        new = [parameter() for _ in range(how_many)]
        for p in old[:how_many]:
            p.grad = None
        optimizer.param_groups[0]["params"] = [*new, *old[how_many:]]
        for _ in range(3):
            step()
        return [p[0].item() for p in (*new, *old[how_many:])]

    assert trained(True) == trained(False)
