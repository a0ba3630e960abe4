"""One optimizer step: checks the arrays, runs a kernel, and updates the state.

The stepper owns neither parameters nor state: both are arguments, as in torch's functional optimizers. It keeps a few
`StepProgram`s, each of which is valid as long as the same parameters take part in steps and arrays keep their types
and layouts; a step then needs nothing but the addresses of its arrays.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from itertools import product
from numbers import Real
from operator import is_, mul
from typing import TYPE_CHECKING, Any

import numpy as np
from array_api_compat import array_namespace

from lars_array import kernels
from lars_array._arrays import (
    ArraySpecs,
    changed_in_place,
    check_buffer,
    check_master,
    device_context,
    is_array,
    is_half,
    is_on_accelerator,
    real_dtype,
)
from lars_array._interrupts import SignalScope, defer_signals, uninterrupted
from lars_array._messages import listed, shown, warn
from lars_array.core import Hyper, plan, resolve
from lars_array.hyperparams import inputs_of, needs_buffer
from lars_array.kernels import check_kernel_name
from lars_array.kernels.base import Gradients, KernelArrays, make_kernel
from lars_array.kernels.lent import on_threads_of
from lars_array.layers import LayerRows, labels_of
from lars_array.nonfinite import (
    finite,
    finite_layers,
    max_finite,
    max_square_sum,
    quick_finite,
    refuse_entries,
    refuse_nonfinite,
)
from lars_array.state.device import DeviceRows, DeviceState
from lars_array.state.graph_memory import GraphMemory
from lars_array.state.memory import MemoryRanges, check_writable
from lars_array.state.shards import SkippedError, refusals_are_told
from lars_array.state.store import KEPT, ParamState, allocate_buffers
from lars_array.telemetry import StepResult

if TYPE_CHECKING:
    from lars_array.state.exchange import Exchange

# Adapters import the names from other modules here.
__all__ = [
    "KEPT",
    "ParamState",
    "SignalScope",
    "StepProgram",
    "Stepper",
    "check_kernel_name",
    "defer_signals",
    "finite_layers",
    "listed",
    "max_finite",
    "on_threads_of",
    "reads_previous_lr",
    "refusals_are_told",
    "shown",
    "uninterrupted",
    "warn",
]

Groups = Sequence[Mapping[str, Any]]
Lists = tuple[list[Any], list[Any], list[Any]]  # parameters, momentum buffers and masters

_FOUND = object()  # a found_inf that is known to be true

MOST_PROGRAMS = 4  # that are kept: other parameters may have gradients in every other step


class Stepper:
    """Takes steps with parameters and state that are passed to it.

    Parameters
    ----------
    kernel : str, optional
        As for `lars_array.LARS`.
    """

    def __init__(self, kernel: str | None = None) -> None:
        self._kernel_name = kernel
        self._kernel: Any = None
        self._programs: list[StepProgram] = []  # the last used first, none of the same parameters as another

    def choose_kernel(self, params: Sequence[Any]) -> None:
        """Choose the kernel for `params`; raise ValueError if the one asked for can't take them."""
        self._kernel = kernels.choose(params, self._kernel_name)

    def step(self, state: ParamState, grads: Sequence[Any], groups: Groups, found_inf: Any = None) -> StepResult | None:
        """Take one step: either all of it is done or, where it is rejected, nothing.

        Parameters
        ----------
        state : ParamState
            Parameters and their state; the arrays are modified in place.
        grads : sequence of arrays or None
            One a parameter; None for one that is skipped. Not modified.
        groups : sequence of mappings
            Complete and checked hyper-parameters. The same object as long as nothing in it has changed.
        found_inf : number or array of shape (), optional
            The step is skipped where it isn't zero.

        Returns
        -------
        StepResult or None
            None where the step is skipped. On a device that is decided later: `state.device` has the counts.

        Raises
        ------
        ValueError, TypeError
            For arrays that do not fit, naming the parameter.
        NonFiniteError
            For sums that are not finite, where the group's `nonfinite` is "raise".
        RefusedElsewhereError
            If another process has refused the step.
        """
        if found_inf is not None:
            _check_found_inf(found_inf)
            stays = is_array(found_inf) and is_on_accelerator(found_inf) and is_on_accelerator(state.params[0])
            found_inf = found_inf if stays else _FOUND if bool(found_inf) else None
        shards = state.shards
        has_none = all(g is None for g in grads)
        if has_none and not shards:
            return None if found_inf is _FOUND else StepResult.of_nothing()
        with device_context(state.params[0]), np.errstate(all="ignore"):  # non-finite numbers are reported by name
            try:
                if has_none:
                    return _exchange_nothing(state, groups, found_inf)
                program, gradients = self.bind(state, grads, groups)
                if found_inf is _FOUND and not shards:
                    return None
                return program.run(state, gradients, groups, found_inf)
            except SkippedError:
                return None

    def bind(self, state: ParamState, grads: Sequence[Any], groups: Groups) -> tuple[StepProgram, Gradients]:
        """Return the program for these arrays, made anew where one of them changed its type or layout.

        All checks that need no sums are done then. Parameters and errors are those of `step`.
        """
        found = self._known(state, grads, groups)
        if found is not None:
            return found
        if self._programs:
            self._programs[0].refuse_changed(state, grads)
        state.prepare()
        if self._kernel is None:
            self.choose_kernel(state.view_all(state.params))
        filled = self._filled(state, grads, groups)
        if filled is not None:
            with suppress(ValueError, TypeError):  # of a parameter that sits out, such as a read-only one
                self._programs.insert(1, StepProgram(state, filled, groups, self._kernel))
                found = self._known(state, grads, groups)
        if found is None:
            program = StepProgram(state, grads, groups, self._kernel)
            gradients: Any = program.gradients(state, grads)
            found = program, gradients
            self._use(groups, program)
        return found

    def _known(self, state: ParamState, grads: Sequence[Any], groups: Groups) -> tuple[StepProgram, Gradients] | None:
        """Return a known program and its gradients, or one cut from that of all parameters; None if none fits."""
        absent = _absent(grads)
        for wanted in (absent, []) if absent else (absent,):
            known = next((program for program in self._programs if program.absent == wanted), None)
            placed = None if known is None else known.placed(state, groups)
            program = placed if placed is None or wanted == absent else placed.cut(absent)
            gradients = None if program is None else program.gradients(state, grads)
            if program is not None and gradients is not None:
                self._use(groups, *([program] if program is placed else [program, placed]))
                return program, gradients
        return None

    def _filled(self, state: ParamState, grads: Sequence[Any], groups: Groups) -> list[Any] | None:
        """Return gradients of all parameters, where programs of some are to be cut from one of all; else None."""
        absent = _absent(grads)
        is_other = absent and self._programs and absent != self._programs[0].absent
        kinds = {type(g) for g in grads if g is not None}  # JAX's step takes NumPy's gradients too
        is_able = hasattr(self._kernel, "part") and kinds == {type(state.like_gradient(state.params[0]))}
        if not (is_other and is_able and _is_complete(state, absent, groups)):
            return None
        return [state.like_gradient(p) if g is None else g for g, p in zip(grads, state.params, strict=True)]

    def _use(self, groups: Groups, *programs: Any) -> None:
        """Put programs first, the one of this step before the others, and forget others of the same parameters."""
        if self._programs[:1] == [programs[0]]:
            return
        for last in self._programs[:1]:
            if last._prepared[0] is groups:  # by group, whichever parameters
                programs[0]._prepared = last._prepared
        absent = [program.absent for program in programs]
        others = [program for program in self._programs if program.absent not in absent]
        self._programs = [*programs, *others][:MOST_PROGRAMS]

    def __getstate__(self) -> dict[str, Any]:
        # Programs hold addresses, and another machine may have another fastest kernel.
        return {"_kernel_name": self._kernel_name, "_kernel": None, "_programs": []}


