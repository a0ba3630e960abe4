"""Steps of the parameters of one device, on the tensors that the optimizer's state holds."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from math import prod
from operator import is_
from typing import Any, NamedTuple

import numpy as np
import torch

from lars_array._arrays import is_half
from lars_array._stepper import KEPT, ParamState, Stepper, on_threads_of, reads_previous_lr, uninterrupted
from lars_array.hyperparams import Hyperparams, check_layer_axes
from lars_array.layers import LayerRows, LayerSlices, labels_of
from lars_array.state.memory import check_writable
from lars_torch import _arrays
from lars_torch._arrays import (
    TensorSpecs,
    check_tensor,
    compute_dtype,
    is_lazy,
    library_of,
    resolved,
    tensor_of,
    torch_stream,
)
from lars_torch._dtensors import is_dtensor, like, local, local_gradients, locals_of
from lars_torch._hyperparams import numbers_of, tensors_in
from lars_torch._sharding import Spread
from lars_torch._threads import run_on_torch_threads

__all__ = ["NamedParam", "OutdatedError", "TensorState"]

_NOTHING: Mapping[str, Any] = {}


class NamedParam(NamedTuple):
    """A parameter of the optimizer, the number of its group, and its name for messages."""

    param: torch.Tensor
    group: int
    name: str


class OutdatedError(Exception):
    """A parameter has other memory, and perhaps lies on another device, or a gradient must be resolved."""


class TensorState(ParamState):
    """Parameters of one device, what the optimizer's state holds for them, and the stepper that updates both.

    The lists hold tensors and are read anew for each step.

    Parameters
    ----------
    device : torch.device
        Where the parameters lie.
    members : mapping of int to NamedParam
        By position among all parameters, in the order of the groups.
    groups : sequence of mappings
        All parameter groups.
    layer_of : callable, optional
        As for `lars_array.LARS`.
    kernel : str, optional
        As for `lars_array.LARS`.
    spread : Spread, optional
        How these parameters are spread over processes.

    Attributes
    ----------
    owners : list of Tensor
        The parameters as the optimizer has them; `params` holds the memory that a compiled graph has in their place.
    skipped : int
        How many steps were skipped.
    corrections : int
        What the device has reported since, to be added to the number of steps that were queued.
    result : StepResult or None
        Of the last step.
    """

    def __init__(
        self,
        device: torch.device,
        members: Mapping[int, NamedParam],
        groups: Sequence[Mapping[str, Any]],
        layer_of: Callable[[str], Hashable] | None,
        kernel: str | None,
        spread: Spread | None = None,
    ) -> None:
        super().__init__(layer_of)
        self.owners, group_of, self.names = map(list, zip(*members.values(), strict=True))
        self.group_of = np.array(group_of, np.int32)
        self._axes_of_groups = [group["layer_axes"] for group in groups]
        self.layer_axes = [self._axes_of_groups[k] for k in group_of]
        self.previous_lr = np.zeros(len(self.owners))
        self.skipped = self.corrections = 0
        self.result: Any = None
        self._device, self._library = device, library_of(device, self.owners)
        self._index = list(members)
        self._has_complex = any(map(torch.is_complex, self.owners))
        halves = [p.dtype in (torch.float16, torch.bfloat16) for p in self.owners]
        self._has_halves = any(halves)
        self._layouts: list[Any] = []  # of parameters that were checked
        self._known_buffers: list[Any] = []
        self._rated: tuple[Any, list[int]] = None, []  # hyper-parameters, and the parameters whose rule reads a rate
        self._rates: list[Any] = []  # of these, as the optimizer's state holds them
        self._known_versions = [(-1, 0)] * len(self.owners)
        self._cast: dict[int, torch.Tensor] = {}  # momentum buffers that were cast for a step
        # Of these the first step drops masters, which remain where an owner has cast half precision.
        self._without_master = [p for p, half in zip(self.owners, halves) if not half]
        self._hyperparams, self._stepper = Hyperparams(), Stepper(kernel)
        self.masters = [None] * len(self.owners)
        self._has_dtensors = any(map(is_dtensor, self.owners))
        self.params = list(map(local, self.owners))
        if spread is not None:
            self.all_reduce, self.counted, self.copies, self.starts, self.norm_reduce = spread

    # ---------------------------------------------------------------------------------------------------------- steps

    def read(
        self, state: Any, memory: Sequence[torch.Tensor], grads: Sequence[Any], *, are_local: bool = False
    ) -> list[Any] | None:
        """Read the tensors of a step; return the gradients, None if there is none.

        Parameters
        ----------
        state : mapping
            The optimizer's, to which new momentum buffers and masters are added.
        memory, grads : sequences
            Tensors to be stepped, and their gradients or None, of all parameters of the optimizer.
        are_local : bool
            Whether the gradients of DTensors are what is here of them.
        """
        if len(self._index) < len(memory):
            memory, grads = ([x[i] for i in self._index] for x in (memory, grads))
        if self._has_dtensors:
            memory = locals_of(memory)
            grads = grads if are_local else local_gradients(self.names, grads, self.owners)
        self._state, self.params, self._cast = state, list(memory), {}
        try:
            if len(state) == len(self.owners) and all(map(is_, state, self.owners)):
                owns = list(state.values())  # faster than to ask for each
            else:
                owns = [state.get(p, _NOTHING) for p in self.owners]
            self.buffers = [own.get("momentum_buffer") for own in owns]
            if self._has_dtensors:
                self.buffers = locals_of(self.buffers)
        except (AttributeError, TypeError) as error:
            raise TypeError(f"optimizer.state must be a dict of dicts; {error}") from None
        self._owns = owns
        if self._has_halves:
            self.masters = [own.get("master") for own in owns]
            if self._has_dtensors:
                self.masters = locals_of(self.masters)
            if any(master is not None for master in self.masters):
                self._drop_outdated_masters()
        if all(g is None for g in grads) and not self.shards:
            return None
        return resolved(grads) if self._has_complex else list(grads)

    def _drop_outdated_masters(self) -> None:
        """Leave out masters of parameters that others have written to since the last step: these are made anew."""
        versions = self._versions()
        if versions == self._known_versions:
            return
        for i, (p, master) in enumerate(zip(self.params, self.masters, strict=True)):
            # A compiled graph writes to parameters after the step: values decide.
            if versions[i] == self._known_versions[i] or master is None:
                continue
            if not torch.allclose(p, master.to(p.dtype), rtol=0, atol=0, equal_nan=True):
                self.masters[i] = None

    def _versions(self) -> list[tuple[int, int]]:
        return [(0 if p.is_inference() else p._version, local(p).data_ptr()) for p in self.owners]

    def note_versions(self, grads: Sequence[Any]) -> None:
        """Note how often parameters that were stepped had been written to, this step included."""
        if self._has_halves:
            pairs = zip(self._versions(), self._known_versions, grads, self.masters, strict=True)
            self._known_versions = [known if g is None or m is None else now for now, known, g, m in pairs]

    def groups(self, groups: Sequence[Mapping[str, Any]], grad_scale: Any) -> Sequence[Mapping[str, Any]]:
        """Return complete and checked hyper-parameters: the same object as long as nothing in it has changed."""
        if grad_scale is None and self._hyperparams.are_unchanged(groups):
            read = self._hyperparams.last
        else:
            read = self._read_groups(groups, grad_scale)
        check_layer_axes(read, self._axes_of_groups)
        return read

    def _read_groups(self, groups: Sequence[Mapping[str, Any]], grad_scale: Any) -> Sequence[Mapping[str, Any]]:
        found = [numbers_of(group, self._device, grad_scale) for group in groups]
        tensors = [(own, name) for own in found for name in tensors_in(own)]
        if tensors and self._library == "cupy":
            with self.context():
                for own, name in tensors:
                    own[name] = self.view(own[name])
        return self._hyperparams.read(groups, 0, found)  # none of them is a function of the step

    def bind(self, grads: Sequence[Any], groups: Any) -> None:
        """Do all checks of a step."""
        with self.context():
            self._stepper.bind(self, grads, groups)

    def step(self, grads: Sequence[Any], groups: Any, found_inf: Any) -> list[torch.Tensor]:
        """Take a step with gradients from `read`, and return the tensors that were written to."""
        with self.context():
            rates = self._read_rates(groups)
            if found_inf is not None:
                on_cpu = self._device.type == "cpu"
                found_inf = found_inf.item() if on_cpu else self.view(found_inf.reshape(()))
            result = self._stepper.step(self, grads, groups, found_inf)
        if result is None:
            self.skipped += 1
            return []
        for i, v in self._cast.items():
            self._state[self.owners[i]]["momentum_buffer"] = like(v, self.owners[i])
        for p in self._without_master:
            self._state.get(p, {}).pop("master", None)
        self._without_master = []
        self._write_rates(grads, rates)
        self.result = result if result.names else self.result
        lists = [self.owners, self.buffers, *([self.masters] if self._has_halves else [])]
        lists += [self.params] if self._has_dtensors else []
        if [g for g in grads if g is None]:
            lists = [[x for x, g in zip(own, grads, strict=True) if g is not None] for own in lists]
        return [x for own in lists for x in own if x is not None]

    def _read_rates(self, groups: Any) -> Any:
        """Take the learning rates of the last steps from the optimizer's state, where a rule reads them.

        Returns memory for those of this step, for which there may be none left once it is taken.
        """
        if groups is not self._rated[0]:
            reads = [reads_previous_lr(group["rule"]) for group in groups]
            index = [i for i, k in enumerate(self.group_of.tolist()) if reads[k]] if any(reads) else []
            self._rated = groups, index
        index = self._rated[1]
        if not index:
            return None
        given = [self._owns[i].get("previous_lr") for i in index]
        if self.device is not None:
            if all(map(is_, given, self._rates)):
                return None
            self._pull_device_state()
        previous_lr = self.previous_lr.copy()
        previous_lr[index] = [0.0 if rate is None else float(rate) for rate in given]
        self.previous_lr = previous_lr
        return np.empty_like(previous_lr)

    def _write_rates(self, grads: Sequence[Any], room: Any) -> None:
        """Put the learning rates of this step into the optimizer's state, on a device as tensors that steps update."""
        index = self._rated[1]
        if not index:
            return
        if self.device is None:
            room[...] = self.previous_lr
        rates = tensor_of(room if self.device is None else self.device.previous_lr)
        self._rates = [rates[i] for i in index]
        for i, rate in zip(index, self._rates, strict=True):
            if self.device is not None or grads[i] is not None:
                self._state.setdefault(self.owners[i], {})["previous_lr"] = rate

    def _pull_device_state(self) -> None:
        self.poll(wait=True)
        self.previous_lr, self.device = self.last_rates(), None

    def restart(self, layer_axes: Sequence[int]) -> bool:
        """Forget steps that were taken; return False if a new state must be made, such as on a device."""
        if self.device is not None or list(layer_axes) != self._axes_of_groups:
            return False
        self.previous_lr, self.result = np.zeros(len(self.owners)), None
        self.skipped = self.corrections = 0
        self._known_versions = [(-1, 0)] * len(self.owners)
        return True

    def poll(self, *, wait: bool = False) -> None:
        """Update the count of skipped steps from the device, and raise if it has rejected one."""
        if self.device is None or not (wait or self.device.has_news):
            return
        with uninterrupted():  # a device reports each step once
            with self.context():
                steps, skipped, error = self.poll_device(wait=wait)
            self.corrections += steps
            self.skipped += skipped
        if error is not None:
            raise error

    def last_rates(self) -> Any:
        """See `ParamState.last_rates`."""
        with self.context():
            return super().last_rates()

    def unmoved(self) -> list[torch.Tensor]:
        """Return the parameters whose own memory is what was checked."""
        return [p for p, known in zip(self.owners, self._layouts) if _layout(p) == known]

    def context(self) -> AbstractContextManager[None]:
        """Have CuPy work on torch's device and stream, and steps on a CPU on torch's threads."""
        if self._library == "cupy":
            return torch_stream(self._device)
        return on_threads_of(run_on_torch_threads) if self._library == "numpy" else nullcontext()

    # ---------------------------------------------------------------------------------------- called by the stepper

    def prepare(self) -> None:
        """Check parameters and their state, and cast momentum buffers to the type that is computed in."""
        own = (x for x in self._owns if x is not _NOTHING)
        if not all(isinstance(x, MutableMapping) for x in (self._state, *own)):
            raise TypeError("optimizer.state must be a dict of dicts")
        layouts = list(map(_layout, self.params)) if self._layouts else []
        if [x[1:] for x in layouts] != [x[1:] for x in self._layouts]:
            raise OutdatedError
        if not layouts or layouts != self._layouts:
            self._check()
        for i, (p, v) in enumerate(zip(self.params, self.buffers, strict=True)):
            kind = compute_dtype(p)
            if not (v is None or isinstance(v, torch.Tensor)):
                raise TypeError(f"the momentum buffer of {self.names[i]!r} must be a tensor; got {type(v).__name__}")
            if v is not None and v.dtype != kind and v.is_complex() == kind.is_complex:
                self.buffers[i] = self._cast[i] = v.to(kind)  # the optimizer's once a step was taken
            if not is_half(p):
                self.masters[i] = None
        if self.device is not None and not all(map(is_, self.buffers, self._known_buffers)):
            self._pull_device_state()
        self._known_buffers = self.buffers

    def _check(self) -> None:
        for name, p in zip(self.names, self.params, strict=True):
            check_tensor(name, p)
        with self.context():
            for name, p in zip(self.names, self.params, strict=True):
                check_writable(name, self.view(p))
        self._layouts = list(map(_layout, self.params))

    def owned(self, buffers: list[Any], masters: list[Any]) -> tuple[list[Any], list[Any]]:
        """Return the tensors of momentum buffers and masters: those that the optimizer's state holds, or new ones."""

        def tensors(before: list[Any], now: list[Any]) -> list[Any]:
            pairs = zip(before, now, strict=True)
            return [None if x is None else tensor_of(x) if tensor is None else tensor for tensor, x in pairs]

        return tensors(self.buffers, buffers), tensors(self.masters, masters)

    def keep(self, buffers: list[Any], masters: list[Any]) -> None:
        """Put new momentum buffers and masters into the optimizer's state, and drop masters that are None again."""
        for key, before, now in zip(KEPT, (self.buffers, self.masters), (buffers, masters), strict=True):
            for owner, old, new in zip(self.owners, before, now, strict=True):
                if old is None and new is not None:
                    self._state.setdefault(owner, {})[key] = like(new, owner)
                elif old is not None and new is None:
                    self._state[owner].pop(key, None)
        self.buffers, self.masters = buffers, masters
        self._known_buffers = self.buffers

    def view(self, array: torch.Tensor) -> Any:
        """Return a tensor as an array on the same memory."""
        return array.detach() if self._library == "torch" else _arrays.view(array)

    def view_all(self, arrays: Sequence[Any]) -> list[Any]:
        """Return tensors as arrays on the same memory, None for None."""
        return [None if x is None else self.view(x) for x in arrays]

    def specs(self, arrays: Sequence[Any], specs_of: Any) -> TensorSpecs:
        """Return the types and layouts of tensors."""
        return TensorSpecs(arrays)

    def addresses(self, arrays: Sequence[Any]) -> list[int]:
        """Return where momentum buffers or masters lie, 0 for None."""
        if not [x for x in arrays if x is None]:
            return list(map(torch.Tensor.data_ptr, arrays))  # faster
        return [0 if x is None else x.data_ptr() for x in arrays]

    def remember_agreements(self, parts: Sequence[TensorState]) -> None:
        """Take over from earlier parts which layers all processes have agreed on.

        Others may have kept their parts: memory may have moved on this process only.
        """

        def key(shard: Any) -> tuple[Any, ...]:
            return shard.all_reduce.group, *shard.layers

        known = {key(shard): shard for part in parts for shard in part.shards}
        for shard in self.shards:
            same = known.get(key(shard))
            if same is not None:
                shard.processes, shard.are_copies_checked = same.processes, same.are_copies_checked

    def layer_names(self, rows: LayerRows) -> list[str | None]:
        """See `ParamState.layer_names`: slices have the numbers that they have in the whole parameter."""
        labels = labels_of(self.layer_of, self.names)
        meaning: dict[str, Any] = {}
        for name, label in zip(self.names, labels, strict=True):
            layer = (name,) if label is None else ("", label)
            text = name if label is None else str(label)
            if meaning.setdefault(text, layer) != layer:
                raise ValueError(f"layers must have different names; two are called {text!r}")
        shapes = (p.shape for p in self.params)
        return [row for i, own in enumerate(zip(labels, shapes)) for row in self._layers_of(i, *own)]

    def all_layers(self, all_reduce: Any) -> list[str]:
        """See `ParamState.all_layers`."""
        labels = labels_of(self.layer_of, self.names)
        index = [i for i, function in enumerate(self.all_reduce) if function is all_reduce]
        return [name for i in index for name in self._layers_of(i, labels[i], self.owners[i].shape)]

    def _layers_of(self, i: int, label: Any, shape: Sequence[int]) -> list[str]:
        """Return the names of the layers in a parameter, or in a piece of it."""
        lead, start = tuple(shape[: self.layer_axes[i]]), self.starts[i] if shape != self.owners[i].shape else ()
        if 0 in lead:  # nothing of it is here
            return self._layers_of(i, label, self.owners[i].shape)[:1]
        return LayerSlices(lead, 0, prod(lead)).names(self.names[i] if label is None else str(label), start)

    def may_move(self, arrays: Sequence[Any]) -> bool:
        """See `ParamState.may_move`."""
        return all(x.device == self._device for x in arrays if x is not None)

    def like_gradient(self, p: torch.Tensor) -> torch.Tensor:
        """See `ParamState.like_gradient`."""
        return p.detach()

    def check_gradient(self, name: str, g: Any, p: Any) -> None:
        """Raise unless a gradient fits its parameter."""
        _arrays.check_gradient(name, g, p)
        if is_lazy(g):
            raise OutdatedError


def _layout(tensor: torch.Tensor) -> tuple[Any, ...]:
    tensor = local(tensor)
    return tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride(), tensor.is_conj()
