"""Parameter groups that exclude parameters from weight decay and from adaptation."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from lars_array._messages import listed, near, shown, warn
from lars_array.state.inputs import Position, read_parameters

__all__ = ["is_bias_or_norm", "param_groups"]

Predicate = Callable[[str, Any], bool]
Criteria = Predicate | Iterable[str | re.Pattern[str] | Predicate] | None


def is_bias_or_norm(name: str, array: Any) -> bool:
    """Return whether `array` has at most one axis, as biases and the parameters of normalisation layers do.

    Parameters
    ----------
    name : str
        A name that ends with "bias", after a dot if there is one, is a bias whatever its axes are.
    array : array
        The parameter.

    Returns
    -------
    bool
        The usual criterion for excluding a parameter from weight decay and adaptation.
    """
    return array.ndim <= 1 or name.rpartition(".")[2] == "bias"


def param_groups(
    params: Any, weight_decay: float, *, no_decay: Criteria = is_bias_or_norm, no_adapt: Criteria = is_bias_or_norm
) -> list[dict[str, Any]]:
    """Split parameters into groups, excluding some from weight decay and some from adaptation.

    Parameters
    ----------
    params : iterable of arrays, mapping of name to array, or iterable of (name, array)
        The parameters. Those without a name are named by their position.
    weight_decay : float
        Weight decay of the parameters that are not excluded.
    no_decay : callable, iterable, or None
        Parameters without weight decay: a predicate ``no_decay(name, array)``; or several of these and of regular
        expressions that are searched in the name; or None for no exclusion. By default parameters with at most one
        axis, and biases.
    no_adapt : callable, iterable, or None
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

    Warns
    -----
    UserWarning
        For a regular expression that no name matches.

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
    given = layout.groups[0]
    names = given.names if given.form in ("mapping", "pairs") else list(map(Position, given.names))
    undecayed, unadapted = (
        _excluded(option, criteria, names, given.arrays)
        for option, criteria in (("no_decay", no_decay), ("no_adapt", no_adapt))
    )
    groups: dict[tuple[bool, bool], dict[str, Any]] = {}
    for name, array, *key in zip(names, given.arrays, undecayed, unadapted, strict=True):
        groups.setdefault((not key[0], not key[1]), {})[name] = array
    result = []
    for (decays, adapts), named in groups.items():
        group = {"params": named, "weight_decay": weight_decay if decays else 0.0}
        if not adapts:
            group["adapt"] = False
        elif not decays:  # some rules, including flash's, adapt such layers only with this option
            group["always_adapt"] = True
        result.append(group)
    return result


def _excluded(option: str, given: Criteria, names: Sequence[str], arrays: Sequence[Any]) -> list[bool]:
    """Return for each parameter whether one of the criteria fits it."""
    if given is None:
        return [False] * len(names)
    if isinstance(given, str | bytes) or not (callable(given) or isinstance(given, Iterable)):
        raise TypeError(_must(option, given))
    excluded = [False] * len(names)
    for criterion in [_checked(option, x) for x in ([given] if callable(given) else given)]:
        if isinstance(criterion, re.Pattern):
            found = [criterion.search(name) is not None for name in names]
            if not any(found):
                _warn_of_no_match(option, criterion.pattern, names)
        else:
            found = [bool(criterion(name, array)) for name, array in zip(names, arrays, strict=True)]
        excluded = [a or b for a, b in zip(excluded, found, strict=True)]
    return excluded


def _checked(option: str, criterion: Any) -> Any:
    """Return a predicate, or a compiled regular expression."""
    if not isinstance(criterion, str | re.Pattern):
        if callable(criterion) and not isinstance(criterion, type):
            return criterion
        raise TypeError(_must(option, criterion))
    try:
        return re.compile(criterion)
    except re.error as error:
        hint = "; any text is '.*' in them" if str(criterion).startswith("*") else ""
        message = f"{option} must hold regular expressions; {shown(error.pattern)}: {error}{hint}"
        raise ValueError(message) from None


def _must(option: str, given: Any) -> str:
    return f"{option} must be a predicate, a list of regular expressions or None; got {shown(given)}"


def _warn_of_no_match(option: str, pattern: str, names: Sequence[str]) -> None:
    parts = {part for name in names for part in (name, *name.split("."))}
    question = near(pattern.strip("^$.*"), sorted(parts)) or f"; names are {listed(names)}"
    warn(f"no parameter matches {shown(pattern)} of {option}{question}")