class StepProgram:
    """A step over the same parameters, with arrays of the same types and layouts: checked once, run many times.

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
        self.absent = _absent(grads)
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
        self._keeps, self._groups = _keeps(groups), groups
        buffers, masters = self._keep(state, params)
        self._specs_of = specs_of = getattr(kernel_type, "specs", None)
        self._param_specs, self._grad_specs = state.specs(state.params, specs_of), state.specs(own_grads, specs_of)
        self._addresses = self._param_specs.addresses(state.params)
        self._lists, self._kept_at, self._specs = self._noted(state, (state.params, state.buffers, state.masters))
        self._ranges = MemoryRanges(state.names, params, *self._kept)
        # Gradients serve for their types and layouts. They are not kept: the owner of a model frees them after a step.
        self._make_kernel(state, kernel_type, KernelArrays(own, state.view_all(own_grads), buffers, masters))
        self._clear_at = b""  # the addresses of gradients that were last found to share no memory with these
        self._prepared: tuple[Any, ...] = (None,)
        self._device_rows: Any = None
        self._exchange: Exchange | None = None
        self._graph_memory = GraphMemory()

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

    def _noted(self, state: ParamState, lists: Lists) -> tuple[Lists, tuple[Any, Any], list[Any]]:
        """Return lists of parameters, buffers and masters, with the addresses of those that move, and their specs."""
        kept = [[x for x in arrays if x is not None] for arrays in lists[1:]]
        kept_specs = [state.specs(arrays, self._specs_of) if arrays else None for arrays in kept]
        kept_at = state.addresses(lists[1]), state.addresses(lists[2])
        return lists, kept_at, [self._param_specs, *kept_specs]

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

    def cut(self, absent: list[int]) -> StepProgram | None:
        """Return the program of all parameters but some, from that of all; None if its kernel can't be cut."""
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
        program._clear_at, program._device_rows, program._exchange = b"", None, None
        return program

    def placed(self, state: ParamState, groups: Groups) -> StepProgram | None:
        """Return this program, or one for arrays that lie elsewhere; None if more than addresses changes.

        Raises ValueError for arrays that overlap.
        """
        if groups is not self._groups:
            if _keeps(groups) != self._keeps:
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

    def _moved(self, state: ParamState, lists: Lists, places: Any) -> StepProgram:
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

    # ---------------------------------------------------------------------------------------------------- on the host

    def run(self, state: ParamState, grads: Gradients, groups: Groups, found_inf: Any) -> StepResult | None:
        """Take a step with gradients from `bind`; see `Stepper.step`."""
        for p, master in self._to_fill:  # with the parameter as it is now, until a step is taken
            master[...] = self.xp.astype(p, master.dtype)
        if is_on_accelerator(self._like):
            if not state.shards:
                return self._queue(state, grads, groups, found_inf, None)
            with self._graph_memory.while_capturing(self._kernel, self._like):
                return self._queue(state, grads, groups, None, self._exchange_of(state, groups, found_inf))
        exchange = self._exchange_of(state, groups, found_inf)
        policies = [group["nonfinite"] for group in groups]
        of_rows = {policies[k] for k in self._used_groups}
        writes = of_rows == {"propagate"} and exchange is None
        change = self._change(state, groups)
        fused = self._fused(state, grads, groups, exchange, write=writes)
        S, C, result = fused or self._staged(state, grads, groups, exchange)
        if exchange is not None:
            exchange.complete()
        is_skipped = of_rows != {"propagate"} and self._is_skipped(S, C, policies, grads, exchange)
        if exchange is not None:
            is_skipped = exchange.check_finite() or is_skipped
        if is_skipped:
            return None
        if fused is None or not writes:
            write = self._kernel.writer(grads, C)
            defer_signals()  # until the step is counted
            write()
        self._commit(state, change)
        return result

    def _exchange_of(self, state: ParamState, groups: Groups, found_inf: Any) -> Exchange | None:
        """Return the sums over all processes for this step; None where all layers are whole here."""
        if not state.shards:
            return None
        if self._exchange is None:
            from lars_array.state.device_exchange import exchange_of  # only what has pieces of layers pays for it

            numbers = state.row_numbers(self._position.tolist())
            self._exchange = exchange_of(state.shards, numbers, self._joined, like=self._like)
        return self._exchange.prepare(groups, 1.0 if found_inf is _FOUND else found_inf)

    def _fused(
        self, state: ParamState, grads: Gradients, groups: Groups, exchange: Exchange | None, *, write: bool
    ) -> Any:
        """Return S, C and the result from a kernel that computes coefficients by itself, None without one."""
        if (self._joined and exchange is None) or not hasattr(self._kernel, "fused"):
            return None
        if groups is not self._prepared[0]:
            count, like = len(groups), self._like
            group_of = [k for k in range(count) for _ in range(4)]
            limit = np.tile(np.repeat([np.finfo(kind).max for kind in ("f4", "f8")], 2), count)
            lists = group_of, [False, True] * 2 * count, [0.0] * 4 * count
            inputs = inputs_of(groups, *lists, limit, like=like, xp=self.xp)
            self._prepared = groups, inputs, self._kernel.prepare(inputs)
        _, inputs, prepared = self._prepared
        if prepared is None:
            return None
        row, previous_lr = self._hyper_row, state.previous_lr[self._row_param]
        arguments = grads, inputs, prepared, row, previous_lr
        if write:
            defer_signals()  # until the step is counted
        S, C, gamma = self._kernel.fused(*arguments, write=write, exchange=exchange)

        def row_inputs() -> tuple[Any, Hyper, list[Any]]:
            hyper = Hyper(*(field[row] for field in inputs.hyper))._replace(previous_lr=previous_lr)
            return gamma[row], hyper, [inputs.rules[k] for k in row.tolist()]

        return S, C, StepResult(self._row_names, S, row_inputs)

    def _staged(
        self, state: ParamState, grads: Gradients, groups: Groups, exchange: Exchange | None
    ) -> tuple[Any, Any, StepResult]:
        """Return S, C and the result from a kernel that only takes sums."""
        first, previous_lr = self._hyper_row % 2 == 1, state.previous_lr[self._row_param]
        lists = self._row_group.tolist(), first.tolist(), previous_lr.tolist()
        like, xp = self._like, self.xp
        inputs = inputs_of(groups, *lists, self._limit, like=like, xp=xp)
        joined, sums = self._joined, self._kernel.sums
        outputs = plan(inputs, lambda operand: sums(grads, operand), xp=xp, joined=joined, exchange=exchange)
        result = StepResult(self._row_names, outputs.S, lambda: (outputs.gamma, outputs.hyper, outputs.rules))
        return outputs.S, outputs.C, result

    def _is_skipped(self, S: Any, C: Any, policies: Sequence[str], grads: Gradients, exchange: Exchange | None) -> bool:
        """Return whether a row that is not finite prevents the step; raise if that is an error."""
        if self._square_limit is None and quick_finite(S, C, self._least_limit, xp=self.xp):
            return False
        ok = finite(S, C, self._limit, self._square_limit, xp=self.xp)
        if bool(self.xp.all(ok)):
            return False
        of_rows = [policies[k] for k in self._row_group.tolist()]
        offenders = [i for i, policy in enumerate(of_rows) if policy != "propagate" and not bool(ok[i])]
        offenders.sort(key=lambda i: of_rows[i] != "raise")
        if offenders and of_rows[offenders[0]] == "raise":
            lists = offenders, self._row_names, self._trained(), grads.arrays
            if exchange is not None:
                refuse_entries(*lists, S=S, xp=self.xp)
                exchange.check_finite()
            refuse_nonfinite(*lists, xp=self.xp)
        return bool(offenders)

    def _change(self, state: ParamState, groups: Groups) -> tuple[Any, Any]:
        """Return what `_commit` puts into the state, made before the first write: memory may run out."""
        rates = state.previous_lr.copy()
        rates[self._index] = np.array([group["lr"] for group in groups], float)[self._group_of]
        return rates, self._new_lists(state)

    def _commit(self, state: ParamState, change: tuple[Any, Any]) -> None:
        """Update the state after a step that was taken."""
        state.previous_lr, lists = change
        self._publish(state, lists)
        self._hyper_row = self._next_row

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

    # ----------------------------------------------------------------------------------------------------- on a device

    def _queue(
        self, state: ParamState, grads: Gradients, groups: Groups, found_inf: Any, exchange: Exchange | None
    ) -> StepResult:
        """Queue the step; the device decides whether to apply it."""
        like = self._like
        if self._device_rows is None:
            keeps = [self._keeps[k][0] for k in self._row_group.tolist()]
            param, place = self._row_param.tolist(), state.row_numbers(self._position.tolist())
            lists = self._row_names, self._row_group.tolist(), param, place, keeps
            self._device_rows = DeviceRows(*lists, self._joined, state.group_of, self._limit, self._square_limit, like)
        device, rows = _ensure_device(state, like), self._device_rows
        capturing = getattr(self._kernel, "is_capturing", bool)()
        device.write(groups, captured=capturing)
        # Masters are known to the host: it waits for the step that makes or drops them.
        waits = self._changes_masters and not capturing
        before, lists = int(device.counts[0]) if waits else 0, self._new_lists(state)
        result: StepResult = rows.step(self._kernel, grads, groups, device, found_inf, exchange)
        if not waits or int(device.counts[0]) > before:
            self._publish(state, lists)
        return result


