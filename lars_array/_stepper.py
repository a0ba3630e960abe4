"""One optimizer step: checks the arrays, runs a kernel, and updates the state.

The stepper owns neither parameters nor state: both are arguments, as in torch's functional optimizers. It keeps one
`StepProgram`, which is valid as long as the same parameters take part in steps and arrays keep their types and
layouts; a step then needs nothing but the addresses of its arrays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from operator import is_, mul
from typing import Any

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
from lars_array.core import Hyper, plan, resolve
from lars_array.hyperparams import inputs_of, needs_buffer
from lars_array.kernels.base import Gradients, KernelArrays, make_kernel
from lars_array.layers import LayerRows, labels_of
from lars_array.nonfinite import finite, finite_layers, max_finite, max_square_sum, quick_finite, refuse_nonfinite
from lars_array.state.device import DeviceRows, DeviceState
from lars_array.state.memory import MemoryRanges, check_writable
from lars_array.state.store import KEPT, ParamState, allocate_buffers
from lars_array.telemetry import StepResult

# Adapters import the names from other modules here.
__all__ = ["KEPT", "ParamState", "StepProgram", "Stepper", "finite_layers", "max_finite", "reads_previous_lr"]

Groups = Sequence[Mapping[str, Any]]

_FOUND = object()  # a found_inf that is known to be true


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
        self._program: StepProgram | None = None

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
        """
        if found_inf is not None:
            stays = is_array(found_inf) and is_on_accelerator(found_inf) and is_on_accelerator(state.params[0])
            found_inf = found_inf if stays else _FOUND if bool(found_inf) else None
        if all(g is None for g in grads):
            return None if found_inf is _FOUND else StepResult.of_nothing()
        with device_context(state.params[0]), np.errstate(all="ignore"):  # non-finite numbers are reported by name
            program, gradients = self.bind(state, grads, groups)
            return None if found_inf is _FOUND else program.run(state, gradients, groups, found_inf)

    def bind(self, state: ParamState, grads: Sequence[Any], groups: Groups) -> tuple[StepProgram, Gradients]:
        """Return the program for these arrays, made anew where one of them changed its type or layout.

        All checks that need no sums are done then. Parameters and errors are those of `step`.
        """
        program = self._program
        gradients = None if program is None else program.bind(state, grads, groups)
        if program is None or gradients is None:
            state.prepare()
            if self._kernel is None:
                self.choose_kernel(state.view_all(state.params))
            program = StepProgram(state, grads, groups, self._kernel)
            gradients = program.bind(state, grads, groups)
            assert gradients is not None
            self._program = program
        return program, gradients

    def __getstate__(self) -> dict[str, Any]:
        # Programs hold addresses, and another machine may have another fastest kernel.
        return {"_kernel_name": self._kernel_name, "_kernel": None, "_program": None}


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
        self._absent = [i for i, g in enumerate(grads) if g is None]
        self._index: Any = [i for i, g in enumerate(grads) if g is not None] if self._absent else slice(None)
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
        self._keeps = _keeps(groups)
        buffers, masters = self._keep(state, params)
        specs_of = getattr(kernel_type, "specs", None)
        self._param_specs, self._grad_specs = state.specs(state.params, specs_of), state.specs(own_grads, specs_of)
        self._addresses = self._param_specs.addresses(state.params)
        self._note_lists(state)
        self._ranges = MemoryRanges(state.names, params, *self._kept)
        # Gradients serve for their types and layouts. They are not kept: the owner of a model frees them after a step.
        self._make_kernel(state, kernel_type, KernelArrays(own, state.view_all(own_grads), buffers, masters))
        self._clear_at = b""  # the addresses of gradients that were last found to share no memory with these
        self._prepared: tuple[Any, ...] = (None,)
        self._device_rows: Any = None

    def _own(self, x: Any) -> Any:
        """Return the entries of a list for the parameters that take part."""
        return [x[i] for i in self._index] if self._absent else x

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
        self._trained = trained = arrays.trained
        kinds = [real_dtype(p, self.xp) for p in trained]
        wide = np.array([kind == self.xp.float64 for kind in kinds])
        # Of the hyper-parameters each group has four rows: for two types, with and without a momentum buffer; now, and
        # after a step.
        first = np.array([v is None for v in self._own(state.buffers)], bool)
        keeps = np.array([buffer for buffer, _ in self._keeps])[self._group_of]
        begin = 4 * self._row_group + 2 * wide
        self._hyper_row, self._next_row = (begin + x[self._owner] for x in (first, first & ~keeps))
        dtypes = [g.dtype for g in arrays.grads]
        self._limit = max_finite(trained, like=trained[0], xp=self.xp)
        self._square_limit = max_square_sum(trained, dtypes, like=trained[0], xp=self.xp)
        self._least_limit = min(float(self.xp.finfo(x).max) for x in set(kinds))

    # ----------------------------------------------------------------------------------------------- arrays of a step

    def _note_lists(self, state: ParamState) -> None:
        self._lists = state.params, state.buffers, state.masters
        self._kept_at = state.addresses(state.buffers), state.addresses(state.masters)

    def bind(self, state: ParamState, grads: Sequence[Any], groups: Groups) -> Gradients | None:
        """Return the gradients of a step, or None if the program does not fit its arrays any more.

        Raises
        ------
        ValueError
            For a parameter that was changed in place, or a gradient in memory that the step writes to.
        """
        params, *kept = self._lists
        addresses = self._param_specs.addresses(state.params)
        if addresses is None or addresses.tobytes() != self._addresses.tobytes():
            if state.params is params:
                self._refuse_changed(state, grads)
            return None
        for arrays, before, at in zip((state.buffers, state.masters), kept, self._kept_at, strict=True):
            if arrays is not before and not (all(map(is_, arrays, before)) and state.addresses(arrays) == at):
                return None
        if groups is not self._prepared[0] and _keeps(groups) != self._keeps:
            return None
        if any(grads[i] is not None for i in self._absent):
            return None
        own = self._own(grads)
        begins = self._grad_specs.addresses(own)
        if begins is None:
            return None
        self._check_memory(state, own, begins)
        rows, views = self._rows, state.view_all
        at = begins if self._offsets is None else begins[self._owner] + self._offsets
        return Gradients(at, lambda: views(own) if rows is None else rows.views(views(own)))

    def _check_memory(self, state: ParamState, grads: Sequence[Any], begins: Any) -> None:
        """Raise for a gradient in memory that the step writes to."""
        now = begins.tobytes()
        if now == self._clear_at:
            return
        spans = self._grad_specs.spans
        if spans is not None and self._ranges.are_clear(begins + spans[:, 0], begins + spans[:, 1]):
            self._clear_at = now
            return
        for name, g in zip(self._names, grads, strict=True):
            owner = self._ranges.owner(state.view(g))
            if owner is not None:
                raise ValueError(f"the gradient of {name!r} must not share memory with {owner}")

    def _refuse_changed(self, state: ParamState, grads: Sequence[Any]) -> None:
        """Raise for a parameter that its owner has changed, unless it sits out this step or sat out the last."""
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
        if is_on_accelerator(self._trained[0]):
            return self._queue(state, grads, groups, found_inf)
        policies = [group["nonfinite"] for group in groups]
        of_rows = {policies[k] for k in self._used_groups}
        fused = self._fused(state, grads, groups, write=of_rows == {"propagate"})
        S, C, result = fused or self._staged(state, grads, groups)
        if of_rows != {"propagate"} and self._is_skipped(S, C, policies, grads):
            return None
        if fused is None or of_rows != {"propagate"}:
            self._kernel.apply(grads, C)
        self._commit(state, groups)
        return result

    def _fused(self, state: ParamState, grads: Gradients, groups: Groups, *, write: bool) -> Any:
        """Return S, C and the result from a kernel that computes coefficients by itself, None without one."""
        if self._joined or not hasattr(self._kernel, "fused"):
            return None
        if groups is not self._prepared[0]:
            count, like = len(groups), self._trained[0]
            group_of = [k for k in range(count) for _ in range(4)]
            limit = np.tile(np.repeat([np.finfo(kind).max for kind in ("f4", "f8")], 2), count)
            lists = group_of, [False, True] * 2 * count, [0.0] * 4 * count
            inputs = inputs_of(groups, *lists, limit, like=like, xp=self.xp)
            self._prepared = groups, inputs, self._kernel.prepare(inputs)
        _, inputs, prepared = self._prepared
        if prepared is None:
            return None
        row, previous_lr = self._hyper_row, state.previous_lr[self._row_param]
        S, C, gamma = self._kernel.fused(grads, inputs, prepared, row, previous_lr, write=write)

        def row_inputs() -> tuple[Any, Hyper, list[Any]]:
            hyper = Hyper(*(field[row] for field in inputs.hyper))._replace(previous_lr=previous_lr)
            return gamma[row], hyper, [inputs.rules[k] for k in row.tolist()]

        return S, C, StepResult(self._row_names, S, row_inputs)

    def _staged(self, state: ParamState, grads: Gradients, groups: Groups) -> tuple[Any, Any, StepResult]:
        """Return S, C and the result from a kernel that only takes sums."""
        first, previous_lr = self._hyper_row % 2 == 1, state.previous_lr[self._row_param]
        lists = self._row_group.tolist(), first.tolist(), previous_lr.tolist()
        like, xp = self._trained[0], self.xp
        inputs = inputs_of(groups, *lists, self._limit, like=like, xp=xp)
        outputs = plan(inputs, lambda operand: self._kernel.sums(grads, operand), xp=xp, joined=self._joined)
        result = StepResult(self._row_names, outputs.S, lambda: (outputs.gamma, outputs.hyper, outputs.rules))
        return outputs.S, outputs.C, result

    def _is_skipped(self, S: Any, C: Any, policies: Sequence[str], grads: Gradients) -> bool:
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
            refuse_nonfinite(offenders, self._row_names, self._trained, grads.arrays, xp=self.xp)
        return bool(offenders)

    def _commit(self, state: ParamState, groups: Groups) -> None:
        """Update the state after a step that was taken."""
        rates = np.array([group["lr"] for group in groups], float)[self._group_of]
        if self._absent:
            rates, own = state.previous_lr.copy(), rates
            rates[self._index] = own
        state.previous_lr = rates
        self._publish(state)
        self._hyper_row = self._next_row

    def _publish(self, state: ParamState) -> None:
        """Pass new buffers and masters to the state, and drop unused masters."""
        if not self._is_published:
            state.keep(*self._kept)
            self._is_published, self._changes_masters, self._to_fill = True, False, []
            self._note_lists(state)

    # ----------------------------------------------------------------------------------------------------- on a device

    def _queue(self, state: ParamState, grads: Gradients, groups: Groups, found_inf: Any) -> StepResult:
        """Queue the step; the device decides whether to apply it."""
        like = self._trained[0]
        if state.device is None:
            unused = [v is None for v in state.buffers]
            state.device = DeviceState(unused, state.previous_lr.tolist(), like=like)
        if self._device_rows is None:
            keeps = [self._keeps[k][0] for k in self._row_group.tolist()]
            param, place = self._row_param.tolist(), state.row_numbers(self._position.tolist())
            lists = self._row_names, self._row_group.tolist(), param, place, keeps
            self._device_rows = DeviceRows(*lists, self._joined, state.group_of, self._limit, self._square_limit, like)
        device, rows = state.device, self._device_rows
        capturing = getattr(self._kernel, "is_capturing", bool)()
        device.write(groups, captured=capturing)
        # Masters are known to the host: it waits for the step that makes or drops them.
        waits = self._changes_masters and not capturing
        before = int(device.counts[0]) if waits else 0
        result: StepResult = rows.step(self._kernel, grads, groups, device, found_inf)
        if not waits or int(device.counts[0]) > before:
            self._publish(state)
        return result


def reads_previous_lr(rule: Any) -> bool:
    """Return whether steps by a rule depend on the learning rate of the step before."""
    from lars_array.kernels.tape import INPUTS, record  # only what asks pays for the import

    tape = record(resolve(rule))
    register = INPUTS.index("previous_lr")
    return tape is None or bool((tape.operations[:, 1:] == register).any() or (tape.outputs == register).any())


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
