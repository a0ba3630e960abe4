"""The parameters of an optimizer and the arrays kept for each of them between steps."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np
from array_api_compat import array_namespace, device, size

from lars_array._arrays import (
    ArraySpecs,
    check_buffer,
    check_gradient,
    check_master,
    compute_dtype,
    device_context,
    to_floats,
)
from lars_array._messages import near, shown
from lars_array.layers import LayerOf, LayerRows, labels_of, layer_names
from lars_array.state.inputs import Group, all_names
from lars_array.state.memory import MemoryRanges, check_writable
from lars_array.state.shards import AllReduce, Shards, shards_of

if TYPE_CHECKING:
    from lars_array.state.device import DeviceState

__all__ = ["KEPT", "ParamState", "allocate_buffers", "check_previous_lr"]

# The arrays that may be kept for a parameter, and the check that each has to pass.
KEPT: dict[str, Callable[[str, Any, Any], None]] = {"momentum_buffer": check_buffer, "master": check_master}

ALIGNMENT = 64  # bytes: a cache line
LARGE = 4096  # bytes: smaller buffers lie closer, as far apart as malloc would put them
CLOSE = 16


class ParamState:
    """Parameters in the order of their groups, and their state.

    The lists are replaced, never modified, so that a list seen before holds the same arrays.

    Parameters
    ----------
    layer_of : mapping, callable or None
        See `lars_array.LARS`.

    Attributes
    ----------
    names, params : lists
        The parameters.
    group_of : int32 array of shape (parameters,)
        The group of each.
    layer_axes : list of int
        The number of leading axes of each along which slices are layers.
    buffers, masters : lists
        Momentum buffer and master copy of each, or None. On a device, a buffer may be unused: see `DeviceState`.
    previous_lr : float64 array of shape (parameters,)
        The learning rate of the last step of each, 0 before the first.
    device : DeviceState or None
        State on the device, once steps have been queued on it.
    all_reduce, counted, copies : lists
        Of each parameter what adds its sums over processes, or None; whether it is this process that counts it; and how
        many hold the same piece.
    norm_reduce : callable or None
        What adds the norms of gradients over processes that hold different layers.
    layers : sequence of str or None
        See `lars_array.LARS`.
    """

    def __init__(self, layer_of: LayerOf = None) -> None:
        self.layer_of = layer_of
        self.names: list[str] = []
        self.params: list[Any] = []
        self.group_of = np.zeros(0, np.int32)
        self.layer_axes: list[int] = []
        self.buffers: list[Any] = []
        self.masters: list[Any] = []
        self.previous_lr = np.zeros(0)
        self.device: DeviceState | None = None
        self.all_reduce: list[AllReduce | None] = []
        self.counted: list[bool] = []
        self.copies: list[int] = []
        self.norm_reduce: AllReduce | None = None
        self.layers: Sequence[str] | None = None
        self._shards: list[Shards] | None = None

    def extended(
        self, groups: Sequence[Group], layer_axes: Sequence[int], all_reduce: Sequence[AllReduce | None] = ()
    ) -> ParamState:
        """Return a new state with the parameters of further groups; this one does not change.

        Parameters
        ----------
        groups : sequence of Group
            The groups.
        layer_axes : sequence of int
            The `layer_axes` of each.
        all_reduce : sequence of callables or None
            The `all_reduce` of each, if any has one.

        Raises
        ------
        ValueError, TypeError
            For names that are taken, and parameters that are not writable, overlap, or can't form a layer.
        """
        longer = ParamState(self.layer_of)
        new = [p for group in groups for p in group.arrays]
        longer.names = all_names([self.names, *(group.names for group in groups)])
        longer.params = [*self.params, *new]
        counts = [len(group.arrays) for group in groups]
        first = int(self.group_of.max(initial=-1)) + 1
        numbers = np.arange(first, first + len(groups), dtype=np.int32)
        longer.group_of = np.concatenate([self.group_of, np.repeat(numbers, counts)])
        longer.layer_axes = [*self.layer_axes, *(x for x, count in zip(layer_axes, counts) for _ in range(count))]
        longer.buffers = [*self.used_buffers(), *[None] * len(new)]
        longer.masters = [*self.masters, *[None] * len(new)]
        longer.previous_lr = np.concatenate([self.last_rates(), np.zeros(len(new))])
        longer.layers = self.layers
        functions = np.repeat(np.array([*all_reduce] or [None] * len(groups), object), counts).tolist()
        longer.all_reduce, count = [*self.all_reduce, *functions], len(longer.params)
        longer.counted, longer.copies = [True] * count, [1] * count
        if longer.has_layers:
            longer.rows()
        for name, p in zip(longer.names, longer.params, strict=True):
            check_writable(name, p)
            _check_same_place(p, longer.params[0], name, longer.names[0])
        MemoryRanges(longer.names, longer.params)
        longer.check_layers()
        return longer

    def check_layers(self) -> None:
        """Raise ValueError unless the layers can be shared in the way that was asked for."""
        count = len({id(x) for x in self.all_reduce if x is not None})
        if self.layers is not None and count != 1:
            where = f"where there are {count} of them" if count else "without an all_reduce"
            raise ValueError(f"layers must be None {where}; got {shown(self.layers)}")
        _ = self.shards

    @property
    def shards(self) -> list[Shards]:
        """The layers of which other processes hold pieces."""
        if self._shards is None:
            self._shards = []
            if any(self.all_reduce) or self.norm_reduce is not None:
                rows, like = self.rows(), self.view(self.params[0])
                filled, xp, groups = [size(p) > 0 for p in self.params], array_namespace(like), self.group_of.tolist()
                of_params: dict[str, Any] = {"filled": filled, "counted": self.counted, "groups": groups}
                of_params["copies"] = self.copies
                names, functions = self.layer_names(rows), (self.all_layers, self.norm_reduce)
                self._shards = shards_of(rows, names, self.all_reduce, *functions, **of_params, like=like, xp=xp)
        return self._shards

    @property
    def has_layers(self) -> bool:
        """Whether a layer may be anything but one parameter."""
        return self.layer_of is not None or any(self.layer_axes)

    def rows(self) -> LayerRows:
        """Return the layers of all parameters."""
        return LayerRows.of(self.names, self.params, self.layer_axes, labels_of(self.layer_of, self.names))

    def used_buffers(self) -> list[Any]:
        """Return the momentum buffers that steps have used, else None; waits for a device."""
        if self.device is None:
            return self.buffers
        with device_context(self.params[0]):
            unused = to_floats(self.device.first)
        return [None if first else v for v, first in zip(self.buffers, unused, strict=True)]

    def last_rates(self) -> Any:
        """Return `previous_lr`; waits for a device."""
        if self.device is None:
            return self.previous_lr
        with device_context(self.params[0]):
            return np.array(to_floats(self.device.previous_lr))

    def poll_device(self, *, wait: bool) -> tuple[int, int, Exception | None]:
        """Return by how much the counts of steps and skipped steps change, and the error of a rejected step."""
        if self.device is None:
            return 0, 0, None
        before, now, replayed = self.device.poll(wait=wait)
        skipped, rejected = now.skipped - before.skipped, now.rejected - before.rejected
        return replayed - skipped - rejected, skipped, now.error(self.row_names()) if rejected else None

    def views(self, *, wait: bool = True) -> dict[str, dict[str, Any]]:
        """Return the state by parameter name, the arrays themselves; see `lars_array.LARS.state_views`."""
        buffers = self.used_buffers() if wait else self.buffers
        rates = self.last_rates().tolist() if wait else None
        state: dict[str, dict[str, Any]] = {}
        for i, name in enumerate(self.names):
            own = state[name] = {} if rates is None else {"previous_lr": rates[i]}
            for key, array in (("momentum_buffer", buffers[i]), ("master", self.masters[i])):
                if array is not None:
                    own[key] = array
        return state

    def attach(self, state: Mapping[str, Mapping[str, Any]], *, copied: bool = False) -> None:
        """Keep the arrays in `state` from now on, and nothing else for the parameters that it names.

        Parameters
        ----------
        state : mapping
            By name, see `views`.
        copied : bool
            Whether to keep copies of the arrays.

        Raises
        ------
        ValueError, TypeError
            If a name is unknown, or an array does not fit; then nothing was changed.
        """
        if not isinstance(state, Mapping) or not all(isinstance(own, Mapping) for own in state.values()):
            raise TypeError(f"state must be a mapping of names to mappings, as state_views returns; got {shown(state)}")
        place = {name: i for i, name in enumerate(self.names)}
        kept = {"momentum_buffer": list(self.used_buffers()), "master": list(self.masters)}
        previous_lr = self.last_rates().copy()
        for name, own in state.items():
            if name not in place:
                names = f"{shown(self.names)}; got the name {shown(name)}{near(name, self.names)}"
                raise ValueError(f"state must be of parameters named {names}")
            unknown = [key for key in own if key not in KEPT and key != "previous_lr"]
            if unknown:
                keys = f"'previous_lr', {', '.join(map(repr, KEPT))}; got {shown(unknown[0])}{near(unknown[0], KEPT)}"
                raise ValueError(f"the state of {shown(name)} must have no keys but {keys}")
            i = place[name]
            for key, check in KEPT.items():
                kept[key][i] = own.get(key)
                if own.get(key) is not None:
                    check(name, own[key], self.params[i])
                    if not copied:
                        check_writable(f"{key} of {name}", own[key])
            previous_lr[i] = check_previous_lr(name, own.get("previous_lr", 0.0))
        if copied:
            kept = {key: self._copies(arrays, {place[name] for name in state}) for key, arrays in kept.items()}
        MemoryRanges(self.names, self.params, *kept.values())
        self.buffers, self.masters, self.previous_lr = *kept.values(), previous_lr
        self.device = None

    def _copies(self, arrays: list[Any], index: set[int]) -> list[Any]:
        """Return arrays, those at `index` copied into new ones that lie together."""
        chosen = [i for i in sorted(index) if arrays[i] is not None]
        new = allocate_buffers([self.params[i] for i in chosen])
        copies = list(arrays)
        for i, mine in zip(chosen, new, strict=True):
            mine[...] = arrays[i]
            copies[i] = mine
        return copies

    def keep(self, buffers: list[Any], masters: list[Any]) -> None:
        """Replace the momentum buffers and masters, from `owned`: some are new, masters may be None again."""
        self.buffers, self.masters = buffers, masters

    def row_numbers(self, index: Sequence[int]) -> list[int]:
        """Return the number of each row of the parameters at `index` among all rows."""
        slices = self.rows().slices
        return [slices[i].start + k for i in index for k in range(slices[i].size)]

    def row_names(self) -> list[str]:
        """Return the names of all rows."""
        return self.rows().names(self.names)

    # Adapters, whose lists hold arrays of another kind, override what follows.

    def prepare(self) -> None:
        """Check the arrays before a program is made for them."""

    def owned(self, buffers: list[Any], masters: list[Any]) -> tuple[list[Any], list[Any]]:
        """Return momentum buffers and masters as the state holds them, from lists as kernels take them."""
        return buffers, masters

    def view(self, array: Any) -> Any:
        """Return an array as kernels take it, on the same memory."""
        return array

    def view_all(self, arrays: list[Any]) -> list[Any]:
        """Return arrays as kernels take them, None for None."""
        return arrays

    def specs(self, arrays: Sequence[Any], specs_of: Callable[[Sequence[Any]], ArraySpecs] | None) -> ArraySpecs:
        """Return the types and layouts of arrays; `specs_of` is the kernel's way to find them."""
        return (specs_of or ArraySpecs)(arrays)

    def all_layers(self, all_reduce: AllReduce) -> Sequence[str] | None:
        """Return the names of all layers that `all_reduce` adds up, None for those that are here."""
        return self.layers

    def layer_names(self, rows: LayerRows) -> list[str | None]:
        """Return the name of the layer of each row."""
        return layer_names(self.names, labels_of(self.layer_of, self.names), rows.slices)

    def addresses(self, arrays: Sequence[Any]) -> Any:
        """Return where momentum buffers or masters lie, if their owner may move them."""
        return None

    def may_move(self, arrays: Sequence[Any]) -> bool:
        """Return whether arrays that lie elsewhere than before can be stepped by the same kernel."""
        return True

    def like_gradient(self, p: Any) -> Any:
        """Return an array of the type and layout that the gradient of a parameter is expected to have."""
        return p

    def check_gradient(self, name: str, g: Any, p: Any) -> None:
        """Raise unless a gradient fits its parameter."""
        check_gradient(name, g, p)

    def __getstate__(self) -> dict[str, Any]:
        known = {"buffers": self.used_buffers(), "previous_lr": self.last_rates()}
        return self.__dict__ | known | {"device": None, "_shards": None}


