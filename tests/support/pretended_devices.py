"""Devices that are none: array_api_strict has one in name only, torch reports all values that are read, and the CUDA
kernel runs on the CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import array_api_strict
import cuda_on_cpu
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lars_array._arrays import is_on_accelerator

DEVICES = ("strict", "torch", "cuda")
WAITS = {"_local_scalar_dense", "equal", "nonzero", "item", "is_nonzero"}


class Device(NamedTuple):
    """How to copy an array to a device, and a context in which to read from there is an error."""

    put: Callable[[Any], Any]
    unread: Callable[[], Any]


class NoWaiting(TorchDispatchMode):
    """Refuses what would have to wait for a device, or to send something there."""

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        assert function.overloadpacket.__name__ not in WAITS, f"{function} reads a value"
        return function(*arguments, **(options or {}))


@contextlib.contextmanager
def nothing_read(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def refuse(self: Any, *_: Any, **__: Any) -> Any:
        raise AssertionError("a value was read")

    with monkeypatch.context() as patch:
        for name in ("__bool__", "__float__", "__int__", "__index__", "__complex__"):
            patch.setattr(array_api_strict._array_object.Array, name, refuse)
        yield


def pretended(kind: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    """Yield a device of `DEVICES`: the portable kernel takes its arrays, or the CUDA kernel."""
    if kind == "cuda":
        if reason := cuda_on_cpu.missing():
            pytest.skip(reason)
        with cuda_on_cpu.pretended():
            yield Device(cuda_on_cpu.far, cuda_on_cpu.nothing_read)
        return
    if kind == "strict":
        place = array_api_strict.Device("device1")
        yield Device(lambda x: array_api_strict.asarray(x, device=place, copy=True), lambda: nothing_read(monkeypatch))
        return
    cuda_on_cpu.answer_whether_on_accelerator(
        monkeypatch, lambda x: isinstance(x, torch.Tensor) or is_on_accelerator(x)
    )
    yield Device(lambda x: torch.tensor(x), NoWaiting)
