"""State on a device: the host queues steps without waiting, and the device decides which are taken."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from array_api_compat import array_namespace

from lars_array._arrays import accumulation_dtype, asarray
from lars_array._interrupts import defer_signals
from lars_array.core import StageOutputs
from lars_array.hyperparams import NUMBER_TYPES, PLAIN, row_values
from lars_array.nonfinite import CAUSES, ELSEWHERE, GRADIENT, PARAMETER, REFUSAL, UPDATE
from lars_array.state.counts import ENTRIES, PinnedCounts, StepCounts

if TYPE_CHECKING:
    from lars_array.state.device_exchange import DeviceExchange

__all__ = ["DeviceState"]


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
        self._written: list[list[Any]] = []  # the numbers in `hyper`; None where they are not known here
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
            self._written = [list(map(_number, row)) for row in rows]
            numbers = [[0.0 if x is None else float(x) for x in row] for row in self._written]
            self.hyper = asarray(numbers, accumulation_dtype(self.xp), like=self.like, xp=self.xp)
        for row, (values, written) in enumerate(zip(rows, self._written, strict=True)):
            for column, (value, before) in enumerate(zip(values, written)):
                if not self._in_graphs and value is before:  # faster
                    continue
                number = _number(value)
                if number is not None and number == before and (row, column) not in self._in_graphs:
                    continue
                if captured:
                    self._in_graphs.add((row, column))
                written[column] = None  # until it is there
                # A slice, not an element: torch fills the one and copies the other from the host.
                self.hyper[row : row + 1, column : column + 1] = value if number is None else float(number)
                written[column] = number
        if all(x is not None for written in self._written for x in written):
            self._groups = groups

    @property
    def expected_steps(self) -> int:
        """The number of steps taken, as far as the host knows: one counts until the device has reported otherwise."""
        return self._confirmed + self._queued - self._read.skipped - self._read.rejected

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


def _number(value: Any) -> Any:
    """Return a number as an object that nobody can modify, and None for an array on the device."""
    if type(value) in PLAIN:
        return value
    return float(value) if isinstance(value, NUMBER_TYPES) else None
