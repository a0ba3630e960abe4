"""Parameter groups that exclude layers from weight decay or from adaptation."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from lars_array.state.inputs import read_parameters

__all__ = ["is_bias_or_norm", "param_groups"]

Predicate = Callable[[str, Any], bool]


def is_bias_or_norm(name: str, array: Any) -> bool:
    """Return whether `array` has at most one axis: biases, and scales and shifts of normalisation layers.

    Parameters
    ----------
    name : str
        Ignored.
    array : array
        The parameter.

    Returns
    -------
    bool
        The usual exclusion from weight decay and from adaptation.
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
        Weight decay of parameters that are not excluded.
    no_decay : callable, iterable of str, or None
        Which parameters are not decayed: those for which ``no_decay(name, array)`` is true, or in whose name one of the
        regular expressions is found, or none. By default those with at most one axis.
    no_adapt : callable, iterable of str, or None
        Likewise, which are not adapted: they take steps of SGD.

    Returns
    -------
    list of dict
        At most four groups for `LARS`, none of them empty, each a dict of "params" (by name) and "weight_decay"; with
        "adapt" False where it is not adapted. Their parameters are the arrays given, not copies.

    Raises
    ------
    TypeError, ValueError
        For an argument of another form, or an expression that does not compile.

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
    for name, array in zip(layout.groups[0].names, layout.groups[0].arrays, strict=True):
        key = not excluded_from_decay(name, array), not excluded_from_adaptation(name, array)
        groups.setdefault(key, {})[name] = array
    result = []
    for (decays, adapts), named in groups.items():
        group = {"params": named, "weight_decay": weight_decay if decays else 0.0}
        if not adapts:
            group["adapt"] = False
        elif not decays:  # some rules, such as flash's, adapt a layer without decay only with this
            group["always_adapt"] = True
        result.append(group)
    return result


def _predicate(option: str, given: Predicate | Iterable[str] | None) -> Predicate:
    if given is None:
        return lambda name, array: False
    if callable(given):
        return given
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise TypeError(f"{option} must be a predicate, a list of regular expressions or None; got {given!r}")
    patterns = list(given)
    if not all(isinstance(pattern, str | re.Pattern) for pattern in patterns):
        raise TypeError(f"{option} must be a predicate, a list of regular expressions or None; got {given!r}")
    try:
        compiled = [re.compile(pattern) for pattern in patterns]
    except re.error as error:
        raise ValueError(f"{option} must hold regular expressions; {error.pattern!r}: {error}") from None
    return lambda name, array: any(pattern.search(name) for pattern in compiled)
