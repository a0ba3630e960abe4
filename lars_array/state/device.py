"""State on a device: the host queues steps without waiting, and the device decides which are taken."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from numbers import Real
from sys import float_info
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from array_api_compat import array_namespace, is_cupy_array, is_torch_array

from lars_array._arrays import accumulation_dtype, asarray, synchronize
from lars_array._interrupts import defer_signals
from lars_array._messages import shown
from lars_array.core import BOOLEANS, Hyper, Rule, StageOutputs, plan, resolve, with_max_ratio
from lars_array.hyperparams import GROUP_FIELDS, row_values, with_rules
from lars_array.nonfinite import CAUSES, ELSEWHERE, GRADIENT, PARAMETER, REFUSAL, UPDATE, NonFiniteError, finite
from lars_array.state.shards import RefusedElsewhereError
from lars_array.telemetry import StepResult

if TYPE_CHECKING:
    from lars_array.state.device_exchange import DeviceExchange

__all__ = ["DeviceRows", "DeviceState", "PinnedCounts", "StepCounts"]

ENTRIES = 4  # of the counts
_NUMBER = float, int, Real  # the abstract class last: it takes far longer to ask


class StepCounts(NamedTuple):
    """Steps taken, skipped and rejected by a device, and the code of the last rejected layer."""

    taken: int = 0
    skipped: int = 0
    rejected: int = 0
    offender: int = 0

    def error(self, names: Sequence[str]) -> NonFiniteError | RefusedElsewhereError:
        """Return the error for the last rejected step, given the names of all rows."""
        row, cause = divmod(self.offender, len(CAUSES))
        name, kind = names[row], CAUSES[cause]
        if cause == REFUSAL:
            return RefusedElsewhereError(
                "not all processes took part alike in an earlier step, which changed nothing: one has refused it, "
                "lacks a gradient, or has other hyper-parameters"
            )
        if cause == ELSEWHERE:
            reason = "a layer of another process was not finite"
        elif kind == "update":
            reason = f"the update of {shown(name)} overflowed its type or the float64 of its norms"
        else:
            reason = f"the norm of the {kind} of {shown(name)} was not finite"
        return NonFiniteError(f"{reason} in an earlier step, which changed nothing")


_in_graphs: dict[int, Any] = {}  # pinned memory that replays may write to at any time, by address
_in_flight: dict[int, tuple[Any, Any]] = {}  # events of CuPy, and pinned memory that is written to until they are done


class PinnedCounts:
    """A copy of a device's counts in pinned host memory, which the host reads without waiting.

    A copy that is captured in a CUDA graph is made again by each replay. Memory that the device may still write to
    outlives this object: CuPy's pool would give it to others at once, where torch's waits by itself.

    Parameters
    ----------
    counts : int64 array of shape (ENTRIES,)
        On the device; written in place.
    """

    def __init__(self, counts: Any) -> None:
        self.counts = counts
        self.pinned: Any = None
        if is_cupy_array(counts):
            import cupy
            import cupyx

            # Here, since in a finalizer it might break the capture of a graph to ask for an event.
            for address, (event, _) in list(_in_flight.items()):
                if event.done:
                    _in_flight.pop(address, None)
            self.pinned, self._event = cupyx.zeros_pinned(ENTRIES, np.int64), cupy.cuda.Event(disable_timing=True)
            weakref.finalize(self, _in_flight.setdefault, self.pinned.ctypes.data, (self._event, self.pinned))
        elif is_torch_array(counts) and counts.device.type == "cuda":
            import torch

            self._host = torch.zeros(ENTRIES, dtype=torch.int64, pin_memory=True)
            self.pinned = self._host.numpy()

    def copy(self) -> None:
        """Queue a copy of the counts behind all work that the device has been given."""
        if is_cupy_array(self.counts):
            import cupy

            # Not by the array's own method, which fails while a graph is captured.
            runtime, stream = cupy.cuda.runtime, cupy.cuda.get_current_stream()
            here, there = self.pinned.ctypes.data, self.counts.data.ptr
            runtime.memcpyAsync(here, there, self.pinned.nbytes, runtime.memcpyDeviceToHost, stream.ptr)
            if stream.is_capturing():
                _in_graphs[here] = self.pinned
            else:
                self._event.record(stream)
        elif self.pinned is not None:
            self._host.copy_(self.counts, non_blocking=True)

    def read(self, *, wait: bool) -> StepCounts | None:
        """Return the counts that have arrived, or with `wait` the final ones; None if they are unknown without."""
        if wait:  # for all streams, and for steps of which no copy was queued
            synchronize(self.counts)
            return StepCounts(*(int(self.counts[i]) for i in range(ENTRIES)))
        if self.pinned is None:
            return None
        once = self.pinned.tolist()
        while once != (again := self.pinned.tolist()):  # it was being written
            once = again
        return StepCounts(*once)


class DeviceState:
    """Hyper-parameters, the state of each parameter and the counts of steps, as arrays on a device.

    Parameters
    ----------
    first : sequence of bool
        Whether each parameter has no momentum buffer yet.
    previous_lr : sequence of float
        The learning rate of the last step of each, 0 before the first.
    like : array
        An array on the device.

    Attributes
    ----------
    hyper : array of shape (groups, fields)
        The hyper-parameters of each group in the order of `GROUP_FIELDS`, booleans as 0 and 1; None before `write`. It
        stays the same array, and is modified in place.
    first, previous_lr : arrays of shape (parameters,)
        Modified in place, so that a graph can be replayed.
    counts : int64 array of shape (ENTRIES,)
        See `StepCounts`; modified in place.
    """

    def __init__(self, first: Sequence[bool], previous_lr: Sequence[float], *, like: Any) -> None:
        self.xp = xp = array_namespace(like)
        self.like = like
        self.hyper: Any = None
        self.first = asarray(list(first), xp.bool, like=like, xp=xp)
        self.previous_lr = asarray(list(previous_lr), accumulation_dtype(xp), like=like, xp=xp)
        self.counts = asarray([0] * ENTRIES, xp.int64, like=like, xp=xp)
        self._pinned = PinnedCounts(self.counts)
        self._read = StepCounts()
        self._queued, self._confirmed = 0, 0
        self._written: list[list[Any]] = []
        self._groups: Any = None  # all of whose values are numbers, and in `hyper`
        self._in_graphs: set[tuple[int, int]] = set()  # replays write these: their values are unknown here

    def write(self, groups: Sequence[Mapping[str, Any]], *, captured: bool) -> None:
        """Update `hyper` where a number has changed; the host neither waits nor sends memory that a graph would reread.

        Parameters
        ----------
        groups : sequence of mappings
            Complete and checked hyper-parameters; numbers, or arrays of shape () on the device. The same object as
            long as nothing in it has changed.
        captured : bool
            Whether a graph is being captured: each of its replays writes what is written now.
        """
        if groups is self._groups and not self._in_graphs:
            return
        self._groups = None
        rows = [row_values(group) for group in groups]
        if self.hyper is None:
            numbers = [[float(value) if isinstance(value, Real) else 0.0 for value in row] for row in rows]
            self._written = numbers
            self.hyper = asarray(numbers, accumulation_dtype(self.xp), like=self.like, xp=self.xp)
        for row, (values, written) in enumerate(zip(rows, self._written, strict=True)):
            for column, value in enumerate(values):
                if isinstance(value, _NUMBER):
                    value = float(value)
                    if value == written[column] and (row, column) not in self._in_graphs:
                        continue
                if captured:
                    self._in_graphs.add((row, column))
                written[column] = None  # until it is there
                # A slice, not an element: torch fills the one and copies the other from the host.
                self.hyper[row : row + 1, column : column + 1] = value
                written[column] = value if isinstance(value, float) else None
        if all(x is not None for written in self._written for x in written):
            self._groups = groups

    @property
    def expected_steps(self) -> int:
        """The number of steps taken, as far as the host knows: one counts until the device has reported otherwise."""
        return self._confirmed + self._queued - self._read.skipped - self._read.rejected

    def vectors(self, group_of: Any, owner: Any, limit: Any = float_info.max) -> Hyper:
        """Return the hyper-parameters and states of rows, given index arrays of the group and the parameter of each.

        `limit` is that of `nonfinite.finite`.
        """
        return _vectors(self.hyper, self.first, self.previous_lr, group_of, owner, limit, xp=self.xp)

    def advanced(self, taken: Any, stepped: Any, keeps: Any, lr: Any) -> tuple[Any, Any]:
        """Return `first` and `previous_lr` after a step, as new arrays.

        Parameters
        ----------
        taken : bool array of shape (), or None
            Whether the step is taken; None: it is.
        stepped, keeps : bool arrays of shape (parameters,)
            Which parameters took part, and which of these keep a momentum buffer.
        lr : array of shape (parameters,)
            Their learning rates.
        """
        if taken is not None:
            stepped = stepped & taken
        return self.first & ~(stepped & keeps), self.xp.where(stepped, lr, self.previous_lr)

    def decide(
        self,
        ok: Any,
        raises: Any,
        found_inf: Any,
        outputs: StageOutputs,
        place: Any,
        exchange: DeviceExchange | None = None,
    ) -> tuple[Any, Any]:
        """Return whether a step is taken, a bool array of shape () or None for certainly, and the counts after it.

        Parameters
        ----------
        ok : bool array of shape (rows,), or None
            False where a row prevents the step; None: no row does.
        raises : bool array of shape (rows,)
            Where that is an error.
        found_inf : array of shape (), or None
            The step is skipped where it isn't zero.
        outputs : StageOutputs
            Its sums say whether the gradient or the parameter was not finite.
        place : integer array of shape (rows,)
            The number of each row among all rows of the model.
        exchange : DeviceExchange, optional
            What it has noted prevents the step too.
        """
        xp = self.xp
        if ok is None and found_inf is None and exchange is None:
            return None, xp.concat([self.counts[:1] + 1, self.counts[1:]])
        bad = xp.zeros_like(raises) if ok is None else ~ok
        rejecting = bad & raises
        rejected, taken = xp.any(rejecting), ~xp.any(bad)
        # A row whose norms are not finite comes first: by clipping it makes the updates of others NaN.
        rank = 2 - xp.astype(xp.all(xp.isfinite(outputs.S[:, :2]), axis=1), xp.int64)
        worst = xp.reshape(xp.argmax(rank * xp.astype(rejecting, xp.int64)), (1,))
        row = xp.take(outputs.S, worst, axis=0)[0, :]
        p_finite, g_finite = (xp.astype(xp.isfinite(row[i]), xp.int64) for i in (0, 1))
        kind = GRADIENT + g_finite * ((PARAMETER - GRADIENT) + p_finite * (UPDATE - PARAMETER))
        offender = len(CAUSES) * xp.take(place, worst)[0] + kind
        if exchange is not None:
            is_known = rejected & (kind != UPDATE)
            offender = xp.where(exchange.raises & ~is_known, ELSEWHERE, offender)
            rejected = rejected | exchange.raises
        return self._counted(taken, rejected, offender, found_inf, exchange)

    def decide_elsewhere(self, exchange: DeviceExchange) -> None:
        """Count a step for which nothing has a gradient here: the rows of other processes decide."""
        offender = ELSEWHERE + 0 * self.counts[3]
        _, counts = self._counted(~exchange.raises, exchange.raises, offender, None, exchange)
        defer_signals()  # until the step is counted by the host as well
        self.counts[...] = counts
        self.queued(may_fail=True)

    def _counted(
        self, taken: Any, rejected: Any, offender: Any, found_inf: Any, exchange: DeviceExchange | None
    ) -> tuple[Any, Any]:
        """See `decide`; a refusal on another process and `found_inf` prevent a step too."""
        xp, counts = self.xp, self.counts
        found = found_inf if exchange is None else exchange.found
        if found is not None:
            rejected, taken = rejected & (found == 0), taken & (found == 0)
        if exchange is not None:
            offender = xp.where(exchange.refused, REFUSAL, offender)
            rejected = rejected | exchange.refused
            taken = taken & ~(exchange.refused | exchange.raises | exchange.skips)
        old = [counts[i] for i in range(ENTRIES)]
        steps = [xp.astype(x, xp.int64) for x in (taken, ~taken & ~rejected, rejected)]
        new = [old[0] + steps[0], old[1] + steps[1], old[2] + steps[2], xp.where(rejected, offender, old[3])]
        return taken, xp.stack([xp.astype(x, xp.int64) for x in new])

    def queued(self, *, may_fail: bool) -> None:
        """Count a step as queued, and queue a copy of the counts if it may not be taken."""
        self._queued += 1
        if may_fail:
            self._pinned.copy()

    @property
    def has_news(self) -> bool:
        """Whether a step that was skipped or rejected has been reported since the last `poll`."""
        now = self._pinned.read(wait=False)
        return now is not None and (now.skipped, now.rejected) != (self._read.skipped, self._read.rejected)

    def poll(self, *, wait: bool) -> tuple[StepCounts, StepCounts, int]:
        """Return the counts at the last call and now, and with `wait` the steps that graphs have replayed since.

        A step that was captured and not replayed counts as -1.
        """
        before, now = self._read, self._pinned.read(wait=wait) or self._read
        self._read = now
        if not wait:
            return before, now, 0
        done = now.taken + now.skipped + now.rejected
        replayed = done - self._confirmed - self._queued
        self._queued, self._confirmed = 0, done
        return before, now, replayed


class _Options(NamedTuple):
    """What decides on the launches of a step: of each group rule and `nonfinite`; and what holds for the model."""

    rules: list[Rule]
    policies: list[str]
    clips: bool
    may_fail: bool  # because of `nonfinite`

    @classmethod
    def of(cls, groups: Sequence[Mapping[str, Any]], used: set[int]) -> _Options:
        """Return the options of groups, of which those with these numbers have rows."""
        rules, policies = [resolve(group["rule"]) for group in groups], [group["nonfinite"] for group in groups]
        clips = any(group["max_grad_norm"] is not None for group in groups)
        return cls(rules, policies, clips, {policies[k] for k in used} != {"propagate"})


class DeviceRows:
    """The rows of a step as a device needs them.

    Parameters
    ----------
    names, group_of, param_of, number, keeps : lists
        Of each row its name, its group, its parameter, its number among all rows of the model, and whether it keeps a
        momentum buffer.
    joined : sequence of sequences of int
        The rows of each layer that has several.
    group_of_params : int array of shape (parameters,)
        The group of each parameter of the model.
    limit, square_limit : arrays of shape (rows,)
        See `lars_array.nonfinite.finite`.
    like : array
        An array on the device.
    """

    def __init__(
        self,
        names: Sequence[str],
        group_of: list[int],
        param_of: list[int],
        number: list[int],
        keeps: list[bool],
        joined: Sequence[Sequence[int]],
        group_of_params: Any,
        limit: Any,
        square_limit: Any,
        like: Any,
    ) -> None:
        self.names, self.group_of, self.param_of, self.number = names, group_of, param_of, number
        self.keeps, self.joined, self._used_groups = keeps, joined, set(group_of)
        self._limit, self._square_limit, self._like = limit, square_limit, like
        self.xp = array_namespace(like)
        self._index = [self._on_device(x) for x in (group_of, param_of, number, group_of_params.tolist())]
        kept = {i: keep for i, keep in zip(param_of, keeps, strict=True)}
        self._stepped = self._on_device([i in kept for i in range(len(group_of_params))])
        self._kept = self._on_device([kept.get(i, False) for i in range(len(group_of_params))])
        self._policies: tuple[Any, ...] = (None,)
        self._options: tuple[Any, Any] = None, None

    def step(
        self,
        kernel: Any,
        grads: Any,
        groups: Sequence[Mapping[str, Any]],
        state: DeviceState,
        found_inf: Any,
        exchange: DeviceExchange | None = None,
    ) -> StepResult:
        """Queue a step, by a kernel that can do it alone or by stages; where processes add sums, by stages."""
        if groups is not self._options[0]:
            self._options = groups, _Options.of(groups, self._used_groups)
        options = self._options[1]
        result = None if exchange is not None else self._enqueued(kernel, grads, options, state, found_inf)
        result = result or self._staged(kernel, grads, groups, options, state, found_inf, exchange)
        state.queued(may_fail=options.may_fail or found_inf is not None or exchange is not None)
        return result

    def _enqueued(
        self, kernel: Any, grads: Any, options: _Options, state: DeviceState, found_inf: Any
    ) -> StepResult | None:
        if not hasattr(kernel, "enqueue"):
            return None
        rules, policies, clips, _ = options
        found = kernel.enqueue(grads, self, rules, policies, state, found_inf, clips=clips)
        if found is None:
            return None
        S, gamma = found
        return self._result(S, gamma, rules, state)

    def _result(self, S: Any, gamma: Any, rules: list[Any], state: DeviceState) -> StepResult:
        """Return the result of a step; hyper-parameters and states are read where they are asked for."""
        (group, param, *_), limit, group_of, xp = self._index, self._limit, self.group_of, self.xp

        def inputs(gamma: Any, hyper: Any, first: Any, previous_lr: Any) -> tuple[Any, Hyper, list[Any]]:
            spread = _vectors(hyper, first, previous_lr, group, param, limit, xp=xp)
            return gamma, spread, [rules[k] for k in group_of]

        return StepResult(self.names, S, inputs, (gamma, state.hyper, state.first, state.previous_lr), state)

    def _staged(
        self,
        kernel: Any,
        grads: Any,
        groups: Any,
        options: _Options,
        state: DeviceState,
        found_inf: Any,
        exchange: DeviceExchange | None,
    ) -> StepResult:
        xp, (group, param, number, group_of_params) = self.xp, self._index
        inputs = with_rules(state.vectors(group, param, self._limit), groups, self.group_of, xp=xp)
        if exchange is not None and len(set(map(id, inputs.rules))) > 1 and getattr(kernel, "is_capturing", bool)():
            raise ValueError("rule must be the same for all layers in a step with all_reduce that a graph captures")
        sums, joined = kernel.sums, self.joined
        outputs = plan(inputs, lambda operand: sums(grads, operand), xp=xp, joined=joined, exchange=exchange)
        if exchange is not None:
            exchange.complete()
        strict, raises = self._of_policies(options.policies)
        ok = None
        if strict is not None:
            ok = ~strict | finite(outputs.S, outputs.C, self._limit, self._square_limit, xp=xp)
        taken, counts = state.decide(ok, raises, found_inf, outputs, number, exchange)
        lr = xp.take(state.hyper[:, GROUP_FIELDS.index("lr")], group_of_params)
        first, previous_lr = state.advanced(taken, self._stepped, self._kept, lr)
        write = kernel.writer(grads, outputs.C, taken)
        defer_signals()  # until the step is counted by the host as well
        write()
        state.counts[...], state.first[...], state.previous_lr[...] = counts, first, previous_lr
        return self._result(outputs.S, outputs.gamma, options.rules, state)

    def _of_policies(self, policies: list[str]) -> tuple[Any, Any]:
        """Return where a row that is not finite prevents the step, None for nowhere, and where that is an error."""
        if policies != self._policies[0]:
            own = [policies[k] for k in self.group_of]
            strict = None if set(own) == {"propagate"} else self._on_device([x != "propagate" for x in own])
            self._policies = policies, strict, self._on_device([x == "raise" for x in own])
        _, strict, raises = self._policies
        return strict, raises

    def _on_device(self, values: list[Any]) -> Any:
        return asarray(values, like=self._like, xp=self.xp)


def _vectors(hyper: Any, first: Any, previous_lr: Any, group_of: Any, owner: Any, limit: Any, *, xp: Any) -> Hyper:
    """See `DeviceState.vectors`."""
    spread = xp.take(hyper, group_of, axis=0)
    columns = {name: spread[:, k] for k, name in enumerate(GROUP_FIELDS)}
    columns |= {name: columns[name] != 0 for name in BOOLEANS}
    first, previous_lr = (xp.take(x, owner) for x in (first, previous_lr))
    return with_max_ratio(Hyper(**columns, first=first, previous_lr=previous_lr), limit, xp=xp)
