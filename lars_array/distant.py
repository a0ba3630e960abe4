"""A step of layers on a device: the host says what is to be done and waits for nothing.

Whether a step may be taken is decided where the sums are. What follows from that, the layers' last learning rates and
whether their buffers are used, is kept there too, since the host does not know.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
from array_api_compat import array_namespace

from lars_array.arrays import asarray
from lars_array.core import Plan, plan, prepare_from
from lars_array.dtypes import accumulation_dtype
from lars_array.hyper import needs_buffer
from lars_array.hyper_table import HyperTable
from lars_array.kernels.request import Request
from lars_array.layers import Layers, Taken
from lars_array.news import ENTRIES, GRADIENT, KINDS, PARAMETER, UPDATE, News, mailbox
from lars_array.nonfinite import NonFiniteError, finite
from lars_array.registry import resolve

__all__ = ["DistantLayers", "Verdict", "Whereabouts", "refused"]


class Whereabouts:
    """Where the layers of an optimizer stand, as only the device knows.

    Parameters
    ----------
    buffers : sequence of arrays
        Momentum buffers of all parameters; None where there is none yet.
    previous_lr : ndarray of shape (parameters,)
        The learning rate of the last step of each.
    like : array
        An array on the device.

    Attributes
    ----------
    first : bool array of shape (parameters,)
        True where the buffer was not used yet.
    previous_lr : array of shape (parameters,)
        The learning rate of a parameter's last step, 0 before the first.
    counts : int64 array of shape (ENTRIES,)
        See `lars_array.news`.
    """

    def __init__(self, buffers: Sequence[Any], previous_lr: Any, *, like: Any) -> None:
        self.xp = xp = array_namespace(like)
        self.first = asarray([v is None for v in buffers], xp.bool, like=like, xp=xp)
        self.previous_lr = asarray(previous_lr.tolist(), accumulation_dtype(xp), like=like, xp=xp)
        self.counts = asarray([0] * ENTRIES, xp.int64, like=like, xp=xp)
        self._mailbox = mailbox(self.counts)
        self._known = News()
        self._asked_for, self._confirmed = 0, 0

    def of(self, index: Any) -> tuple[Any, Any]:
        """Return `first` and `previous_lr` of the parameters at `index`, an integer array on the device."""
        return self.xp.take(self.first, index), self.xp.take(self.previous_lr, index)

    def merge(self, index: Sequence[int], first: Any, previous_lr: Any) -> None:
        """Take over what `of` has returned, after steps of the parameters at `index`."""
        row_of = {i: row for row, i in enumerate(index)}
        places = range(self.first.shape[0])
        row = asarray([row_of.get(i, 0) for i in places], like=self.first, xp=self.xp)
        concerned = asarray([i in row_of for i in places], self.xp.bool, like=self.first, xp=self.xp)
        self.first = self.xp.where(concerned, self.xp.take(first, row), self.first)
        self.previous_lr = self.xp.where(concerned, self.xp.take(previous_lr, row), self.previous_lr)

    def post(self, *, news: bool) -> None:
        """Note that a step was asked for, and send the counts to the host if there may be news in them."""
        self._asked_for += 1
        if news:
            self._mailbox.post()

    def replayed(self) -> int:
        """Return how many steps more than were asked for the device has come to, since this was asked last.

        These are replays of a graph; a step that was captured, and not replayed, is one less. It must have been waited
        for.
        """
        come_to = sum(self._known[:3])
        more = come_to - self._confirmed - self._asked_for
        self._asked_for, self._confirmed = 0, come_to
        return more

    def news(self, *, wait: bool = False) -> tuple[News, News]:
        """Return the counts as they were when this was last asked, and as they are known now."""
        before, now = self._known, self._mailbox.read(wait=wait) or self._known
        self._known = now
        return before, now


def refused(news: News, names: Sequence[str]) -> NonFiniteError:
    """Return the error for the last step that a device has refused."""
    name, what = names[news.layer], news.what
    if what == "update":
        reason = f"the update of {name!r} overflowed its type or the float64 of its norms"
    else:
        reason = f"the norm of the {what} of {name!r} was not finite"
    return NonFiniteError(f"{reason} in an earlier step, which changed nothing")


class Verdict(NamedTuple):
    """Who may prevent a step: what the device must know to decide whether it is taken.

    Parameters
    ----------
    strict, raises : bool arrays of shape (layers,), or None
        Whether a layer that is not finite prevents it, and whether that is an error. None: no layer does.
    found_inf : array of shape (), or None
        The step is skipped where it isn't zero.
    limit, most : arrays of shape (layers,)
        From `lars_array.nonfinite.largest` and `most_squares`; the second may be None.
    place : integer array of shape (layers,)
        The position of each layer among all parameters.
    """

    strict: Any
    raises: Any
    found_inf: Any
    limit: Any
    most: Any
    place: Any


class DistantLayers(Layers):
    """`Layers` on a device. Its parameters are those of `Layers`, and `whereabouts`."""

    def __init__(self, *arguments: Any, whereabouts: Whereabouts, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._whereabouts = whereabouts
        self._place = self._on_device(list(self.index))
        self._group = self._on_device(self.group_of.tolist())
        self.first, self.previous_lr = whereabouts.of(self._place)
        self._table = HyperTable(self.params[0], self.xp)
        self._policies: tuple[str, ...] = ()
        self._strict: Any = None
        self._raises: Any = None
        self._kept: Any = None
        self._keeps_of_layers: list[bool] = []
        self._group_of_layers = self.group_of.tolist()

    def step(
        self,
        groups: Sequence[Mapping[str, Any]],
        grads: Sequence[Any],
        found_inf: Any = None,
        out: Sequence[Any] | None = None,
    ) -> Taken | None:
        """Have the device take a step, if it finds that it may.

        Parameters
        ----------
        groups : sequence of mappings
            Complete and checked hyper-parameters of all groups; numbers, or arrays of shape () on the device.
        grads : sequence of arrays
            One a layer, checked.
        found_inf : number or array of shape (), optional
            Here or on the device. Where it isn't zero the step is skipped.
        out : sequence of arrays, optional
            What the new parameters are written to, or the old ones where the step is not taken; checked. The parameters
            are these from then on. None: in place.

        Returns
        -------
        Taken or None
            What it is taken with, if it is. None where it is known here that it is skipped.
        """
        if isinstance(found_inf, Real | np.generic) or type(found_inf) is np.ndarray:
            if bool(found_inf):
                return None
            found_inf = None
        self._make_room([(needs_buffer(group), bool(group["master_weights"])) for group in groups])
        capturing = getattr(self._kernel, "is_capturing", bool)()
        self._table.refresh(groups, captured=capturing)
        self._read_policies(tuple(group["nonfinite"] for group in groups))
        verdict = Verdict(self._strict, self._raises, found_inf, self._limit, self._most, self._place)
        # Masters are the host's: the step that makes or forgets them is waited for.
        asks = not (self._settled or capturing) and self._changes_masters()
        before = int(self._whereabouts.counts[0]) if asks else 0
        with np.errstate(all="ignore"):  # what is not finite is reported by name
            taken = self._enqueued(groups, grads, found_inf, out) or self._by_stages(groups, grads, verdict, out)
        self._whereabouts.post(news=self._strict is not None or found_inf is not None)
        self._take_over(out, taken=not asks or int(self._whereabouts.counts[0]) > before)
        return taken

    def _make_room(self, keeps: list[tuple[bool, bool]]) -> None:
        if keeps != self._keeps:
            self._keeps_of_layers = [keeps[k][0] for k in self.group_of]
            self._kept = self._on_device(self._keeps_of_layers)
        super()._make_room(keeps)

    def _enqueued(self, groups: Any, grads: Any, found_inf: Any, out: Any) -> Taken | None:
        """Have the kernel do all that it can do by itself."""
        if not hasattr(self._kernel, "enqueue"):
            return None
        rules = [resolve(group["rule"]) for group in groups]
        request = Request(
            rules,
            [group["nonfinite"] for group in groups],
            any(group["max_grad_norm"] is not None for group in groups),
            self._group_of_layers,
            self.index,
            self._keeps_of_layers,
            self.joined,
            self._table.array,
            self.first,
            self.previous_lr,
            self._whereabouts.counts,
            found_inf,
            out,
        )
        found = self._kernel.enqueue(grads, request)
        if found is None:
            return None
        S, C, gamma = found

        def planned() -> Plan:
            hyper = self._table.vectors(self._group, self.first, self.previous_lr)
            return Plan(S, gamma, C, hyper, [rules[k] for k in self.group_of])

        return Taken(self.names, planned, None)

    def _by_stages(self, groups: Any, grads: Any, verdict: Any = None, out: Any = None) -> Taken:
        hyper = self._table.vectors(self._group, self.first, self.previous_lr)
        prepared = prepare_from(hyper, groups, self.group_of, xp=self.xp)

        def measure(operand: Any) -> Any:
            return self._kernel.sums(grads, operand)

        planned = plan(prepared, measure, xp=self.xp, joined=self.joined)
        written = self._decide(planned, verdict)
        self._kernel.apply(grads, planned.C, written, out)
        first, previous_lr = self.first & ~self._kept, hyper.lr
        if written is not None:
            first = self.xp.where(written, first, self.first)
            previous_lr = self.xp.where(written, previous_lr, self.previous_lr)
        self.first[...], self.previous_lr[...] = first, previous_lr  # in place, so that a graph can be replayed
        return Taken(self.names, planned, None)

    def _decide(self, planned: Plan, verdict: Verdict) -> Any:
        """Return whether the step is taken, a bool array of shape () or None for yes, and count it."""
        xp, counts = self.xp, self._whereabouts.counts
        strict, raises, found_inf, limit, most, place = verdict
        if strict is None and found_inf is None:
            counts[0:1] = counts[0:1] + 1
            return None
        bad = refusing = self._no_layer()
        if strict is not None:
            bad = strict & ~finite(planned.S, planned.C, limit, most, xp=xp)
            refusing = bad & raises
        refused, taken = xp.any(refusing), ~xp.any(bad)
        if found_inf is not None:
            found = found_inf != 0
            refused, taken = refused & ~found, taken & ~found
        worst = xp.argmax(xp.astype(refusing, xp.int64))
        row = xp.take(planned.S, xp.reshape(worst, (1,)), axis=0)[0, :]
        p_finite, g_finite = (xp.astype(xp.isfinite(row[i]), xp.int64) for i in (0, 1))
        what = GRADIENT + g_finite * ((PARAMETER - GRADIENT) + p_finite * (UPDATE - PARAMETER))
        offender = KINDS * xp.take(place, xp.reshape(worst, (1,)))[0] + what
        old = [counts[i] for i in range(ENTRIES)]
        steps = [xp.astype(x, xp.int64) for x in (taken, ~taken & ~refused, refused)]
        new = [old[0] + steps[0], old[1] + steps[1], old[2] + steps[2], xp.where(refused, offender, old[3])]
        counts[...] = xp.stack([xp.astype(x, xp.int64) for x in new])
        return taken

    def _no_layer(self) -> Any:
        return self.xp.zeros_like(self.first)

    def _read_policies(self, of_group: tuple[str, ...]) -> None:
        if of_group == self._policies:
            return
        policies = [of_group[k] for k in self.group_of]
        self._policies, self._strict, self._raises = of_group, None, None
        if set(policies) != {"propagate"}:
            self._strict = self._on_device([policy != "propagate" for policy in policies])
            self._raises = self._on_device([policy == "raise" for policy in policies])

    def _on_device(self, values: list[Any]) -> Any:
        return asarray(values, like=self.params[0], xp=self.xp)
