"""Parameters and gradients that are not what they seem, or no longer what they were: refused, or stepped as by SGD."""

from __future__ import annotations

import contextlib
import copy
import io
import os
import pickle
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import Parameter

from lars_torch import LARS


def parameter(*shape: int, **options: Any) -> Any:
    p = Parameter(torch.ones(*shape, **options))
    p.grad = torch.full_like(p, 0.5)
    return p


class Wrapper(torch.Tensor):
    """A tensor whose numbers are in another one, as those of a DTensor are."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    def __tensor_flatten__(self) -> Any:
        return ["inner"], None

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args = [x.inner if isinstance(x, Wrapper) else x for x in args]
        found = func(*args, **(kwargs or {}))
        return Wrapper(found) if func is torch.ops.aten.detach.default else found


# ----------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize("stepped_before", [False, True])
@pytest.mark.parametrize(
    ("gradient", "message"),
    [
        (torch.Tensor.to_sparse, "the gradient of '0' must be dense, LARS needs its norm; got one of torch.sparse_coo"),
        (Wrapper, "the gradient of '0' must be a plain tensor, LARS needs its whole norm; got a Wrapper"),
    ],
)
def test_a_gradient_that_is_not_plain_memory(gradient: Any, message: str, stepped_before: bool) -> None:
    p = parameter(3)
    optimizer = LARS([p], lr=0.1)
    if stepped_before:
        optimizer.step()
    before = p.detach().clone()
    p.grad = gradient(torch.ones(3))
    with pytest.raises(TypeError) as caught:
        optimizer.step()
    assert str(caught.value) == f"{message} (parameter group 0, step {1 + stepped_before})"
    assert torch.equal(p, before)


@pytest.mark.parametrize(
    ("p", "kind", "message"),
    [
        (lambda: torch.ones(1).expand(3), ValueError, "parameter '0' must not overlap itself"),
        (lambda: torch.ones(3, dtype=torch.complex64).conj(), TypeError, "parameter '0' must not be a lazily conj"),
    ],
)
def test_a_parameter_that_can_not_be_stepped(p: Callable[[], Any], kind: Any, message: str) -> None:
    held = Parameter(p())
    optimizer = LARS([held], lr=0.1)
    held.grad = p()
    with pytest.raises(kind, match=message):
        optimizer.step()


@pytest.mark.parametrize(
    ("p", "message"),
    [
        (torch.ones(3).to_sparse(), "must be dense, LARS needs its norm"),
        (Wrapper(torch.ones(3)), "must be a plain tensor, LARS needs its whole norm"),
        (torch.ones(3).to(torch.float8_e4m3fn), "must be of one of the types float64"),
        (torch.ones(3, dtype=torch.int64), "must be of one of the types float64"),
        (torch.ones(3, dtype=torch.bool), "must be of one of the types float64"),
    ],
    ids=["sparse", "wrapper", "float8", "int64", "bool"],
)
def test_a_parameter_that_is_refused_when_the_optimizer_is_made(p: Any, message: str) -> None:
    fine = parameter(3)
    with pytest.raises(TypeError, match=f"parameter '1' of group 0 {message}"):
        LARS([fine, p], lr=0.1)
    optimizer = LARS([("fine", fine)], lr=0.1)
    with pytest.raises(TypeError, match=f"parameter 'w' of group 1 {message}"):
        optimizer.add_param_group({"params": [("w", p)]})
    assert len(optimizer.param_groups) == 1


def test_a_parameter_without_memory() -> None:
    p = parameter(3)
    optimizer = LARS([p], lr=0.1)
    optimizer.step()
    p.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="parameter '0' must have memory; its storage was freed"):
        optimizer.step()


def test_parameters_that_overlap() -> None:
    memory = torch.ones(6)
    p, q, r = (Parameter(x) for x in (memory[:4], memory[2:], memory[4:]))
    for x in (p, q, r):
        x.grad = torch.ones_like(x)
    with pytest.raises(ValueError, match="must not overlap in memory; parameter '1' and parameter '0' do"):
        LARS([p, q], lr=0.1).step()
    with pytest.raises(ValueError, match="parameter '1' of group 0 is given twice, before as '0'"):
        LARS([p, p], lr=0.1)
    with pytest.raises(ValueError, match="parameter 'b' of group 0 is given twice, before as 'a'"):
        LARS([("a", p), ("b", p)], lr=0.1)
    with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
        LARS([{"params": [p]}, {"params": [p]}], lr=0.1)
    LARS([p, r], lr=0.1).step()
    assert torch.equal(memory, torch.full((6,), 0.9))


# ----------------------------------------------------------------------------------------- no longer what they were


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("kind", [torch.float64, torch.float16, torch.bfloat16])
def test_a_model_that_is_cast_goes_on(kind: torch.dtype, swapped: bool) -> None:
    """Its momentum goes along, as in torch's SGD."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    twin = nn.Linear(3, 2)
    twin.load_state_dict(model.state_dict())
    optimizers = LARS(model.parameters(), lr=0.1, momentum=0.9), torch.optim.SGD(twin.parameters(), 0.1, momentum=0.9)
    torch.__future__.set_swap_module_params_on_conversion(swapped)
    try:
        for dtype in (torch.float32, kind, kind, torch.float32):
            for m, optimizer in zip((model, twin), optimizers, strict=True):
                m.to(dtype)
                optimizer.zero_grad()
                m(torch.ones(3, dtype=dtype)).sum().backward()
                optimizer.step()
            for p, q in zip(model.parameters(), twin.parameters(), strict=True):
                torch.testing.assert_close(p, q)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert all(own["momentum_buffer"].dtype == torch.float32 for own in optimizers[0].state.values())


