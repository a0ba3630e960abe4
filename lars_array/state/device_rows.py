"""The rows of a step on a device: a kernel takes the whole step, or each of its stages is queued."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from array_api_compat import array_namespace

from lars_array._arrays import asarray
from lars_array._interrupts import defer_signals
from lars_array.core import BOOLEANS, Hyper, Rule, plan, resolve, with_max_ratio
from lars_array.hyperparams import GROUP_FIELDS, with_rules
from lars_array.nonfinite import finite
from lars_array.state.device import DeviceState
from lars_array.telemetry import StepResult

if TYPE_CHECKING:
    from lars_array.state.device_exchange import DeviceExchange

__all__ = ["DeviceRows", "vectors"]


class _Options(NamedTuple):
    """The hyper-parameters of groups that decide which launches a step has."""

    rules: list[Rule]
    policies: list[str]  # `nonfinite`
    clips: bool  # whether any group clips gradients
    may_fail: bool  # whether a group with rows has a policy other than "propagate"

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
            spread = vectors(hyper, first, previous_lr, group, param, limit, xp=xp)
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
        hyper = vectors(state.hyper, state.first, state.previous_lr, group, param, self._limit, xp=xp)
        inputs = with_rules(hyper, groups, self.group_of, xp=xp)
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


def vectors(hyper: Any, first: Any, previous_lr: Any, group_of: Any, owner: Any, limit: Any, *, xp: Any) -> Hyper:
    """Return the hyper-parameters and states of rows, given index arrays of the group and the parameter of each.

    The first three are those of `DeviceState`, `limit` is that of `nonfinite.finite`.
    """
    spread = xp.take(hyper, group_of, axis=0)
    columns = {name: spread[:, k] for k, name in enumerate(GROUP_FIELDS)}
    columns |= {name: columns[name] != 0 for name in BOOLEANS}
    first, previous_lr = (xp.take(x, owner) for x in (first, previous_lr))
    return with_max_ratio(Hyper(**columns, first=first, previous_lr=previous_lr), limit, xp=xp)
