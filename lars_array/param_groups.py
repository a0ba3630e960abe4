"""Parameter groups that exclude parameters from weight decay and from adaptation."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from lars_array._messages import shown
from lars_array.state.inputs import Position, read_parameters

__all__ = ["is_bias_or_norm", "param_groups"]

Predicate = Callable[[str, Any], bool]


def is_bias_or_norm(name: str, array: Any) -> bool:
    """Return whether `array` has at most one axis, as biases and the parameters of normalisation layers do.

    Parameters
    ----------
    name : str
        Ignored.
    array : array
        The parameter.

    Returns
    -------
    bool
        The usual criterion for excluding a parameter from weight decay and adaptation.
    """
    return bool(array.ndim <= 1)


def param_groups(
    params: Any,
    weight_decay: float,
    *,
    no_decay: Predicate | Iterable[str] | None = is_bias_or_norm,
    no_adapt: Predicate | Iterable[str] | None = is_bias_or_norm,
) -> list[dict[str, Any]]:
    """Split parameters into groups, excluding some from weight decay and some from adaptation.

    Parameters
    ----------
    params : iterable of arrays, mapping of name to array, or iterable of (name, array)
        The parameters. Those without a name are named by their position.
    weight_decay : float
        Weight decay of the parameters that are not excluded.
    no_decay : callable, iterable of str, or None
        Parameters without weight decay: a predicate ``no_decay(name, array)``, or regular expressions that are searched
        in the name, or None for no exclusion. By default parameters with at most one axis.
    no_adapt : callable, iterable of str, or None
        In the same form, the parameters that are not adapted and take SGD steps.

    Returns
    -------
    list of dict
        At most four non-empty groups for `LARS`, each a dict of "params" (by name) and "weight_decay", with "adapt"
        False for parameters that are not adapted. They contain the given arrays, not copies.

    Raises
    ------
    TypeError, ValueError
        For arguments of another form, or a regular expression that does not compile.

    Examples
    --------
    >>> import numpy as np
    >>> params = {"fc.weight": np.ones((2, 3)), "fc.bias": np.zeros(2), "head.weight": np.ones((1, 2))}
    >>> for group in param_groups(params, 1e-4, no_adapt=["bias", "head"]):
    ...     print({**group, "params": list(group["params"])})
    {'params': ['fc.weight'], 'weight_decay': 0.0001}
    {'params': ['fc.bias'], 'weight_decay': 0.0, 'adapt': False}
    {'params': ['head.weight'], 'weight_decay': 0.0001, 'adapt': False}
    """
    layout = read_parameters(params)
    if layout.grouped:
        raise TypeError("params must not be groups already; give the parameters themselves")
    excluded_from_decay, excluded_from_adaptation = _predicate("no_decay", no_decay), _predicate("no_adapt", no_adapt)
    groups: dict[tuple[bool, bool], dict[str, Any]] = {}
    given = layout.groups[0]
    has_names = given.form in ("mapping", "pairs")
    for name, array in zip(given.names if has_names else map(Position, given.names), given.arrays, strict=True):
        key = not excluded_from_decay(name, array), not excluded_from_adaptation(name, array)
        groups.setdefault(key, {})[name] = array
    result = []
    for (decays, adapts), named in groups.items():
        group = {"params": named, "weight_decay": weight_decay if decays else 0.0}
        if not adapts:
            group["adapt"] = False
        elif not decays:  # some rules, including flash's, adapt such layers only with this option
            group["always_adapt"] = True
        result.append(group)
    return result


def _predicate(option: str, given: Predicate | Iterable[str] | None) -> Predicate:
    if given is None:
        return lambda name, array: False
    if callable(given):
        return given
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise TypeError(f"{option} must be a predicate, a list of regular expressions or None; got {shown(given)}")
    patterns = list(given)
    if not all(isinstance(pattern, str | re.Pattern) for pattern in patterns):
        raise TypeError(f"{option} must be a predicate, a list of regular expressions or None; got {shown(given)}")
    try:
        compiled = [re.compile(pattern) for pattern in patterns]
    except re.error as error:
        raise ValueError(f"{option} must hold regular expressions; {shown(error.pattern)}: {error}") from None
    return lambda name, array: any(pattern.search(name) for pattern in compiled)