def test_a_parameter_that_is_transposed_in_its_memory() -> None:
    p = parameter(3, 3)
    optimizer = LARS([p], lr=1.0, momentum=0.9)
    p.grad = torch.arange(9.0).reshape(3, 3)
    optimizer.step()
    p.data = p.data.T
    before, buffer = p.detach().clone(), optimizer.state[p]["momentum_buffer"].clone()
    optimizer.step()
    torch.testing.assert_close(p.detach(), before - (0.9 * buffer + p.grad))


def test_memory_that_comes_and_goes_between_steps() -> None:
    p, q = parameter(3), parameter(3)
    optimizer = LARS([p, q], lr=0.1, momentum=0.9)
    optimizer.step()
    whole, g = p.data, p.grad
    p.data, p.grad = torch.empty(0), None
    optimizer.step()
    p.data = whole
    p.grad = g
    q.grad = None
    optimizer.step()
    assert torch.allclose(p, torch.tensor(0.855)) and torch.equal(p, q)


def test_lazy_modules() -> None:
    model = nn.Sequential(nn.LazyLinear(3), nn.LazyLinear(2))
    optimizer = LARS(model.parameters(), lr=0.1, momentum=0.9)
    optimizer.step()
    model(torch.ones(1, 2)).sum().backward()
    before = model[0].bias.detach().clone()
    optimizer.step()
    assert torch.allclose(model[0].bias, before - 0.1 * model[0].bias.grad)


def test_memory_that_is_shared_until_it_is_written_to() -> None:
    p = parameter(3)
    optimizer = LARS([p], lr=0.1)
    for expected in (0.95, 0.9):
        before = p.detach().clone()
        clone = torch._lazy_clone(p.detach())
        optimizer.step()
        assert torch.equal(clone, before) and torch.allclose(p, torch.tensor(expected))


# ---------------------------------------------------------------------------------------------------- circumstances


def test_inference_mode() -> None:
    p = parameter(3)
    optimizer = LARS([p], lr=0.1, momentum=0.9)
    with torch.inference_mode():
        q = parameter(3)
        inside = LARS([q], lr=0.1, momentum=0.9)
        for _ in range(2):
            optimizer.step()
            inside.step()
    assert torch.equal(p, q) and torch.allclose(p, torch.tensor(0.855))
    optimizer.step()
    (p * p).sum().backward()
    torch.save(optimizer.state_dict(), io.BytesIO())


@pytest.mark.parametrize("with_it", [lambda: torch.device("meta"), torch.no_grad, torch.autograd.detect_anomaly])
def test_modes_change_nothing(with_it: Callable[[], Any]) -> None:
    p = parameter(3)
    optimizer = LARS([p], lr=0.1, momentum=0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # detect_anomaly says that it is slow
        context: contextlib.AbstractContextManager[Any] = with_it()
    with context:
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.step()
    assert torch.allclose(p, torch.tensor(0.855)) and optimizer.state[p]["momentum_buffer"].device.type == "cpu"


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_the_meta_device_shows_what_state_there_will_be(weight_decay: float) -> None:
    p, q = parameter(3, device="meta"), parameter(3)
    optimizer = LARS([p, q], lr=0.1, momentum=0.9, weight_decay=weight_decay, adapt=False)
    for _ in range(2):
        optimizer.step()
    assert optimizer.state[p]["momentum_buffer"].is_meta
    assert q[0] < 1 and not optimizer.state[q]["momentum_buffer"].is_meta


def test_no_device_steps_what_another_refuses() -> None:
    p, q = parameter(3), parameter(3, device="meta")
    optimizer = LARS([p, q], lr=0.1)
    optimizer.step()
    q.grad.data = torch.ones(4, device="meta")
    before = p.detach().clone()
    with pytest.raises(ValueError, match="the gradient of '1' must have the parameter's shape"):
        optimizer.step()
    assert torch.equal(p, before)


def test_threads_each_with_an_optimizer() -> None:
    params = [parameter(2000) for _ in range(4)]
    optimizers = [LARS([p], lr=0.01, momentum=0.9, weight_decay=0.1) for p in params]

    def run(optimizer: Any) -> None:
        for _ in range(50):
            optimizer.step()

    threads = [threading.Thread(target=run, args=(optimizer,)) for optimizer in optimizers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert params[0][0] < 1 and all(torch.equal(p, params[0]) for p in params)


def test_threads_that_share_an_optimizer() -> None:
    """As A3C's workers do: each replaces the gradients and steps, and its memory is used again at once."""
    params = [parameter(100, 100) for _ in range(8)]
    optimizer = LARS(params, lr=1e-3, momentum=0.9, weight_decay=1e-4)
    errors: list[BaseException] = []

    def run() -> None:
        try:
            for _ in range(150):
                for p in params:
                    p.grad = torch.full_like(p, 1e-3)
                optimizer.step()
                torch.full((100, 100), 1e30)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and all(bool((p.abs() <= 1).all()) for p in params)
    copy.deepcopy(optimizer)
    pickle.loads(pickle.dumps(optimizer)).step()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning", "ignore:.*fork.*:RuntimeWarning")
def test_a_forked_process_goes_on_by_itself() -> None:
    p = parameter(200_000)
    optimizer = LARS([p], lr=0.1, momentum=0.9)
    optimizer.step()
    there, here = os.pipe()
    child = os.fork()
    if child == 0:
        optimizer.step()
        values = p.detach().numpy()  # since torch's own threads do not live on
        os.write(here, f"{values.min():.3f} {values.max():.3f}".encode())
        os._exit(0)
    os.close(here)
    assert os.read(there, 100) == b"0.855 0.855"
    os.waitpid(child, 0)
    os.close(there)
    assert torch.allclose(p, torch.tensor(0.95))