def allocate_buffers(params: Sequence[Any]) -> list[Any]:
    """Return a momentum buffer of zeros for each parameter: of its shape and order, in the type computed in.

    Those for dense NumPy arrays lie in one block of memory, the large ones first, so that the system can use huge
    pages.
    """
    if not params:
        return []
    xp = array_namespace(params[0])
    buffers: list[Any] = [None] * len(params)
    dense: dict[Any, list[int]] = {}
    for i, p in enumerate(params):
        if isinstance(p, np.ndarray) and p.flags.forc:
            dense.setdefault(np.dtype(compute_dtype(p, xp)), []).append(i)
        else:
            buffers[i] = xp.zeros_like(p, dtype=compute_dtype(p, xp))
    for kind, index in dense.items():
        sizes = np.array([params[i].size * kind.itemsize for i in index], np.int64)
        small = sizes < LARGE
        step = np.where(small, CLOSE, ALIGNMENT)
        room = -(-sizes // step) * step
        order = np.argsort(small, kind="stable")
        starts = np.zeros_like(room)
        starts[order[1:]] = np.cumsum(room[order[:-1]])
        memory = np.zeros(int(room.sum()) + ALIGNMENT, np.uint8)
        offset = -memory.__array_interface__["data"][0] % ALIGNMENT
        for i, start in zip(index, (starts + offset).tolist(), strict=True):
            layout: Any = "C" if params[i].flags.c_contiguous else "F"
            buffers[i] = np.ndarray(params[i].shape, kind, memory, start, order=layout)
    return buffers


def check_previous_lr(name: str, value: Any) -> float:
    """Return the learning rate of the last step of a parameter; raise unless it is one."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"previous_lr of {shown(name)} must be a number; got {shown(value)}")
    number: Any = value
    if not 0 <= number <= sys.float_info.max:
        raise ValueError(f"previous_lr of {shown(name)} must be finite and at least 0; got {shown(value)}")
    return float(value)


def _check_same_place(p: Any, other: Any, name: str, other_name: str) -> None:
    if type(p) is not type(other) and array_namespace(p) is not array_namespace(other):
        kinds = f"{type(p).__name__} and {type(other).__name__}"
        raise TypeError(f"parameters must be arrays of one library; {shown(name)} and {shown(other_name)} are {kinds}")
    if device(p) != device(other):
        places = f"{shown(device(p))} and {shown(device(other))}"
        raise ValueError(f"parameters must lie on one device; {shown(name)} and {shown(other_name)} lie on {places}")
