"""A step over arrays that fit: on the host, or queued on a device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lars_array._arrays import is_on_accelerator
from lars_array._interrupts import defer_signals
from lars_array._stepper.arrays import Groups, StepArrays
from lars_array.core import Hyper, plan
from lars_array.hyperparams import inputs_of
from lars_array.kernels.base import Gradients
from lars_array.nonfinite import finite, quick_finite, refuse_entries, refuse_nonfinite
from lars_array.state.graph_memory import GraphMemory
from lars_array.state.shards import SkippedError
from lars_array.state.store import ParamState
from lars_array.telemetry import StepResult

if TYPE_CHECKING:
    from lars_array.state.device import DeviceState
    from lars_array.state.exchange import Exchange

__all__ = ["FOUND", "StepProgram", "exchange_nothing"]

FOUND = object()  # a found_inf that is known to be true


class StepProgram(StepArrays):
    """A step over the same parameters, with arrays of the same types and layouts: checked once, run many times.

    New momentum buffers and master copies reach the state only after a step that was taken.

    Parameters
    ----------
    state, grads, groups, kernel_type
        See `StepArrays`.
    """

    def __init__(self, state: ParamState, grads: Sequence[Any], groups: Groups, kernel_type: Any) -> None:
        super().__init__(state, grads, groups, kernel_type)
        self._prepared: tuple[Any, ...] = (None,)
        self._device_rows: Any = None
        self._exchange: Exchange | None = None
        self._graph_memory = GraphMemory()

    def cut(self, absent: list[int]) -> StepProgram | None:
        """See `StepArrays.cut`."""
        program = super().cut(absent)
        if program is not None:
            program._device_rows = program._exchange = None
        return program

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
        return self._exchange.prepare(groups, 1.0 if found_inf is FOUND else found_inf)

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

    # ----------------------------------------------------------------------------------------------------- on a device

    def _queue(
        self, state: ParamState, grads: Gradients, groups: Groups, found_inf: Any, exchange: Exchange | None
    ) -> StepResult:
        """Queue the step; the device decides whether to apply it."""
        like = self._like
        if self._device_rows is None:
            from lars_array.state.device_rows import DeviceRows  # only what is on a device pays for it

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


def _ensure_device(state: ParamState, like: Any) -> DeviceState:
    """Return the state on the device of an array, made from that on the host if there is none."""
    if state.device is None:
        from lars_array.state.device import DeviceState

        unused = [v is None for v in state.buffers]
        state.device = DeviceState(unused, state.previous_lr.tolist(), like=like)
    return state.device


def exchange_nothing(state: ParamState, groups: Groups, found_inf: Any) -> StepResult:
    """Take part in a step for which nothing has a gradient here."""
    from lars_array.state.device_exchange import DeviceExchange, exchange_of

    like = state.view(state.params[0])
    exchange = exchange_of(state.shards, [], [], like=like).prepare(groups, 1.0 if found_inf is FOUND else found_inf)
    exchange(np.empty((0, 3)), np.empty(0))
    exchange.complete()
    if exchange.check_finite():
        raise SkippedError
    if isinstance(exchange, DeviceExchange):
        device = _ensure_device(state, like)
        device.decide_elsewhere(exchange)
    return StepResult.of_nothing()
