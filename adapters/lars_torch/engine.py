"""The parameters of one device that have had gradients, as arrays, and the `lars_array.LARS` that steps them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from operator import is_
from typing import Any, NamedTuple

import torch
import torch.utils.dlpack
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

import lars_array
from lars_array.arrays import check_gradient, check_parameter
from lars_array.dtypes import is_half
from lars_array.hyper import needs_buffer
from lars_array.roster import KEPT
from lars_torch.hyper import hyper_of
from lars_torch.views import borrowed, computed_in, has_bfloat16, layout, library_for, view

__all__ = ["Engine", "Member", "check_tensor", "library_of"]


class Member(NamedTuple):
    """A parameter of the optimizer, its group, and the name that messages call it by."""

    param: torch.Tensor
    group: int
    name: str


def library_of(device: torch.device, tensors: Sequence[torch.Tensor]) -> str:
    """Return whose arrays these tensors, all on `device`, are stepped as: "numpy", "cupy" or "torch"."""
    if any(p.dtype == torch.bfloat16 for p in tensors) and not has_bfloat16():
        return "torch"
    return library_for(device)


class Engine:
    """Steps parameters of one device, as long as they lie where they do and their state is what it was.

    Parameters
    ----------
    device : torch.device
        Where they are.
    members : sequence of Member
        In the order of the groups.
    tensors : sequence of Tensor
        The memory to be stepped, one a member: the parameters themselves, or what a compiled graph has in their place.
    groups : sequence of mappings
        All parameter groups of the optimizer.
    state : mapping
        The optimizer's state: momentum buffers are taken from it, and put into it.
    previous_lr : mapping of Tensor to float
        The learning rate of the last step of parameters that have taken one.
    kernel : str, optional
        As for `lars_array.LARS`.
    layer_of : callable, optional
        As for `lars_array.LARS`.

    Raises
    ------
    ValueError, TypeError
        For tensors that can't be stepped; then nothing was changed.
    """

    def __init__(
        self,
        device: torch.device,
        members: Sequence[Member],
        tensors: Sequence[torch.Tensor],
        groups: Sequence[Mapping[str, Any]],
        state: Any,
        previous_lr: Mapping[torch.Tensor, float],
        kernel: str | None,
        *,
        layer_of: Callable[[str], Any] | None = None,
    ) -> None:
        self.device, self.members, self.state = device, members, state
        self.params = [member.param for member in members]
        self.known = frozenset(self.params)
        self.group_of = sorted({member.group for member in members})
        self.library = library_of(device, tensors)
        self._cast_buffers()
        self._layouts = list(map(layout, tensors))
        self._has_complex = any(map(torch.is_complex, tensors))
        self._gradients: list[Any] = [None] * len(members)
        self._gradient_layouts: list[Any] = [None] * len(members)
        inner = []
        for k in self.group_of:
            own = [(member.name, tensor) for member, tensor in zip(members, tensors) if member.group == k]
            named = {name: self._array(tensor) for name, tensor in own}
            inner.append({"params": named, **hyper_of(groups[k], None, device)})
        with self._place():
            self.inner = lars_array.LARS(inner, layer_of=layer_of, kernel=kernel)
            self._kept = {key: self._in_state(key) for key in KEPT}
            self._attach(previous_lr)
        self._kept_at = {key: list(map(_address, kept)) for key, kept in self._kept.items()}

    def _cast_buffers(self) -> None:
        """Have momentum buffers of the type that is computed in, where parameters were cast since they were made, and
        no masters of those that are not of half precision any more."""
        for p, v in zip(self.params, self._in_state("momentum_buffer")):
            kind = computed_in(p.dtype)
            if v is not None and v.dtype != kind and v.is_complex() == kind.is_complex:
                self.state[p]["momentum_buffer"] = v.to(kind)
            if not is_half(p):
                self.state.get(p, {}).pop("master", None)

    def _attach(self, previous_lr: Mapping[torch.Tensor, float]) -> None:
        found: dict[str, dict[str, Any]] = {}
        for i, member in enumerate(self.members):
            own = {key: self._array(kept[i]) for key, kept in self._kept.items() if kept[i] is not None}
            found[member.name] = {"previous_lr": previous_lr.get(member.param, 0.0), **own}
        self.inner.attach_state(found)

    def unmoved(self) -> list[torch.Tensor]:
        """Return the parameters whose own memory is what the engine was made for."""
        return [p for p, known in zip(self.params, self._layouts) if layout(p) == known]

    def is_current(self, state: Any, tensors: Sequence[torch.Tensor]) -> bool:
        """Return whether all memory lies where it did, and the state holds the tensors that steps write to."""
        if state is not self.state or list(map(layout, tensors)) != self._layouts:
            return False
        if self._has_complex and not all(map(_is_plain, tensors)):  # a conjugate lies where the number does
            return False
        return all(
            all(map(is_, self._in_state(key), self._kept[key]))
            and list(map(_address, self._kept[key])) == self._kept_at[key]  # a tensor's memory may be put elsewhere
            for key in self._keys()
        )

    def step(
        self, groups: Sequence[Mapping[str, Any]], grads: Sequence[torch.Tensor | None], grad_scale: Any, found_inf: Any
    ) -> list[torch.Tensor]:
        """Take a step with those parameters that have a gradient, and return all that was written to."""
        for own, k in zip(self.inner.param_groups, self.group_of):
            own.update(hyper_of(groups[k], grad_scale, self.device))
        if found_inf is not None:
            found_inf = found_inf.item() if self.device.type == "cpu" else self._array(found_inf.reshape(()))
        with self._place():
            arrays, held = self._gradient_arrays(list(grads))
            if self.library == "cupy":
                for own in self.inner.param_groups:
                    own.update({name: view(x) for name, x in own.items() if isinstance(x, torch.Tensor)})
            self.inner.step(arrays, found_inf=found_inf)
            self._show_new()
        del held  # until here
        written = (self.params, *(self._kept[key] for key in self._keys()))
        return [x for g, *own in zip(grads, *written) if g is not None for x in own if x is not None]

    def previous_lr(self) -> dict[torch.Tensor, float]:
        """Return the learning rate of the last step of each parameter."""
        views = self.inner.state_views()
        return {member.param: views[member.name]["previous_lr"] for member in self.members}

    def _gradient_arrays(self, held: list[Any]) -> tuple[list[Any], list[Any]]:
        """Return the gradients as arrays, and what must be alive while these are looked at."""
        if self.library == "torch":
            for member, g in zip(self.members, held):
                if g is not None:
                    _check_gradient(member, g)
            return held, held
        for i, g in enumerate(held):
            if g is None:
                self._gradients[i] = self._gradient_layouts[i] = None
                continue
            now = layout(g) if type(g) is torch.Tensor and _is_plain(g) else None
            known = self._gradient_layouts[i]
            if now is not None and now == known:
                continue
            if now is not None and known is not None and now[1:] == known[1:]:  # moved, as after each zero_grad
                self._gradients[i] = borrowed(self._gradients[i], now[0])
            else:
                _check_gradient(self.members[i], g)
                held[i] = g = g.detach().resolve_conj().resolve_neg()
                self._gradients[i] = borrowed(view(g))
            self._gradient_layouts[i] = now
        return list(self._gradients), held

    def _keys(self) -> Sequence[str]:
        has_masters = any(own["master_weights"] for own in self.inner.param_groups)
        return tuple(KEPT) if has_masters else ("momentum_buffer",)

    def _in_state(self, key: str) -> list[Any]:
        return [self.state.get(p, {}).get(key) for p in self.params]

    def _show_new(self) -> None:
        """Put what the step has made into the optimizer's state, as tensors on the same memory."""
        new = []
        if any(map(needs_buffer, self.inner.param_groups)):
            new += [("momentum_buffer", i) for i, v in enumerate(self._kept["momentum_buffer"]) if v is None]
        if len(self._keys()) > 1:
            halves = [i for i, p in enumerate(self.params) if is_half(p)]
            new += [("master", i) for i in halves if self._kept["master"][i] is None]
        if any(master is not None for master in self._kept["master"]):
            self._forget_masters()
        if not new:
            return
        views = self.inner.state_views(wait=False)
        for key, i in new:
            made = views[self.members[i].name].get(key)
            if made is not None:
                self._kept[key][i] = self.state[self.params[i]][key] = self._tensor(made)
                self._kept_at[key][i] = _address(self._kept[key][i])

    def _forget_masters(self) -> None:
        """Forget those of groups that want none any more."""
        wanted = {k: own["master_weights"] for own, k in zip(self.inner.param_groups, self.group_of)}
        for i, member in enumerate(self.members):
            if self._kept["master"][i] is not None and not wanted[member.group]:
                self.state.get(member.param, {}).pop("master", None)
                self._kept["master"][i] = self._kept_at["master"][i] = None

    def _array(self, tensor: torch.Tensor) -> Any:
        return tensor.detach() if self.library == "torch" else view(tensor)

    def _tensor(self, array: Any) -> torch.Tensor:
        if isinstance(array, torch.Tensor):
            return array
        return torch.from_numpy(array) if self.library == "numpy" else torch.utils.dlpack.from_dlpack(array)

    def _place(self) -> AbstractContextManager[Any]:
        """Have CuPy work where and when torch does."""
        if self.library != "cupy":
            return nullcontext()
        from lars_torch.cuda import torchs_stream

        return torchs_stream(self.device)


