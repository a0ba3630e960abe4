"""The layers that take part in a step, and the step itself: the stages, each of them checked before the next."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from array_api_compat import array_namespace

from lars_array.arrays import check_buffer, check_master
from lars_array.buffers import Rows, new_buffers
from lars_array.core import Plan, Prepared, plan, prepare
from lars_array.dtypes import is_half, real_dtype
from lars_array.gradients import Fit
from lars_array.hyper import needs_buffer
from lars_array.memory import Spans
from lars_array.nonfinite import all_finite, finite, largest, most_squares, refuse_nonfinite
from lars_array.rows import joined_rows

__all__ = ["Layers", "Taken"]


class Taken(NamedTuple):
    """A step that was taken: the names of its layers, its plan, and the kind of each layer if that has a row a kind.

    The plan may be a function that returns it, for who asks.
    """

    names: Sequence[str]
    plan: Plan | Callable[[], Plan]
    kind_of: Any

    def planned(self) -> Plan:
        """Return the plan."""
        return self.plan() if callable(self.plan) else self.plan


class Layers:
    """Layers, as long as the same ones take part in a step: what is known of their memory is found out once.

    Layers of the same group, with the same last learning rate and both with or without a buffer, are of one *kind*:
    they differ in nothing but their sums, so hyper-parameters are needed once a kind. There is usually one for each
    group; a layer that had no gradient for a while makes another until it has stepped along.

    Parameters
    ----------
    index : sequence of int
        Their positions among all parameters.
    names : sequence of str
        Their names.
    params : sequence of arrays
        Parameters.
    labels : sequence
        Those of one label are one layer, of which each has the sums; None is a layer by itself. Empty: all are.
    buffers, masters : Rows
        Momentum buffers and master copies; None where there is none yet.
    group_of : int32 array of shape (layers,)
        The group of each.
    previous_lr : array of shape (layers,)
        The learning rate of its last step.
    kernel : type
        One of `lars_array.kernels`.
    """

    def __init__(
        self,
        index: Sequence[int],
        names: Sequence[str],
        params: Sequence[Any],
        labels: Sequence[Hashable],
        buffers: Rows,
        masters: Rows,
        group_of: Any,
        previous_lr: Any,
        *,
        kernel: Any,
    ) -> None:
        self.index, self.names, self.params, self.group_of = index, names, params, group_of
        self.buffers, self.masters = buffers, masters
        self.place = slice(None) if isinstance(index, range) else np.array(index)
        self.joined = joined_rows(labels)
        self.has_new_state = False  # since the last step: buffers or masters
        self.xp = array_namespace(params[0])
        for name, p, v, master in zip(names, params, buffers, masters):
            if v is not None:
                check_buffer(name, v, p)  # p may have been resized by its owner
            if master is not None:
                check_master(name, master, p)
        self.fit = Fit(names, params, kernel)
        self._half = [i for i, p in enumerate(params) if is_half(p)]
        self._least_limit = min(float(self.xp.finfo(kind).max) for kind in {real_dtype(p, self.xp) for p in params})
        self._most: Any = None
        self._most_for: Any = self.fit.dtypes
        self._kernel_type = kernel
        self._kernel: Any = None
        self._keeps: list[tuple[bool, bool]] | None = None  # by group: what the kernel was made for
        self._settled = False  # whether all that the kernel was made with counts
        self._used = self._used_masters = Rows(0)
        self._new: Any = []
        self._new_masters: list[int] = []
        kinds: dict[tuple[int, bool, float], int] = {}
        of_layers = zip(group_of.tolist(), (~buffers.present()).tolist(), previous_lr.tolist(), strict=True)
        self._kind_of = np.fromiter((kinds.setdefault(kind, len(kinds)) for kind in of_layers), np.int32, len(params))
        self._kinds = list(kinds)
        self._remembered: tuple[Any, Any, Any] = (None, None, None)

    def check(self, grads: Sequence[Any], written: Spans) -> Any:
        """Refuse gradients that don't fit, and return what `lars_array.gradients.Fit.check` does."""
        starts = self.fit.check(grads, written)
        if self._most_for is not self.fit.dtypes:
            self._most_for = self.fit.dtypes
            self._most = most_squares(self.params, self._most_for(), like=self.params[0], xp=self.xp)
        return starts

    def step(
        self,
        groups: Sequence[Mapping[str, Any]],
        grads: Sequence[Any],
        found_inf: Any = None,
        out: Sequence[Any] | None = None,
    ) -> Taken | None:
        """Take a step, if it may be taken.

        Parameters
        ----------
        groups : sequence of mappings
            Complete and checked hyper-parameters of all groups.
        grads : sequence of arrays
            One a layer, checked.
        found_inf : number or array of shape (), optional
            The step is skipped where it isn't zero.
        out : sequence of arrays, optional
            What the new parameters are written to, and the parameters are from then on; checked. None: in place.

        Returns
        -------
        Taken or None
            None where it is skipped; then nothing was changed.

        Raises
        ------
        NonFiniteError
            Then nothing was changed.
        """
        if found_inf is not None and bool(found_inf):
            return None
        self._make_room([(needs_buffer(group), bool(group["master_weights"])) for group in groups])
        policies = [groups[group]["nonfinite"] for group, _, _ in self._kinds]
        with np.errstate(all="ignore"):  # what is not finite is reported by name
            may_write = set(policies) == {"propagate"}
            taken = self._without_asking(groups, grads, out, write=may_write)
            written = taken is not None and may_write
            taken = taken or self._by_stages(groups, grads)
            if not may_write and self._refused(taken.planned(), policies, grads):
                return None
            if not written:
                self._kernel.apply(grads, taken.planned().C, out=out)
        self._take_over(out)
        self._go_on(groups)
        return taken._replace(plan=taken.planned()._replace(C=None))  # whoever asks later does not need them

    @cached_property
    def _limit(self) -> Any:
        return largest(self.params, like=self.params[0], xp=self.xp)

    def _make_room(self, keeps: list[tuple[bool, bool]]) -> None:
        """Have the kernel see buffers and masters where they are kept. New ones count once a step is taken.

        A new buffer is zero, a new master a copy: until it counts, of the parameter as it is now, which may have been
        changed since a step that was refused.
        """
        if keeps != self._keeps:
            everything, wanted = range(len(self.params)), np.array(keeps)[self.group_of].T
            used = self.buffers.at(everything, where=wanted[0])
            new = np.flatnonzero(wanted[0] & ~used.present())
            used.put(new, new_buffers([self.params[i] for i in new.tolist()], self.xp))
            of_half = [i for i in self._half if wanted[1, i]]
            masters = self.masters.at(everything, where=wanted[1])
            new_masters = [i for i in of_half if masters[i] is None]
            masters.put(new_masters, new_buffers([self.params[i] for i in new_masters], self.xp))
            self._kernel = self._kernel_type(self.params, used, self.xp, masters if of_half else None)
            self._used, self._new, self._keeps, self._settled = used, new, keeps, False
            self._used_masters, self._new_masters = masters, new_masters
        for i in self._new_masters:
            master = self._used_masters[i]
            master[...] = self.xp.astype(self.params[i], master.dtype)

    def _take_over(self, out: Sequence[Any] | None, *, taken: bool = True) -> None:
        """Let arrays count that are new, and forget the masters that were not asked for."""
        if out is not None:
            self.params = out
            self.fit.move(out)
            self._kernel.move(out)
        if self._settled or not taken:
            self.has_new_state = False
            return
        self._settled = True
        self.has_new_state = bool(len(self._new)) or self._changes_masters()
        if not self.has_new_state:
            return
        if (self._used.present() | ~self.buffers.present()).all():
            self.buffers = self._used
        else:  # those of layers without momentum are kept for when they have it again
            self.buffers = self.buffers.at(range(len(self.params)))
            self.buffers.put(self._new, self._used.at(self._new))
        self.masters = self._used_masters
        self._new, self._new_masters = [], []

    def _changes_masters(self) -> bool:
        return bool(self._new_masters or (self.masters.present() & ~self._used_masters.present()).any())

    def _without_asking(self, groups: Any, grads: Any, out: Any, *, write: bool) -> Taken | None:
        """Let the kernel do all that it can do by itself."""
        if self.joined or not hasattr(self._kernel, "take"):
            return None
        known_groups, known_kinds, prepared = self._remembered
        # The same groups, by `lars_array.settings.Settings`: nothing in them has changed.
        if groups is not known_groups or self._kinds != known_kinds:
            prepared = self._prepared(groups, self._kinds)
            self._remembered = groups, self._kinds, prepared
        found = self._kernel.take(grads, prepared, self._kind_of, write=write, out=out)
        if found is None:
            return None
        S, C, gamma = found
        return Taken(self.names, Plan(S, gamma, C, prepared.hyper, prepared.rules), self._kind_of)

    def _by_stages(self, groups: Any, grads: Any) -> Taken:
        prepared = self._prepared(groups, [self._kinds[kind] for kind in self._kind_of.tolist()])

        def measure(operand: Any) -> Any:
            return self._kernel.sums(grads, operand)

        return Taken(self.names, plan(prepared, measure, xp=self.xp, joined=self.joined), None)

    def _prepared(self, groups: Any, rows: Sequence[tuple[int, bool, float]]) -> Prepared:
        group_of, first, previous_lr = (list(column) for column in zip(*rows, strict=True))
        return prepare(groups, group_of, first=first, previous_lr=previous_lr, like=self.params[0], xp=self.xp)

    def _refused(self, planned: Plan, policies: Sequence[str], grads: Sequence[Any]) -> bool:
        """Return whether the step is to be skipped."""
        if self._most is None and all_finite(planned.S, planned.C, self._least_limit, xp=self.xp):
            return False
        ok = finite(planned.S, planned.C, self._limit, self._most, xp=self.xp)
        if bool(self.xp.all(ok)):
            return False
        offenders = [i for i, k in enumerate(self._kind_of) if policies[k] != "propagate" and not bool(ok[i])]
        if self.joined:  # what is not finite of another part of a layer shows in its sums
            offenders.sort(key=lambda i: all(bool(self.xp.all(self.xp.isfinite(x[i]))) for x in (grads, self.params)))
        for i in offenders:
            if policies[self._kind_of[i]] == "raise":
                master = self._used_masters[i]
                refuse_nonfinite(self.names[i], self.params[i] if master is None else master, grads[i], xp=self.xp)
        return bool(offenders)

    def _go_on(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Note that there may be fewer kinds of layers."""
        gone = [(k, first and not needs_buffer(groups[k]), float(groups[k]["lr"])) for k, first, _ in self._kinds]
        self._kinds = list(dict.fromkeys(gone))
        if len(self._kinds) < len(gone):
            self._kind_of = np.array([self._kinds.index(kind) for kind in gone], np.int32)[self._kind_of]