@cache
def reads_previous_lr(rule: Any) -> bool:
    """Return whether steps by a rule depend on the learning rate of the step before."""
    from lars_array.kernels.tape import INPUTS, record  # only what asks pays for the import

    tape = record(resolve(rule))
    register = INPUTS.index("previous_lr")
    return tape is None or bool((tape.operations[:, 1:] == register).any() or (tape.outputs == register).any())


def _check_found_inf(x: Any) -> None:
    is_numpy = isinstance(x, np.ndarray | np.generic)
    is_number = x.dtype.kind in "biuf" if is_numpy else isinstance(x, Real) or is_array(x)
    if not is_number or tuple(getattr(x, "shape", ())) != ():
        raise TypeError(f"found_inf must be a number, or an array of shape (); got {shown(x)}")


def _ensure_device(state: ParamState, like: Any) -> DeviceState:
    """Return the state on the device of an array, made from that on the host if there is none."""
    if state.device is None:
        unused = [v is None for v in state.buffers]
        state.device = DeviceState(unused, state.previous_lr.tolist(), like=like)
    return state.device


def _exchange_nothing(state: ParamState, groups: Groups, found_inf: Any) -> StepResult:
    """Take part in a step for which nothing has a gradient here."""
    from lars_array.state.device_exchange import DeviceExchange, exchange_of

    like = state.view(state.params[0])
    exchange = exchange_of(state.shards, [], [], like=like).prepare(groups, 1.0 if found_inf is _FOUND else found_inf)
    exchange(np.empty((0, 3)), np.empty(0))
    exchange.complete()
    if exchange.check_finite():
        raise SkippedError
    if isinstance(exchange, DeviceExchange):
        device = _ensure_device(state, like)
        device.decide_elsewhere(exchange)
    return StepResult.of_nothing()


def _is_complete(state: ParamState, index: Sequence[int], groups: Groups) -> bool:
    """Return whether the parameters at `index` have all that their groups keep for them: taking part makes nothing."""
    keeps = _keeps(groups)
    for i in index:
        buffer, master = keeps[state.group_of[i]]
        if (buffer and state.buffers[i] is None) or (master and state.masters[i] is None and is_half(state.params[i])):
            return False
    return True


def _absent(grads: Sequence[Any]) -> list[int]:
    return [i for i, g in enumerate(grads) if g is None]


def _keeps(groups: Groups) -> list[tuple[bool, bool]]:
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
