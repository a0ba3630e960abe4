"""What a rule is, and where it is found by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from lars_array.arrays import asarray

__all__ = ["RULES", "Rule", "evaluate", "register", "resolve"]

RuleFunction = Callable[[Any, Any, Any], Any]
NORM_OF = ("gradient", "decayed gradient", "update")


class Rule(NamedTuple):
    """A variant of LARS: a function from sums to coefficients, and what the stages around it must know.

    Parameters
    ----------
    function : callable
        ``function(S, hyper, xp) -> C`` on Array API arrays, pure: kernels may call it once, with symbols, and play
        back what it did at every step. S of shape (layers, 3) holds the sums of p², of g²
        and the one that `norm_of` names, hyper is a `Hyper`, C of shape (layers, 6) is stacked from the columns
        m, alpha, beta, kappa, lambda, mu. Branches on values are ``xp.where``.
    norm_of : str
        What the third sum is of: "gradient", g, for rules that do not use it; "decayed gradient", g + w p; or
        "update", g + w p + h v with the h that makes it the direction in which SGD with momentum would step.
    keeps_buffer : bool
        Whether the momentum buffer is kept although momentum is 0, as some originals do.
    damped_nesterov : bool
        Whether nesterov together with dampening is allowed.
    trust_bounds : pair of float, optional
        The bounds where the user gives none.
    """

    function: RuleFunction
    norm_of: str = "gradient"
    keeps_buffer: bool = False
    damped_nesterov: bool = False
    trust_bounds: tuple[float, float] | None = None


RULES: dict[str, Rule] = {}


def register(*names: str, **properties: Any) -> Callable[[RuleFunction], RuleFunction]:
    """Return a decorator that makes a function known as a rule under each of `names`.

    Parameters
    ----------
    *names : str
        The names, new ones.
    **properties
        The fields of `Rule` beside `function`.

    Returns
    -------
    callable
        The decorator; it returns the function as it is.

    Raises
    ------
    ValueError
        If a name is taken.
    """

    def decorate(function: RuleFunction) -> RuleFunction:
        rule = resolve(Rule(function, **properties))
        for name in names:
            if name in RULES:
                raise ValueError(f"rule names must be new; {name!r} is taken")
        RULES.update(dict.fromkeys(names, rule))
        return function

    return decorate


def resolve(rule: Any) -> Rule:
    """Return the `Rule` meant by a name, by a function of one's own, or by a `Rule`.

    A bare function is given the sum over the decayed gradient as its third.

    Parameters
    ----------
    rule : str, callable or Rule
        What the user gave.

    Returns
    -------
    Rule
        The rule.

    Raises
    ------
    ValueError
        For an unknown name, or a `Rule` with an unknown `norm_of`.
    TypeError
        For anything else.
    """
    if isinstance(rule, Rule):
        if rule.norm_of not in NORM_OF:
            raise ValueError(f"norm_of must be one of {', '.join(map(repr, NORM_OF))}; got {rule.norm_of!r}")
        return rule
    if isinstance(rule, str):
        if rule not in RULES:
            raise ValueError(f"rule must be one of {', '.join(sorted(RULES))}, or a function; got {rule!r}")
        return RULES[rule]
    if callable(rule):
        return Rule(rule, norm_of="decayed gradient")
    raise TypeError(f"rule must be a name, a function or a Rule; got {rule!r}")


def evaluate(rules: Sequence[Rule], S: Any, hyper: Any, xp: Any) -> Any:
    """Return every layer's coefficients by its own rule.

    Parameters
    ----------
    rules : sequence of Rule
        One a layer.
    S : array of shape (layers, 3)
        The sums, of gradients as the rules shall see them.
    hyper : Hyper
        Hyper-parameters, arrays of shape (layers,).
    xp : Array API namespace
        Namespace of the arrays.

    Returns
    -------
    array of shape (layers, 6)
        In the order of the layers.

    Raises
    ------
    ValueError
        If a rule returns an array of another shape.
    """
    layers_of: dict[int, list[int]] = {}
    for layer, rule in enumerate(rules):
        layers_of.setdefault(id(rule), []).append(layer)
    if len(layers_of) == 1:
        return _evaluate_one(rules[0], S, hyper, xp)
    rows = []
    for layers in layers_of.values():
        index = asarray(layers, like=S, xp=xp)
        own = type(hyper)(*(xp.take(field, index, axis=0) for field in hyper))
        rows.append(_evaluate_one(rules[layers[0]], xp.take(S, index, axis=0), own, xp))
    place = {layer: row for row, layer in enumerate(layer for layers in layers_of.values() for layer in layers)}
    order = asarray([place[layer] for layer in range(len(rules))], like=S, xp=xp)
    return xp.take(xp.concat(rows, axis=0), order, axis=0)


def _evaluate_one(rule: Rule, S: Any, hyper: Any, xp: Any) -> Any:
    C = rule.function(S, hyper, xp)
    if tuple(C.shape) != (S.shape[0], 6):
        raise ValueError(f"a rule must return an array of shape ({S.shape[0]}, 6); got shape {tuple(C.shape)!r}")
    return C if C.dtype == S.dtype else xp.astype(C, S.dtype)
