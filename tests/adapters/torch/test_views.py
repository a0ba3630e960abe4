"""Whose memory a step works on: the tensors' own, found anew when it moves, and given back when it is done with."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from typing import Any

import numpy as np
import pytest
import torch

from lars_torch import LARS
from lars_torch._arrays import view

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128]
LAYOUTS: dict[str, Any] = {
    "dense": lambda x: x,
    "transposed": lambda x: x.T,
    "strided": lambda x: x[::2, 1:],
    "scalar": lambda x: x[0, 0],
    "channels last": lambda x: x.reshape(1, 2, 3, 4).to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("arrange", LAYOUTS.values(), ids=LAYOUTS)
def test_views_lie_where_their_tensors_do(dtype: torch.dtype, arrange: Any) -> None:
    tensor = arrange(torch.arange(24).to(dtype).reshape(4, 6))
    array = view(tensor)
    assert array.__array_interface__["data"][0] == tensor.data_ptr()
    assert array.shape == tuple(tensor.shape) and array.dtype.name == str(dtype).removeprefix("torch.")
    assert array.strides == tuple(tensor.element_size() * stride for stride in tensor.stride())
    array[...] = 7
    assert (tensor == 7).all()


def test_a_view_keeps_memory_alive_and_is_not_kept() -> None:
    tensor = torch.ones(1000)
    alive = weakref.ref(tensor.untyped_storage())
    array = view(tensor)
    del tensor
    gc.collect()
    assert alive() is not None and (array == 1).all()
    del array
    gc.collect()
    assert alive() is None


def test_a_step_asks_for_no_dlpack_whose_memory_is_read_only_in_older_numpy_and_torch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def read_only(x: Any) -> Any:
        array = np.array(x)
        array.setflags(write=False)
        return array

    monkeypatch.setattr(np, "from_dlpack", read_only)
    for dtype in DTYPES:
        p = torch.nn.Parameter(torch.ones(3, dtype=dtype))
        p.grad = torch.full_like(p, 0.5)
        LARS([p], lr=1.0, momentum=0.9).step()
        assert torch.equal(p, torch.full_like(p, 0.5))


def test_a_view_lets_its_tensor_free_its_storage() -> None:
    tensor = torch.ones(3)
    view(tensor)[...] = 2
    tensor.untyped_storage().resize_(0)  # numpy() would forbid this for ever
    with pytest.raises((TypeError, ValueError)):  # in words of NumPy's, which differ from release to release
        view(tensor)


@pytest.mark.parametrize("lazy", [lambda z: z.conj(), lambda z: z.conj().imag], ids=["conj", "neg"])
def test_a_lazy_tensor_has_no_view(lazy: Any) -> None:
    with pytest.raises(BufferError, match="other numbers than its memory"):
        view(lazy(torch.ones(3, dtype=torch.complex64)))


def test_momentum_buffers_are_the_memory_that_is_stepped() -> None:
    p = torch.nn.Parameter(torch.ones(5))
    optimizer = LARS([p], lr=0.1, momentum=0.9)
    for _ in range(2):
        p.grad = torch.ones(5)
        optimizer.step()
    buffer = optimizer.state[p]["momentum_buffer"]
    assert torch.equal(buffer, torch.full((5,), 1.9))
    buffer.zero_()  # in place: the same memory
    p.grad = torch.ones(5)
    optimizer.step()
    assert optimizer.state[p]["momentum_buffer"] is buffer
    assert torch.equal(optimizer.state[p]["momentum_buffer"], torch.ones(5))
    optimizer.state[p]["momentum_buffer"] = torch.full((5,), 10.0)  # other memory
    p.grad = torch.ones(5)
    optimizer.step()
    assert torch.equal(optimizer.state[p]["momentum_buffer"], torch.full((5,), 10.0))
    del optimizer.state[p]  # and none at all
    p.grad = torch.ones(5)
    optimizer.step()
    assert torch.equal(optimizer.state[p]["momentum_buffer"], torch.ones(5))


def test_gradients_are_freed() -> None:
    p = torch.nn.Parameter(torch.ones(100_000))
    optimizer = LARS([p], lr=0.1, momentum=0.9)
    for _ in range(3):
        (p * 2).sum().backward()
        storage = weakref.ref(p.grad.untyped_storage())
        optimizer.step()
        optimizer.zero_grad()
        gc.collect()
        assert storage() is None


def test_an_optimizer_in_the_backward_pass_frees_each_gradient() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(3)))
    twin = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(3)))
    twin.load_state_dict(model.state_dict())
    options: dict[str, Any] = {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.1, "trust_coefficient": 0.1}
    optimizers = {p: LARS([p], **options) for p in model.parameters()}

    def step(p: Any) -> None:
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step)
    whole = LARS(twin.parameters(), **options)
    for t in range(4):
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(t))
        model(x).square().sum().backward()
        assert all(p.grad is None for p in model.parameters())
        whole.zero_grad()
        twin(x).square().sum().backward()
        whole.step()
    assert all(map(torch.equal, model.parameters(), twin.parameters()))


def test_parameters_and_gradients_may_move() -> None:
    generator = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter(torch.randn(6, 4, generator=generator))
    q = torch.nn.Parameter(p.detach().clone())
    options: dict[str, Any] = {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.1}
    ours, still = LARS([p], **options), LARS([q], **options)
    q.grad = torch.empty_like(q)
    for t in range(6):
        p.grad = torch.randn(6, 4, generator=generator)
        q.grad.copy_(p.grad)
        ours.step()
        still.step()
        if t == 2:
            p.data = p.data.clone()
        if t == 4:
            p.data = p.data.T.contiguous().T
        assert torch.equal(p, q)


def test_what_is_overwritten_is_not_used_for_gradients() -> None:
    p = torch.nn.Parameter(torch.full((3,), 2.0))
    optimizer = LARS([p], lr=0.1, momentum=0.9)
    p.grad = torch.ones(3)
    optimizer.step()
    for tensor in (p, optimizer.state[p]["momentum_buffer"]):
        loss = (torch.ones(3, requires_grad=True) * p.detach() * tensor).sum()
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_a_gradient_that_is_lazily_conjugated_is_taken_as_what_it_means() -> None:
    p = torch.zeros(3, dtype=torch.complex64, requires_grad=True)
    optimizer = LARS([p], lr=1.0)
    z = torch.tensor([1 + 2j, 3 - 1j, 2j])
    for _ in range(2):
        p.grad = z.conj()
        assert p.grad.is_conj()
        optimizer.step()
    assert torch.equal(p.detach(), -2 * z.conj().resolve_conj())


def test_a_gradient_in_the_place_of_one_that_was_lazily_conjugated() -> None:
    # What a lazy gradient was resolved to is gone after the step.
    p, plain = torch.nn.Parameter(torch.zeros(3, dtype=torch.complex64)), torch.tensor([1j, 2.0, 3 - 1j])
    optimizer = LARS([p], lr=1.0)
    for grad in (plain.conj(), plain, plain, plain.conj()):
        before, p.grad = p.detach().clone(), grad
        optimizer.step()
        assert torch.equal(p, before - grad)


def test_a_real_gradient_that_becomes_lazily_negated() -> None:
    p, z = torch.nn.Parameter(torch.zeros(3)), torch.tensor([1 + 2j, 3 - 1j, 2j])
    optimizer = LARS([p], lr=1.0)
    for grad in (z.imag, z.conj().imag, z.conj().imag, z.imag):  # of one layout, in the same memory
        before, p.grad = p.detach().clone(), grad
        optimizer.step()
        assert torch.equal(p, before - grad)


def test_a_gradient_that_moves_and_changes_its_layout() -> None:
    p = torch.nn.Parameter(torch.zeros(3, 2))
    optimizer = LARS([p], lr=1.0)
    g = torch.arange(6.0).reshape(3, 2)
    held = []
    for arrange in (lambda x: x, lambda x: x, lambda x: x.T.contiguous().T, lambda x: x.T.contiguous().T, lambda x: x):
        before, p.grad = p.detach().clone(), arrange(g.clone())
        optimizer.step()
        assert torch.equal(p, before - g)
        held.append(p.grad)  # so that the next one lies elsewhere


def test_import_brings_neither_cupy_nor_numba_nor_jax() -> None:
    script = "import sys, lars_torch; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout.split()
    assert not {"cupy", "numba", "jax"} & set(loaded)


def test_without_bfloat16_in_numpy_torch_does_the_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    def stepped() -> Any:
        p = torch.nn.Parameter(torch.full((40,), 3.0).bfloat16())
        optimizer = LARS([p], lr=0.5, momentum=0.9, weight_decay=0.1)
        for _ in range(3):
            p.grad = torch.full((40,), 0.25).bfloat16()
            optimizer.step()
        return p.detach(), optimizer.state[p]["momentum_buffer"], optimizer._parts[0]._library

    ours = stepped()
    monkeypatch.setattr("lars_torch._arrays.has_bfloat16", lambda: False)
    theirs = stepped()
    assert (ours[2], theirs[2]) == ("numpy", "torch")
    torch.testing.assert_close(ours[:2], theirs[:2])


def test_numpys_own_memory_is_stepped_and_read_only_memory_is_not_asked_of_numpy() -> None:
    array = np.ones(4, np.float32)
    p = torch.from_numpy(array).requires_grad_()
    p.grad = torch.ones(4)
    LARS([p], lr=0.5).step()
    assert array.tolist() == [0.5] * 4