def check_tensor(name: str, p: torch.Tensor) -> None:
    """Refuse what has no memory of its own to be written to, or a norm that can't be seen from here.

    Parameters
    ----------
    name : str
        The parameter's name, for messages.
    p : Tensor
        The parameter.

    Raises
    ------
    TypeError
        For a sparse tensor, one of a subclass that is not plain memory, such as a DTensor, or another element type.
    ValueError
        If its storage was freed.
    """
    _check_is_memory(f"parameter {name!r}", p)
    if not _is_plain(p):
        raise TypeError(f"parameter {name!r} must not be a lazily conjugated or negated view")
    if p.numel() and not p.data_ptr() and p.device.type != "meta":
        raise ValueError(f"parameter {name!r} must have memory; its storage was freed")
    check_parameter(name, p)


def _check_gradient(member: Member, g: torch.Tensor) -> None:
    _check_is_memory(f"the gradient of {member.name!r}", g)
    check_gradient(member.name, g, member.param)


def _check_is_memory(what: str, tensor: torch.Tensor) -> None:
    kind = type(tensor)
    if is_traceable_wrapper_subclass(tensor) or kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        raise TypeError(f"{what} must be a plain tensor, LARS needs its whole norm; got a {kind.__name__}")
    if tensor.layout != torch.strided:
        raise TypeError(f"{what} must be dense, LARS needs its norm; got one of {tensor.layout}")


def _is_plain(tensor: torch.Tensor) -> bool:
    """Return whether the numbers in memory are those of the tensor."""
    return tensor.layout is torch.strided and not (tensor.is_conj() or tensor.is_neg())


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
