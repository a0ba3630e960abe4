"""The hyper-parameters of each row of a step, as arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf
from numbers import Real
from typing import Any

from lars_array._arrays import accumulation_dtype, asarray
from lars_array.core import BOOLEANS, Hyper, RuleInputs, resolve, rule_inputs, with_max_ratio
from lars_array.hyperparams.checks import MOST
from lars_array.hyperparams.names import GROUP_FIELDS

__all__ = ["inputs_of", "row_values", "with_rules"]


def row_values(group: Mapping[str, Any]) -> list[Any]:
    """Return the values of a complete group in the order of `GROUP_FIELDS`."""
    lowest, highest = group["trust_bounds"] or resolve(group["rule"]).trust_bounds or (0.0, inf)
    most = inf if group["max_grad_norm"] is None else group["max_grad_norm"]
    known = {**group, "trust_lower": lowest, "trust_upper": highest, "max_grad_norm": most}
    return [known[name] for name in GROUP_FIELDS]


def inputs_of(
    groups: Sequence[Mapping[str, Any]],
    group_of: Sequence[int],
    first: Any,
    previous_lr: Any,
    limit: Any = MOST,
    *,
    like: Any,
    xp: Any,
) -> RuleInputs:
    """Return the inputs of a step, with the hyper-parameters of the groups spread over rows.

    Parameters
    ----------
    groups : sequence of mappings
        Complete and checked hyper-parameters, one mapping per group.
    group_of : sequence of int
        The group of each row.
    first : booleans, shape (rows,)
        True where the layer has no momentum buffer yet.
    previous_lr : numbers, shape (rows,)
        Learning rate of each layer's last step.
    limit : array of shape (rows,)
        The largest number of each layer's compute dtype, see `nonfinite.max_finite`.
    like : array
        An array on the device of the result.
    xp : Array API namespace
        Its namespace.

    Returns
    -------
    RuleInputs
        Arrays of shape (rows,); numbers have the type in which sums are accumulated.
    """
    columns = dict(zip(GROUP_FIELDS, zip(*map(row_values, groups), strict=True), strict=True))
    dtype = accumulation_dtype(xp)
    index = asarray(group_of, like=like, xp=xp)
    fields = {"first": asarray(first, xp.bool, like=like, xp=xp)}
    if isinstance(previous_lr, list):
        fields["previous_lr"] = _table([previous_lr], dtype, like, xp)[0, :]
    else:
        fields["previous_lr"] = asarray(previous_lr, dtype, like=like, xp=xp)
    numbers = [name for name in GROUP_FIELDS if name not in BOOLEANS]
    for names, kind in ((numbers, dtype), (BOOLEANS, xp.bool)):
        # One table for all fields: creating an array costs the same for one number as for a hundred.
        table = _table([list(columns[name]) for name in names], kind, like, xp)
        spread = xp.take(table, index, axis=1)
        fields |= {name: spread[row, :] for row, name in enumerate(names)}
    return with_rules(with_max_ratio(Hyper(**fields), limit, xp=xp), groups, group_of, xp=xp)


def with_rules(hyper: Hyper, groups: Sequence[Mapping[str, Any]], group_of: Sequence[int], *, xp: Any) -> RuleInputs:
    """Return the inputs of a step from hyper-parameters that are already spread over rows."""
    rules = [resolve(group["rule"]) for group in groups]
    clips = any(group["max_grad_norm"] is not None for group in groups)
    return rule_inputs(hyper, [rules[k] for k in group_of], clips=clips, xp=xp)


def _table(rows: list[list[Any]], dtype: Any, like: Any, xp: Any) -> Any:
    if all(isinstance(value, Real) for row in rows for value in row):
        return asarray(rows, dtype, like=like, xp=xp)
    return xp.stack([xp.stack([asarray(value, dtype, like=like, xp=xp) for value in row]) for row in rows])
