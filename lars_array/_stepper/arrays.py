"""The arrays of a step: checked one by one where they are new, and compared with those of before where they are not."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from operator import is_, mul
from typing import Any, Self

import numpy as np
from array_api_compat import array_namespace

from lars_array._arrays import ArraySpecs, changed_in_place, check_buffer, check_master, is_half, real_dtype
from lars_array._messages import shown
from lars_array.hyperparams import needs_buffer
from lars_array.kernels.base import Gradients, KernelArrays, make_kernel
from lars_array.layers import LayerRows, labels_of
from lars_array.nonfinite import max_finite, max_square_sum
from lars_array.state.memory import MemoryRanges, check_writable
from lars_array.state.store import ParamState, allocate_buffers

__all__ = ["Groups", "StepArrays", "absent_from", "kept_by"]

Groups = Sequence[Mapping[str, Any]]
Lists = tuple[list[Any], list[Any], list[Any]]  # parameters, momentum buffers and masters


class StepArrays:
    """The arrays of steps over the same parameters: checked once, and compared with those of later steps.

    New momentum buffers and master copies reach the state only after a step that was taken.

    Parameters
    ----------
    state : ParamState
        Parameters and their state; not modified.
    grads : sequence of arrays or None
        One a parameter.
    groups : sequence of mappings
        Complete and checked hyper-parameters.
    kernel_type : type
        One of `lars_array.kernels`.

    Raises
    ------
    ValueError, TypeError
        For arrays that do not fit, naming the parameter.
    """

    def __init__(self, state: ParamState, grads: Sequence[Any], groups: Groups, kernel_type: Any) -> None:
        self.absent = absent_from(grads)
        self._index: Any = [i for i, g in enumerate(grads) if g is not None] if self.absent else slice(None)
        self._names, self._group_of = self._own(state.names), state.group_of[self._index]
        self._position = np.arange(len(grads), dtype=np.int32)[self._index]  # of each parameter that takes part
        own_grads = self._own(grads)
        for name, g, p in zip(self._names, own_grads, self._own(state.params), strict=True):
            state.check_gradient(name, g, p)
        params = state.view_all(state.params)
        own = self._own(params)
        for name, p in zip(self._names, own, strict=True):
            if isinstance(p, np.ndarray) and not p.flags.writeable:
                check_writable(name, p)
        self.xp = array_namespace(own[0])
        self._keeps, self._groups = kept_by(groups), groups
        buffers, masters = self._keep(state, params)
        self._specs_of = specs_of = getattr(kernel_type, "specs", None)
        self._param_specs, self._grad_specs = state.specs(state.params, specs_of), state.specs(own_grads, specs_of)
        self._addresses = self._param_specs.addresses(state.params)
        self._lists, self._kept_at, self._specs = self._noted(state, (state.params, state.buffers, state.masters))
        self._ranges = MemoryRanges(state.names, params, *self._kept)
        # Gradients serve for their types and layouts. They are not kept: the owner of a model frees them after a step.
        self._make_kernel(state, kernel_type, KernelArrays(own, state.view_all(own_grads), buffers, masters))
        self._clear_at = b""  # the addresses of gradients that were last found to share no memory with these

    def _own(self, x: Any) -> Any:
        """Return the entries of a list for the parameters that take part."""
        return [x[i] for i in self._index] if self.absent else x

    def _keep(self, state: ParamState, params: Sequence[Any]) -> list[list[Any]]:
        """Return the momentum buffers and masters of a step, and note those of all parameters after it."""
        positions, group_of = self._position.tolist(), self._group_of.tolist()
        used: list[list[Any]] = []
        self._kept: list[list[Any]] = []
        for kind, before, check in ((0, state.buffers, check_buffer), (1, state.masters, check_master)):
            kept = list(state.view_all(before))
            wanted = [self._keeps[k][kind] and (kind == 0 or is_half(params[i])) for i, k in zip(positions, group_of)]
            for i, name, yes in zip(positions, self._names, wanted, strict=True):
                if kept[i] is not None:
                    check(name, kept[i], params[i])  # the owner may have resized the parameter
                    if not yes and kind == 1:
                        kept[i] = None  # a master is dropped, a momentum buffer is kept for later
            missing = [i for i, yes in zip(positions, wanted) if yes and kept[i] is None]
            for i, x in zip(missing, allocate_buffers([params[i] for i in missing]), strict=True):
                kept[i] = x
            self._kept.append(kept)
            used.append([kept[i] if yes else None for i, yes in zip(positions, wanted)])
        masters = list(zip(params, self._kept[1], state.masters, strict=True))
        self._to_fill = [(p, x) for p, x, before in masters if before is None and x is not None]
        self._changes_masters = any((x is None) != (before is None) for _, x, before in masters)
        new_buffers = any(before is None and x is not None for before, x in zip(state.buffers, self._kept[0]))
        self._is_published = not (new_buffers or self._changes_masters)
        return used

    def _make_kernel(self, state: ParamState, kernel_type: Any, arrays: KernelArrays) -> None:
        """Cut arrays into rows, and create the kernel and the index arrays of the rows."""
        count = len(arrays.params)
        self._rows: LayerRows | None = None
        self._row_names, self._offsets = self._names, None
        self._joined: Sequence[Sequence[int]] = []
        self._owner = np.arange(count, dtype=np.int32)
        if state.has_layers:
            labels = self._own(labels_of(state.layer_of, state.names))
            self._rows = rows = LayerRows.of(self._names, arrays.params, self._own(state.layer_axes), labels)
            self._row_names, self._joined, self._owner = rows.names(self._names), rows.joined, np.array(rows.owner)
            self._offsets = _row_offsets(rows, arrays.grads)
            arrays = KernelArrays(*map(rows.views, arrays))
        self._kernel = make_kernel(kernel_type, arrays, self.xp)
        self._row_param, self._row_group = self._position[self._owner], self._group_of[self._owner]
        self._used_groups = np.unique(self._group_of).tolist()
        first = np.array([v is None for v in self._own(state.buffers)], bool)
        keeps = np.array([buffer for buffer, _ in self._keeps])[self._group_of]
        trained = arrays.trained
        self._like = trained[0]
        self._trained: Callable[[], list[Any]] = lambda: trained
        kinds = {p.dtype: real_dtype(p, self.xp) for p in {p.dtype: p for p in trained}.values()}
        is_wide = {dtype: kind == self.xp.float64 for dtype, kind in kinds.items()}
        # Of the hyper-parameters each group has four rows: for two types, with and without a momentum buffer; now, and
        # after a step.
        begin = 4 * self._row_group + 2 * np.array([is_wide[p.dtype] for p in trained], np.int32)
        self._hyper_row, self._next_row = (begin + x[self._owner] for x in (first, first & ~keeps))
        dtypes = [g.dtype for g in arrays.grads]
        self._limit = max_finite(trained, like=trained[0], xp=self.xp)
        self._square_limit = max_square_sum(trained, dtypes, like=trained[0], xp=self.xp)
        self._least_limit = min(float(self.xp.finfo(x).max) for x in kinds.values())

    # ----------------------------------------------------------------------------------------------- arrays of a step

    def gradients(self, state: ParamState, grads: Sequence[Any]) -> Gradients | None:
        """Return the gradients of a step, or None if one of them has another type or layout.

        Raises ValueError for a gradient in memory that the step writes to.
        """
        own = self._own(grads)
        begins = self._grad_specs.addresses(own)
        if begins is None:
            return None
        self._check_memory(state, own, begins)
        rows, views = self._rows, state.view_all
        at = begins if self._offsets is None else begins[self._owner] + self._offsets
        return Gradients(at, lambda: views(own) if rows is None else rows.views(views(own)))

    def cut(self, absent: list[int]) -> Self | None:
        """Return a copy for all parameters but some, from that for all; None if its kernel can't be cut."""
        part: Any = getattr(self._kernel, "part", None)
        if part is None or self.absent or self._rows is not None or not self._is_published:
            return None
        left_out = set(absent)
        index = [i for i in range(len(self._names)) if i not in left_out]
        program = copy.copy(self)
        program.absent, program._index = absent, index
        program._names = program._row_names = [self._names[i] for i in index]
        for name in ("_group_of", "_position", "_row_param", "_row_group", "_hyper_row", "_next_row", "_limit"):
            setattr(program, name, getattr(self, name)[index])
        program._owner = np.arange(len(index), dtype=np.int32)
        program._used_groups = np.unique(program._group_of).tolist()
        program._square_limit = None if self._square_limit is None else self._square_limit[index]
        program._trained = lambda: list(map(self._trained().__getitem__, index))
        program._grad_specs, program._kernel = self._grad_specs.at(index), part(index)
        program._clear_at = b""
        return program

    def placed(self, state: ParamState, groups: Groups) -> Self | None:
        """Return this object, or a copy for arrays that lie elsewhere; None if more than addresses changes.

        Raises ValueError for arrays that overlap.
        """
        if groups is not self._groups:
            if kept_by(groups) != self._keeps:
                return None
            self._groups = groups
        lists = state.params, state.buffers, state.masters
        is_known = state.params is self._lists[0] and self._param_specs.are_unchanged(state.params)
        addresses = self._addresses if is_known else self._param_specs.addresses(state.params)
        if addresses is None:
            return None
        stay = [is_known or addresses.tobytes() == self._addresses.tobytes()]
        for arrays, before, at in zip(lists[1:], self._lists[1:], self._kept_at, strict=True):
            stay.append(arrays is before or (all(map(is_, arrays, before)) and state.addresses(arrays) == at))
        if all(stay):
            return self
        is_able = hasattr(self._kernel, "moved") and self._rows is None and self._is_published
        if not is_able or state.params is self._lists[0]:
            return None
        places = np.zeros((3, 3, len(addresses)), np.int64)  # by list: address, first byte, and the one after the last
        for own, arrays, before, specs, stays in zip(places, lists, self._lists, self._specs, stay, strict=True):
            present = [i for i, x in enumerate(arrays) if x is not None]
            is_like = stays or (
                present == [i for i, x in enumerate(before) if x is not None] and state.may_move(arrays)
            )
            if not is_like:
                return None
            if present:
                at = addresses if specs is self._param_specs else specs.addresses([arrays[i] for i in present])
                if at is None or (at == 0)[specs.spans[:, 1] > specs.spans[:, 0]].any():
                    return None
                own[:, present] = at, at + specs.spans[:, 0], at + specs.spans[:, 1]
        return self._moved(state, lists, places)

    def _moved(self, state: ParamState, lists: Lists, places: Any) -> Self:
        def views() -> list[list[Any]]:
            return [state.view_all(arrays) for arrays in lists]

        def trained() -> list[Any]:
            params, _, masters = views()
            return [params[i] if masters[i] is None else masters[i] for i in position]

        position = self._position.tolist()  # closures must not hold this program, which holds the memory of before
        program = copy.copy(self)
        program._ranges = self._ranges.moved(views, places[:, 1].ravel(), places[:, 2].ravel())
        program._kernel = self._kernel.moved(lists, places[:, 0, self._index])
        program._addresses, program._clear_at, program._trained = places[0, 0], b"", trained
        program._lists, program._kept = lists, []
        program._kept_at = state.addresses(state.buffers), state.addresses(state.masters)
        i = position[0]
        program._like = state.view(state.params[i] if state.masters[i] is None else state.masters[i])
        return program

    def _check_memory(self, state: ParamState, grads: Sequence[Any], begins: Any) -> None:
        """Raise for a gradient in memory that the step writes to."""
        now = begins.tobytes()
        if now == self._clear_at:
            return
        spans = self._grad_specs.spans
        if spans is not None and self._ranges.are_clear(begins + spans[:, 0], begins + spans[:, 1]):
            self._clear_at = now
            return
        found = self._ranges.find(state.view_all(list(grads)))
        if found is not None:
            raise ValueError(f"the gradient of {shown(self._names[found[0]])} must not share memory with {found[1]}")

    def refuse_changed(self, state: ParamState, grads: Sequence[Any]) -> None:
        """Raise for a parameter that its owner has changed, unless it sits out this step or sat out the last."""
        if state.params is not self._lists[0]:
            return
        for i in self._position.tolist():
            if grads[i] is None:
                continue
            name, p = state.names[i], state.params[i]
            if isinstance(p, np.ndarray) and not p.flags.writeable:
                check_writable(name, p)
            moved = ArraySpecs([p]).addresses([p])[0] != self._addresses[i]
            if moved or not self._param_specs.same(i, p):
                raise changed_in_place(name, *self._param_specs.form(i), p)

    # ----------------------------------------------------------------------------------------- what a step has made

    def _noted(self, state: ParamState, lists: Lists) -> tuple[Lists, tuple[Any, Any], list[Any]]:
        """Return lists of parameters, buffers and masters, with the addresses of those that move, and their specs."""
        kept = [[x for x in arrays if x is not None] for arrays in lists[1:]]
        kept_specs = [state.specs(arrays, self._specs_of) if arrays else None for arrays in kept]
        kept_at = state.addresses(lists[1]), state.addresses(lists[2])
        return lists, kept_at, [self._param_specs, *kept_specs]

    def _new_lists(self, state: ParamState) -> Any:
        """Return the lists of the state after the first step, as `_noted` does; None for a later one."""
        if self._is_published:
            return None
        return self._noted(state, (state.params, *state.owned(*self._kept)))

    def _publish(self, state: ParamState, lists: Any) -> None:
        """Pass new buffers and masters to the state, and drop unused masters."""
        if lists is not None:
            self._lists, self._kept_at, self._specs = lists
            state.keep(*self._lists[1:])
            self._is_published, self._changes_masters, self._to_fill = True, False, []


def absent_from(grads: Sequence[Any]) -> list[int]:
    """Return the positions of parameters without a gradient."""
    return [i for i, g in enumerate(grads) if g is None]


def kept_by(groups: Groups) -> list[tuple[bool, bool]]:
    """Return for each group whether its layers keep a momentum buffer, and a master copy if of half precision."""
    return [(needs_buffer(group), bool(group["master_weights"])) for group in groups]


def _row_offsets(rows: LayerRows, arrays: Sequence[Any]) -> Any:
    """Return where each row begins in its parameter's array, in bytes; None if addresses are unknown."""
    if not hasattr(arrays[0], "strides"):
        return None
    offsets: list[int] = []
    for own, x in zip(rows.slices, arrays, strict=True):
        strides = x.strides[: len(own.lead)]
        offsets += [sum(map(mul, index, strides)) for index in product(*map(range, own.lead))]
    return np.array(offsets, np.int64)
